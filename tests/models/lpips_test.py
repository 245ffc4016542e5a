# SPDX-License-Identifier: Apache-2.0
"""Properties of LPIPS that need no other library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.interop import lpips as interop
from qi2_jax.models import lpips
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.parallel.sharding import tree_shardings

CONFIG = lpips.LPIPSConfig(widths=(4, 6), depths=(1, 2))


@pytest.fixture(scope="module")
def small():
  return interop.random_features(jax.random.key(0), config=CONFIG)


def images(shape=(2, 8, 10, 3), seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.uniform(-1, 1, (2, *shape)), jnp.float32)


def test_distance_is_zero_at_home_positive_and_symmetric(small):
  model, params = small
  a, b = images()
  score = jax.jit(lambda a, b: model.apply({"params": params}, a, b))
  np.testing.assert_array_equal(score(a, a), np.zeros(2))
  assert (score(a, b) > 1e-3).all()
  np.testing.assert_allclose(score(a, b), score(b, a), rtol=1e-6)


def test_examples_do_not_mix(small):
  model, params = small
  a, b = images()
  score = lambda a, b: model.apply({"params": params}, a, b)  # noqa: E731
  np.testing.assert_allclose(score(a, b)[:1], score(a[:1], b[:1]), rtol=1e-6)


def test_unit_channels_has_a_gradient_at_dead_pixels():
  x = jnp.zeros((1, 1, 2, 3)).at[0, 0, 1].set(jnp.asarray([3.0, 0.0, 4.0]))
  out, pull = jax.vjp(lpips.unit_channels, x)
  np.testing.assert_allclose(out[0, 0], [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6)
  assert np.isfinite(pull(jnp.ones_like(out))[0]).all()


def test_identical_dead_images_have_a_zero_gradient(small):
  model, params = small
  # A bias far below zero silences the first tap at every pixel.
  bias = jnp.full((4,), -1e3)
  vgg = params["vgg"] | {"conv1_1": params["vgg"]["conv1_1"] | {"bias": bias}}
  dead = {"params": params | {"vgg": vgg}}
  a, b = images()
  grad = jax.grad(lambda a: model.apply(dead, a, b).sum())(a)
  np.testing.assert_array_equal(grad, np.zeros_like(a))


def test_the_distance_is_fp32_under_bf16(small):
  _, params = small
  half = lpips.LPIPS(
    lpips.LPIPSConfig(CONFIG.widths, CONFIG.depths, jnp.bfloat16)
  )
  full = lpips.LPIPS(CONFIG)
  a, b = images()
  coarse = half.apply({"params": params}, a, b)
  assert coarse.dtype == jnp.float32
  np.testing.assert_allclose(
    coarse, full.apply({"params": params}, a, b), rtol=0.05
  )
  assert jax.grad(lambda a: half.apply({"params": params}, a, b).sum())(
    a
  ).dtype == jnp.float32  # fmt: skip
  features = jax.random.normal(jax.random.key(1), (1, 2, 3, 50), jnp.bfloat16)
  unit = lpips.unit_channels(features)
  x = np.asarray(features, np.float64)
  expected = x / np.linalg.norm(x, axis=-1, keepdims=True)
  np.testing.assert_allclose(unit, expected, rtol=1e-6)


def test_random_features_warn_loudly(monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda text: said.append(text))
  interop.random_features(jax.random.key(0), config=CONFIG)
  assert "RANDOM FEATURES" in said[0]


@pytest.mark.parametrize("shape, message", [
  ((1, 16, 16, 4), "4 channels"), ((1, 16, 15, 3), "at least 16 px"),
])  # fmt: skip
def test_wrong_images_are_named(shape, message):
  model = lpips.LPIPS(lpips.LPIPSConfig())
  with pytest.raises(InputError, match=message):
    jax.eval_shape(
      lambda x: model.init(jax.random.key(0), x, x), jnp.zeros(shape)
    )
  with pytest.raises(InputError, match="one entry per stage"):
    lpips.LPIPSConfig(widths=(4,), depths=(1, 2))


def test_every_parameter_has_a_sharding_rule():
  model = lpips.LPIPS(lpips.LPIPSConfig())
  abstract = jax.eval_shape(lambda: lpips.init_params(model, jax.random.key(0)))
  mesh = create_mesh({"fsdp": 8})
  places = tree_shardings(abstract, lpips.SHARDING_RULES, mesh)
  kernel = places["vgg"]["conv5_3"]["kernel"].spec
  assert kernel == jax.sharding.PartitionSpec(None, None, None, "fsdp")
  sizes = [leaf.size for leaf in jax.tree.leaves(abstract)]
  # The convolutions of VGG16 and the linear weights.
  assert sum(sizes) == 14_714_688 + 1_472
