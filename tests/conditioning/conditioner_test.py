# SPDX-License-Identifier: Apache-2.0
"""Host and device halves of the conditioner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from qi2_jax.conditioning import conditioner as lib
from qi2_jax.conditioning.encoder import WordHashEncoder, num_system_tokens
from qi2_jax.conditioning.layout import prefix_length
from qi2_jax.errors import InputError
from qi2_jax.models.vae import VAE

ENCODER = WordHashEncoder(width=16)
CONDITIONER = lib.Conditioner(ENCODER, factor=16, text_length=40)
SIZES = {
  "t2i": (),
  "one": ((64, 32),),
  "two": ((32, 96), (64, 64)),
}


def images(sizes, seed=0):
  rng = np.random.default_rng(seed)
  return tuple(rng.integers(0, 256, (*s, 3), np.uint8) for s in sizes)


@pytest.mark.parametrize("name", SIZES)
def test_host_arrays_have_one_shape_for_every_prompt(name):
  refs = images(SIZES[name])
  prompts = ["", "a red circle", "word " * 100]
  made = [CONDITIONER.host(p, refs, (64, 96)) for p in prompts]
  stacked = lib.stack(made)
  grids = [(h // 16, w // 16) for h, w in SIZES[name]]
  length = stacked["ids"].shape[1] - num_system_tokens(ENCODER)
  # References never eat into the prompt's own 40 tokens.
  slots = sum(h * w // 4 for h, w in grids)
  assert length >= 40 + slots and (length == 40 or grids)
  layout = stacked["layout"]
  assert layout["source_BP"].shape == (3, prefix_length(length, grids))
  assert layout["target_positions_BN3"].shape == (3, 4 * 6, 3)
  counts = stacked["ids_valid"].sum(axis=1)
  assert counts[0] < counts[1] < counts[2] == stacked["ids"].shape[1]


@pytest.mark.parametrize("name", SIZES)
def test_slots_line_up_with_the_ids(name):
  """Slots become latents in order; every other token keeps its state."""
  host = CONDITIONER.host("a cat", images(SIZES[name]), (32, 32))
  ids = host["ids"][num_system_tokens(ENCODER) :]
  valid = host["ids_valid"][num_system_tokens(ENCODER) :]
  layout = host["layout"]
  source = layout["source_BP"][layout["valid_BP"]]
  words = source[source < len(ids)]
  np.testing.assert_array_equal(
    words, np.flatnonzero(valid & (ids != ENCODER.slot_id))
  )
  latents = source[source >= len(ids)] - len(ids)
  count = sum(h * w // 256 for h, w in SIZES[name])
  np.testing.assert_array_equal(latents, np.arange(count))


def test_the_whole_prompt_reaches_the_states():
  batch = lib.stack([CONDITIONER.host("blue dog", (), (32, 32))])
  states = CONDITIONER.encode_text(batch)
  assert states.shape == (1, 40, 16)
  start = num_system_tokens(ENCODER)
  whole = ENCODER.states(batch["ids"], batch["ids_valid"])
  np.testing.assert_array_equal(states, whole[:, start:])
  count = int(batch["ids_valid"].sum()) - start
  assert (np.abs(states[0, :count]).max(axis=-1) > 0).all()
  assert (states[0, count:] == 0).all()


def test_references_become_normalised_latents_in_order():
  vae = VAE(tiny_models.VAE)
  shapes = jax.eval_shape(
    vae.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes["params"])
  stats = {"mean": jnp.arange(4.0), "std": 1.0 + jnp.arange(4.0)}
  variables = {
    "params": tiny_models.randomise(ones), "latent_stats": stats
  }  # fmt: skip
  rows = [images(SIZES["two"], seed) for seed in (0, 1)]
  batch = lib.stack([CONDITIONER.host("x", row, (32, 32)) for row in rows])
  cond = jax.jit(CONDITIONER.encode, static_argnums=0)(vae, variables, batch)
  expected = [
    np.asarray(
      lib.encode_images(vae, variables, jnp.asarray(row[i])[None])
    ).reshape(-1, 4)
    for row in rows
    for i in (0, 1)
  ]
  np.testing.assert_allclose(
    cond.references_BRZ[0], np.concatenate(expected[:2]), atol=1e-4
  )
  np.testing.assert_allclose(
    cond.references_BRZ[1], np.concatenate(expected[2:]), atol=1e-4
  )
  raw = vae.apply(variables, lib.to_unit(rows[0][0][None]), method="moments")
  np.testing.assert_allclose(
    (np.asarray(raw[0]).reshape(-1, 4) - np.arange(4)) / (1 + np.arange(4)),
    expected[0], atol=1e-4,
  )  # fmt: skip


def test_a_reference_of_another_size_is_refused():
  with pytest.raises(InputError, match="multiple of 32"):
    CONDITIONER.host("x", images([(48, 64)]), (32, 32))


def test_uint8_survives_the_unit_range():
  values = np.arange(256, dtype=np.uint8)
  unit = np.asarray(lib.to_unit(values))
  assert unit.min() == -1.0 and unit.max() == 1.0
  np.testing.assert_array_equal(lib.to_uint8(unit), values)
  np.testing.assert_array_equal(lib.to_uint8(np.array([-9.0, 9.0])), [0, 255])
