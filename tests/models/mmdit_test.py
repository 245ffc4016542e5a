# SPDX-License-Identifier: Apache-2.0
"""The MMDiT: size, who sees whom, variants, remat, precision."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from qi2_jax.errors import InputError
from qi2_jax.models import attention, mmdit, mmdit_block
from qi2_jax.models.mmdit import PRESETS, Block, MMDiT, Tokens
from qi2_jax.parallel.sharding import path_name

TINY = tiny_models.MMDIT
REFERENCES = ((2, 2), (4, 2))


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def abstract(config):
  return jax.eval_shape(
    lambda: mmdit.init_params(MMDiT(config), jax.random.key(0))
  )


def test_the_full_preset_has_the_public_size():
  assert count(abstract(PRESETS["qwen_image_2_1"])) == 7_115_124_736


def test_per_block_modulation_is_the_only_difference_in_size():
  d, layers = 4096, 32
  more = (layers - 1) * d * 4 * d
  size = count(abstract(PRESETS["qwen_image_2_0"]))
  assert size == 7_115_124_736 + more


def test_parameters_do_not_depend_on_the_sequence():
  cond = tiny_models.conditioning(TINY, references=REFERENCES)
  shapes = jax.eval_shape(
    MMDiT(TINY).init, jax.random.key(0), tiny_models.noise(TINY),
    jnp.ones(2), cond,
  )  # fmt: skip
  assert jax.tree.map(lambda a: a.shape, shapes["params"]) == jax.tree.map(
    lambda a: a.shape, abstract(TINY)
  )


def test_a_fresh_model_predicts_zero():
  model, cond = MMDiT(TINY), tiny_models.conditioning(TINY)

  @jax.jit
  def fresh(key):
    params = mmdit.init_params(model, key)
    return model.apply(
      {"params": params}, tiny_models.noise(TINY), jnp.ones(2), cond
    )

  assert (fresh(jax.random.key(0)) == 0).all()


@pytest.mark.parametrize("name, value", [
  ("attention", "causal"), ("condition_time", "one"), ("modulation", "none"),
  ("gate", "sigmoid"), ("remat", True), ("rope_axes", (4, 6, 8)),
])  # fmt: skip
def test_unknown_variants_are_named(name, value):
  with pytest.raises(InputError, match=f"model.{name}"):
    dataclasses.replace(TINY, **{name: value})


def dependencies(config, blocks, valid, tokens):
  """Which block outputs depend on which inputs, prefix then target: [S, S].

  One layer is enough: the model only stacks them.
  """
  block, length = Block(config), len(blocks)
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.normal(size=s).astype(np.float32))  # noqa: E731
  rows = [draw(1, 4 * config.width) for _ in range(2)]
  angles = draw(1, length + tokens, 8)
  x = draw(length + tokens, config.width)
  blocks, valid = jnp.asarray(blocks)[None], jnp.asarray(valid)[None]
  layout = Tokens(*rows, angles, blocks, valid)

  def apply(variables, x):
    y, _ = block.apply(variables, x[None], None, layout)
    return y[0]

  shapes = jax.eval_shape(
    lambda: block.init(jax.random.key(0), x[None], None, layout)
  )
  ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
  variables = tiny_models.randomise(ones)
  weights = draw(config.width)
  row = lambda x, i: apply(variables, x)[i] @ weights  # noqa: E731
  grads = jax.jit(jax.vmap(jax.grad(row), (None, 0)))(x, jnp.arange(len(x)))
  return np.asarray(jnp.abs(grads).max(axis=-1) > 0)


BLOCKS = [-1, -1, 0, 0, 0, 0, 1, 1, -1, -1, -1]
VALID = [True] * 9 + [False] * 2


def test_block_causal_dependencies_are_exactly_the_rule():
  found = dependencies(TINY, BLOCKS, VALID, tokens=4)
  expected = np.zeros((15, 15), bool)
  for q in range(11):
    for k in range(q + 1):
      expected[q, k] = VALID[k] or q == k
    expected[q] |= (np.array(BLOCKS + [-1] * 4) == BLOCKS[q]) & (BLOCKS[q] >= 0)
  expected[11:] = VALID + [True] * 4
  np.testing.assert_array_equal(found, expected)
  # In words: no later text, whole own image, not the next image, no target.
  assert not found[0, 1] and found[2, 5] and not found[5, 6] and found[6, 5]
  assert not found[:11, 11:].any()


def test_joint_dependencies_are_all_valid_tokens():
  config = dataclasses.replace(TINY, attention="joint")
  found = dependencies(config, BLOCKS, VALID, tokens=4)
  valid = np.array(VALID + [True] * 4)
  expected = np.broadcast_to(valid, (15, 15)) | np.eye(15, dtype=bool)
  np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def edit():
  cond = tiny_models.conditioning(TINY, references=REFERENCES, length=20)
  return tiny_models.noise(TINY), jnp.array([0.2, 0.9]), cond


def velocity_and_sensitivities(config, x, sigma, cond):
  """Velocity, and gradients by parameters, noise level, text and latents."""
  model = MMDiT(config)
  weights = tiny_models.noise(config, seed=8)

  def loss(params, sigma, text, references):
    inputs = cond.replace(text_BTC=text, references_BRZ=references)
    out = model.apply({"params": params}, x, sigma, inputs)
    return (out * weights).sum(), out

  args = (
    tiny_models.mmdit_params(model), sigma, cond.text_BTC,
    cond.references_BRZ,
  )  # fmt: skip
  return jax.jit(
    jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
  )(*args)  # fmt: skip


# Half of the 16 combinations, in which every triple of choices occurs.
FIELDS = ("attention", "condition_time", "modulation", "gate")
VARIANTS = [
  tuple(mmdit_block.VARIANTS[name][i] for name, i in zip(FIELDS, bits))
  for bits in itertools.product((0, 1), repeat=4)
  if sum(bits) % 2 == 0
]


@pytest.mark.parametrize("attend, time, modulation, gate", VARIANTS)
def test_every_variant_reaches_every_parameter(
  attend, time, modulation, gate, edit
):
  config = dataclasses.replace(
    TINY, attention=attend, condition_time=time, modulation=modulation,
    gate=gate,
  )  # fmt: skip
  grads, out = velocity_and_sensitivities(config, *edit)
  assert out.shape == edit[0].shape and np.isfinite(out).all()
  for path, grad in jax.tree_util.tree_leaves_with_path(grads[0]):
    layers = grad if path_name(path).startswith("blocks/") else grad[None]
    for layer in layers:
      assert np.isfinite(layer).all() and np.abs(layer).max() > 0, path
  sigma, text, references = (np.abs(g) for g in grads[1:])
  assert sigma.min() > 0 and references.min() > 0
  true = len(tiny_models.slots_of(4, REFERENCES))
  assert (text[0, true:] == 0).all(), "padding was read"
  slots = np.array(tiny_models.slots_of(7, REFERENCES))
  used = text[1, : len(slots)].max(axis=-1) > 0
  np.testing.assert_array_equal(used, ~slots)  # latents replace slot states


@pytest.fixture(scope="module")
def plain(edit):
  return velocity_and_sensitivities(TINY, *edit)


def assert_equal_trees(ours, theirs, tolerance):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    assert tiny_models.relative(a, b) <= tolerance


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(remat, edit, plain):
  config = dataclasses.replace(TINY, remat=remat)
  assert_equal_trees(velocity_and_sensitivities(config, *edit), plain, 1e-5)


def test_chunks_change_nothing(edit, plain, monkeypatch):
  monkeypatch.setattr(attention, "CHUNK", 7)
  assert_equal_trees(velocity_and_sensitivities(TINY, *edit), plain, 2e-5)


def test_the_cache_serves_every_noise_level_and_target(edit):
  cond = edit[2]
  model = MMDiT(TINY)
  variables = {"params": tiny_models.mmdit_params(model)}
  cache = jax.jit(lambda: model.apply(variables, cond, method="prefix_cache"))()

  @jax.jit
  def both(x, sigma):
    cached = model.apply(
      variables, x, sigma, cache, cond.layout, method="decode"
    )
    return cached, model.apply(variables, x, sigma, cond)

  for seed, levels in [(1, [0.0, 1.0]), (2, [0.4, 0.7])]:
    cached, whole = both(tiny_models.noise(TINY, seed=seed), jnp.array(levels))
    assert tiny_models.relative(cached, whole) <= 1e-5


@pytest.mark.parametrize("field, value", [
  ("attention", "joint"), ("condition_time", "shared"),
])  # fmt: skip
def test_variants_without_a_cache_say_so(field, value, edit):
  config = dataclasses.replace(TINY, **{field: value})
  params = tiny_models.mmdit_params(MMDiT(TINY))
  with pytest.raises(InputError, match="no prefix cache"):
    MMDiT(config).apply({"params": params}, edit[2], method="prefix_cache")


def test_bf16_compute_stays_close(edit, plain):
  exact = plain[1]
  config = dataclasses.replace(TINY, dtype=jnp.bfloat16)
  variables = {"params": tiny_models.mmdit_params(MMDiT(TINY))}
  out = jax.jit(lambda: MMDiT(config).apply(variables, *edit))()
  assert out.dtype == jnp.float32
  error = float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))
  assert 1e-4 < error < 0.03
