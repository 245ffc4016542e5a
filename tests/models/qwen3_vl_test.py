# SPDX-License-Identifier: Apache-2.0
"""Properties of the Qwen3-VL encoder; parity is tests/interop's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from qi2_jax.conditioning.vl_layout import text_positions
from qi2_jax.errors import InputError
from qi2_jax.models import qwen3_vl
from qi2_jax.models.qwen3_vl import PRESETS, Qwen3VL
from qi2_jax.models.qwen3_vl_vision import VisionTower
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh

CONFIG = dataclasses.replace(
  PRESETS["tiny"], vocab_size=64, image_token_id=7,
  vision=dataclasses.replace(PRESETS["tiny"].vision, patch_size=4),
)  # fmt: skip
LENGTH = 20


def abstract_params(config):
  return jax.eval_shape(
    functools.partial(qwen3_vl.init_params, Qwen3VL(config)),
    jax.random.key(0),
  )


def random_params(config, seed=0):
  """Fresh parameters with noise on norms and biases, so that none hides."""
  rng = np.random.default_rng(seed)
  fresh = jax.jit(functools.partial(qwen3_vl.init_params, Qwen3VL(config)))

  def one(path, leaf):
    name = sharding.path_name(path)
    noisy = "norm" in name or "bias" in name
    draw = rng.normal(size=leaf.shape).astype(np.float32)
    return np.asarray(leaf) + 0.2 * draw * noisy

  return jax.tree_util.tree_map_with_path(one, fresh(jax.random.key(seed)))


@pytest.fixture(scope="module")
def params():
  return random_params(CONFIG)


def rows(grids_of_rows, seed=0):
  """Inputs whose row i has images of `grids_of_rows[i]` and some words."""
  rng = np.random.default_rng(seed)
  stacked = []
  for i, grids in enumerate(grids_of_rows):
    ids = rng.integers(10, 64, 2).tolist()
    for h, w in grids:
      ids += [8] + [7] * (h * w) + [9]
    ids += rng.integers(10, 64, 3 + i % 3).tolist()
    positions, index = text_positions([t == 7 for t in ids], grids, LENGTH)
    padded = np.zeros(LENGTH, np.int32)
    padded[: len(ids)] = ids
    stacked.append((padded, np.arange(LENGTH) < len(ids), positions, index))
  return tuple(np.stack(x) for x in zip(*stacked))


def pixels(count, *grids, seed=1):
  """One image batch per grid of cells of 8 px."""
  rng = np.random.default_rng(seed)
  return tuple(
    rng.normal(size=(count, h * 8, w * 8, 3)).astype(np.float32)
    for h, w in grids
  )


@functools.cache
def jitted(config):
  apply = lambda p, *args: Qwen3VL(config).apply({"params": p}, *args)  # noqa: E731
  return jax.jit(apply)


def states(params, inputs, images=(), config=CONFIG):
  return np.asarray(jitted(config)(params, *inputs, images))


def test_text_skips_the_tower(params):
  ids, valid, positions, index = rows([(), ()])
  text_only = {k: v for k, v in params.items() if k != "visual"}
  bare = jitted(CONFIG)(text_only, ids, valid, positions)
  # The index is of no consequence without images.
  with_index = states(text_only, (ids, valid, positions, index))
  np.testing.assert_array_equal(bare, with_index)


def test_later_tokens_and_padding_do_not_matter(params):
  inputs = rows([((2, 2),), ((2, 2),)])
  images = pixels(2, (2, 2))
  before = states(params, inputs, images)
  ids, valid, positions, index = (x.copy() for x in inputs)
  ids[~valid] = 33
  positions[:, :, 12:] += 5 * ~valid[:, None, 12:]
  after = states(params, (ids, valid, positions, index), images)
  np.testing.assert_allclose(after[valid], before[valid], atol=1e-6)
  last = valid.sum(axis=1) - 1
  ids[[0, 1], last] = 34
  changed = states(params, (ids, valid, positions, index), images)
  earlier = valid & (np.arange(LENGTH) < last[:, None])
  np.testing.assert_allclose(changed[earlier], before[earlier], atol=1e-6)
  assert np.abs(changed - before)[[0, 1], last].min(axis=0).max() > 0.1


def test_dummy_images_are_never_seen(params):
  """Rows of two sizes share a batch; each equals its own run."""
  first, second = rows([((2, 2),)]), rows([((1, 3),)], seed=5)
  both = [np.concatenate(x) for x in zip(first, second)]
  # Row 1's image is the second of the tuple, after four dummy tokens.
  both[3][1][both[3][1] >= 0] += 4
  images = pixels(2, (2, 2), (1, 3))
  together = states(params, both, images)
  alone = [
    states(params, first, (images[0][:1],)),
    states(params, second, (images[1][1:],)),
  ]
  for row, single, valid in zip(together, alone, both[1]):
    np.testing.assert_allclose(row[valid], single[0][valid], atol=1e-5)
  dummies = (images[0].copy(), images[1].copy())
  dummies[0][1], dummies[1][0] = 50.0, -50.0
  np.testing.assert_array_equal(states(params, both, dummies), together)
  dummies[1][1, 0, 0] += 1.0
  moved = np.abs(states(params, both, dummies) - together).max(axis=(1, 2))
  assert moved[0] == 0 and moved[1] > 1e-3


def test_eight_devices_equal_one(params):
  inputs = rows([((2, 2), (1, 3))] * 3 + [()] * 1 + [((2, 2),)] * 4)
  images = pixels(8, (2, 2), (1, 3))
  expected = states(params, inputs, images)
  mesh = create_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  shardings = sharding.tree_shardings(params, qwen3_vl.SHARDING_RULES, mesh)
  placed = jax.device_put(params, shardings)
  batch = sharding.put_batch((inputs, images), mesh)
  with jax.set_mesh(mesh):
    compiled = jitted(CONFIG).lower(placed, *batch[0], batch[1]).compile()
    ours = compiled(placed, *batch[0], batch[1])
  assert "all-reduce" in compiled.as_text()
  assert tiny_models.relative(ours, expected) <= 1e-5


def test_every_large_parameter_of_the_full_size_is_split():
  abstract = abstract_params(PRESETS["qwen3_vl_8b"])
  mesh = create_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  shardings = sharding.tree_shardings(abstract, qwen3_vl.SHARDING_RULES, mesh)
  whole, shares = 0, 0
  for (path, leaf), rule in zip(
    jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(shardings)
  ):
    share = np.prod(rule.shard_shape(leaf.shape)) / leaf.size
    name = sharding.path_name(path)
    if leaf.size > 1e6:
      assert share <= 0.5, name
    if leaf.size > 1e6 and "embed" not in name:
      assert share == 0.25, name
    whole, shares = whole + leaf.size, shares + share * leaf.size
  assert shares / whole < 0.3


def test_bfloat16_stays_near_float32(params):
  inputs, images = rows([((2, 2),), ()]), pixels(2, (2, 2))
  expected = states(params, inputs, images)
  vision = dataclasses.replace(CONFIG.vision, dtype=jnp.bfloat16)
  half = dataclasses.replace(CONFIG, vision=vision, dtype=jnp.bfloat16)
  frozen = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
  ours = jitted(half)(frozen, *inputs, images)
  assert ours.dtype == jnp.bfloat16
  valid = inputs[1]
  error = np.asarray(ours, np.float32)[valid] - expected[valid]
  assert np.sqrt((error**2).mean() / (expected[valid] ** 2).mean()) < 0.02


def test_the_tower_keeps_its_taps_only():
  def scratch(depth, taps):
    config = dataclasses.replace(
      CONFIG.vision, depth=depth, deepstack_layers=taps, mlp_width=32
    )
    tower = VisionTower(config)
    image = jax.ShapeDtypeStruct((1, 96, 96, 3), jnp.float32)
    variables = jax.eval_shape(tower.init, jax.random.key(0), image)
    compiled = jax.jit(tower.apply).lower(variables, image).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # One more kept activation would be 576 patches of width 32 in fp32.
  activation = 576 * 32 * 4
  short, deep = scratch(4, (0, 1)), scratch(24, (0, 1))
  assert deep - short < activation
  assert scratch(4, (0, 1, 2)) - short > activation / 2


def test_frequencies_are_shared_as_the_section_says():
  for config in PRESETS.values():
    section = config.mrope_section
    moved = []
    for axis in range(3):
      positions = np.zeros((1, 3, 1), np.int32)
      positions[0, axis] = 3
      angles = qwen3_vl.mrope_angles(positions, section, config.rope_theta)
      moved.append(np.asarray(angles[0, 0]) != 0)
    assert tuple(np.sum(moved, axis=1)) == section
    np.testing.assert_array_equal(np.sum(moved, axis=0), 1)
    # Neighbouring frequencies belong to different axes.
    assert [int(np.argmax(m)) for m in moved] == [0, 1, 2]
    text = np.full((1, 3, 1), 3, np.int32)
    angles = qwen3_vl.mrope_angles(text, section, config.rope_theta)
    half = config.head_dim // 2
    np.testing.assert_allclose(
      angles[0, 0], 3 * config.rope_theta ** -(np.arange(half) / half),
      rtol=1e-5,
    )  # fmt: skip


def test_bad_inputs_are_named(params):
  ids, valid, positions, index = rows([((2, 2),)])
  images = pixels(1, (2, 2))
  with pytest.raises(InputError, match="image_index"):
    jitted(CONFIG)(params, ids, valid, positions, None, images)
  for shape in ((1, 12, 16, 3), (1, 16, 12, 3), (1, 16, 16, 4)):
    with pytest.raises(InputError, match="multiples of 8 px"):
      states(params, (ids, valid, positions, index), (np.zeros(shape),))


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("num_kv_heads", 3, "num_kv_heads 3"),
    ("mrope_section", (6, 5, 4), "half of head_dim"),
    ("width", 32, "must equal the width 32"),
  ],
)
def test_configs_that_do_not_fit_are_named(field, value, message):
  with pytest.raises(InputError, match=message):
    dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
  "field, value",
  [
    ("deepstack_layers", ()), ("deepstack_layers", (1, 1)),
    ("deepstack_layers", (-1, 1)), ("deepstack_layers", (0, 3)),
    ("num_heads", 3), ("num_positions", 63),
  ],
)  # fmt: skip
def test_towers_that_do_not_fit_are_named(field, value):
  with pytest.raises(InputError, match=f"vision.{field}|multiple of 4"):
    dataclasses.replace(CONFIG.vision, **{field: value})
