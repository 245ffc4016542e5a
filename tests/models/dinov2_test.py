# SPDX-License-Identifier: Apache-2.0
"""Properties of DINOv2 that need no other library (torch for the resize)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.errors import InputError
from qi2_jax.models import dinov2
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.parallel.sharding import tree_shardings

TINY = dataclasses.replace(dinov2.PRESETS["tiny"], num_layers=2)


@pytest.fixture(scope="module")
def params():
  model = dinov2.DINOv2(TINY)
  return jax.jit(lambda k: dinov2.init_params(model, k))(jax.random.key(0))


@pytest.mark.parametrize("h, w", [(5, 5), (3, 8), (12, 4), (1, 2)])
def test_positions_resample_as_torch_does(h, w):
  torch = pytest.importorskip("torch")
  table = np.random.default_rng(0).normal(size=(5, 5, 3)).astype(np.float32)
  for ours, antialias in (
    (dinov2.patch_positions, False), (dinov2.patch_positions_smooth, True),
  ):  # fmt: skip
    theirs = torch.nn.functional.interpolate(
      torch.tensor(table).permute(2, 0, 1)[None], (h, w), mode="bicubic",
      antialias=antialias,
    )[0].permute(1, 2, 0)  # fmt: skip
    out = ours(jnp.asarray(table), h, w)
    np.testing.assert_allclose(out, theirs, atol=2e-6)


def test_the_tables_own_size_is_untouched():
  np.testing.assert_array_equal(dinov2.resample_matrix(7, 7), np.eye(7))


def test_features_are_the_images_own_and_in_place(params):
  model = dinov2.DINOv2(TINY)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 28, 42, 3)), jnp.float32)
  run = jax.jit(lambda x: model.apply({"params": params}, x))
  out = run(x)
  assert out.shape == (2, 2, 3, 64) and out.dtype == jnp.float32
  np.testing.assert_allclose(out[1:], run(x[1:]), atol=1e-5)
  # A change inside one patch changes that patch most.
  moved = np.abs(run(x.at[0, 20, 30].add(3.0)) - out)[0].max(-1)
  assert np.unravel_index(moved.argmax(), moved.shape) == (1, 2)
  assert moved.min() > 0


def test_bf16_stays_close(params):
  x = jax.random.normal(jax.random.key(1), (1, 28, 28, 3))
  full = dinov2.DINOv2(TINY).apply({"params": params}, x)
  half = dinov2.DINOv2(dataclasses.replace(TINY, dtype=jnp.bfloat16))
  out = half.apply({"params": params}, x)
  assert out.dtype == jnp.bfloat16
  assert np.abs(out.astype(jnp.float32) - full).max() < 0.05 * full.max()


def test_preprocess_scales_and_normalises():
  white = jnp.ones((1, 32, 48, 3))
  out = dinov2.preprocess(white, (2, 3))
  assert out.shape == (1, 28, 42, 3)
  expected = (1 - np.asarray(dinov2.MEAN)) / np.asarray(dinov2.STD)
  np.testing.assert_allclose(out[0, 5, 5], expected, rtol=1e-5)
  black = dinov2.preprocess(-white, (2, 3))
  expected = -np.asarray(dinov2.MEAN) / np.asarray(dinov2.STD)
  np.testing.assert_allclose(black[0, 0, 0], expected, rtol=1e-5)


def test_wrong_input_is_named():
  with pytest.raises(InputError, match="4 channels"):
    dinov2.preprocess(jnp.zeros((1, 8, 8, 4)), (1, 1))
  with pytest.raises(InputError, match="multiples of 14 px"):
    jax.eval_shape(
      lambda x: dinov2.DINOv2(TINY).init(jax.random.key(0), x),
      jnp.zeros((1, 28, 30, 3)),
    )
  with pytest.raises(InputError, match="layer 2 does not exist"):
    dinov2.upto(TINY, 2)
  with pytest.raises(InputError, match="multiple of num_heads"):
    dataclasses.replace(TINY, num_heads=3)


def test_every_parameter_has_a_sharding_rule():
  config = dataclasses.replace(dinov2.PRESETS["dinov2_large"], num_registers=4)
  abstract = jax.eval_shape(
    lambda: dinov2.init_params(dinov2.DINOv2(config), jax.random.key(0))
  )
  mesh = create_mesh({"fsdp": 4, "tensor": 2})
  places = tree_shardings(abstract, dinov2.SHARDING_RULES, mesh)
  spec = places["blocks"]["to_q"]["kernel"].spec
  assert spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
  assert abstract["registers"].shape == (4, 1024)
