# SPDX-License-Identifier: Apache-2.0
"""Host and device halves of the conditioner."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from qi2_jax.conditioning import conditioner as lib
from qi2_jax.conditioning.encoder import built_in, num_system_tokens
from qi2_jax.conditioning.layout import MAX_POSITION, prefix_length
from qi2_jax.errors import InputError
from qi2_jax.models.vae import VAE

ENCODER, PARAMS = built_in(width=16)
MODULE = VAE(tiny_models.VAE)
CONDITIONER = lib.Conditioner(ENCODER, MODULE, text_length=40)
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


@pytest.mark.parametrize("name", SIZES)
def test_the_whole_prompt_reaches_the_states(name):
  """The system turn is seen by the encoder and dropped from its states."""
  batch = lib.stack(
    [CONDITIONER.host("blue dog", images(SIZES[name]), (32, 32))]
  )
  states = jax.jit(CONDITIONER.encode_text)(PARAMS, batch)
  start = num_system_tokens(ENCODER)
  whole = jax.jit(ENCODER.states)(PARAMS, batch)
  assert states.shape == (1, batch["ids"].shape[1] - start, 16)
  np.testing.assert_allclose(states, whole[:, start:], atol=1e-6)


def test_the_encoder_reads_the_images():
  """Words after an image change with it; the state before it does not."""
  hosts = [
    CONDITIONER.host("blue dog", images(SIZES["one"], seed), (32, 32))
    for seed in (0, 1)
  ]
  a, b = jax.jit(CONDITIONER.encode_text)(PARAMS, lib.stack(hosts))
  ids = hosts[0]["ids"][num_system_tokens(ENCODER) :]
  first = int(np.argmax(ids == ENCODER.slot_id))
  np.testing.assert_allclose(a[:first], b[:first], atol=1e-6)
  count = int(hosts[0]["ids_valid"].sum()) - num_system_tokens(ENCODER)
  assert (np.abs(a - b)[first:count].max(axis=-1) > 1e-3).all()


def test_padding_does_not_change_a_state():
  short = CONDITIONER.host("a cat", images(SIZES["one"]), (32, 32))
  long = CONDITIONER.host("a cat", images(SIZES["one"]), (32, 32), 80)
  encode = jax.jit(CONDITIONER.encode_text)
  a = np.asarray(encode(PARAMS, lib.stack([short])))
  b = np.asarray(encode(PARAMS, lib.stack([long])))
  assert b.shape[1] == a.shape[1] + 40
  count = int(short["ids_valid"].sum()) - num_system_tokens(ENCODER)
  np.testing.assert_allclose(a[0, :count], b[0, :count], atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("words", [0, 1, 39, 40, 41, 200])
def test_the_fitting_length_cuts_nothing(name, words):
  prompt, refs = " red" * words, images(SIZES[name])
  length = CONDITIONER.fitting_length(prompt, refs)
  assert length % 40 == 0
  fits = CONDITIONER.host(prompt, refs, (32, 32), length)
  ids = fits["ids"][fits["ids_valid"]]
  red = ENCODER.tokenize(" red")[0]
  assert (ids == red).sum() == words
  if length > 40:
    cut = CONDITIONER.host(prompt, refs, (32, 32), length - 40)
    assert (cut["ids"][cut["ids_valid"]] == red).sum() < words


def test_a_prompt_beyond_the_position_table_is_refused():
  for words in (MAX_POSITION + 10, 3 * MAX_POSITION):
    prompt = " red" * words
    with pytest.raises(InputError, match="position table has 8192 rows"):
      length = CONDITIONER.fitting_length(prompt, ())
      CONDITIONER.host(prompt, (), (32, 32), length)


def test_eleven_references_are_refused():
  refs = images([(32, 32)] * 11)
  with pytest.raises(InputError, match="at most 10"):
    CONDITIONER.host("x", refs, (32, 32))
  assert len(CONDITIONER.host("x", refs[:10], (32, 32))["references"]) == 10


def test_an_encoder_with_other_slots_is_refused():
  config = dataclasses.replace(tiny_models.VAE, dim_mult=(1, 2))
  config = dataclasses.replace(config, temporal_downsample=(False,))
  with pytest.raises(InputError, match="32 px per slot"):
    lib.Conditioner(ENCODER, VAE(config), 40)


def test_references_become_normalised_latents_in_order():
  vae = MODULE
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
  frozen = lib.Frozen(variables, PARAMS)
  cond = jax.jit(CONDITIONER.encode)(frozen, batch)
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
