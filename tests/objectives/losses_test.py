# SPDX-License-Identifier: Apache-2.0
"""Losses against numpy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.objectives import flow_matching, vae


@pytest.fixture
def pair():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
  return a, b


@pytest.mark.parametrize("ours, name", [
  (flow_matching.velocity_mse, "mse_loss"), (vae.l1, "l1_loss"),
])  # fmt: skip
def test_losses_equal_torch_per_example(ours, name, pair):
  torch = pytest.importorskip("torch")
  theirs = getattr(torch.nn.functional, name)(
    *map(torch.tensor, pair), reduction="none"
  )
  out = ours(*pair)
  assert out.shape == (3,)
  np.testing.assert_allclose(out, theirs.mean(dim=(1, 2, 3)), rtol=1e-6)


def test_velocity_mse_equals_numpy_at_any_rank(pair):
  for a, b in [pair, (pair[0][..., 0], pair[1][..., 0])]:
    expected = [np.mean((x - y) ** 2) for x, y in zip(a, b)]
    np.testing.assert_allclose(
      flow_matching.velocity_mse(a, b), expected, rtol=1e-5
    )


@pytest.mark.parametrize("width", [0.05, 0.3, 2.0])
def test_smooth_l1_is_the_pseudo_huber_loss(width, pair):
  error = pair[0] - pair[1]
  expected = width * (np.sqrt(1 + (error / width) ** 2) - 1)
  ours = vae.smooth_l1(*pair, width)
  np.testing.assert_allclose(ours, expected.mean(axis=(1, 2, 3)), rtol=1e-4)
  assert (ours < vae.l1(*pair)).all()


def test_smooth_l1_tends_to_l1(pair):
  np.testing.assert_allclose(
    vae.smooth_l1(*pair, 1e-4), vae.l1(*pair), rtol=1e-3
  )
  np.testing.assert_array_equal(vae.smooth_l1(*pair, 0), vae.l1(*pair))


def test_smooth_l1_is_quadratic_at_the_bottom():
  image = jnp.zeros((1, 1, 1, 1))
  loss = lambda d: vae.smooth_l1(image + d, image, 0.3)[0]  # noqa: E731
  assert jax.grad(loss)(0.0) == 0
  assert jax.grad(jax.grad(loss))(0.0) == pytest.approx(1 / 0.3, rel=1e-4)
  assert jax.grad(loss)(30.0) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("loss", [flow_matching.velocity_mse, vae.l1])
def test_losses_are_fp32_under_bf16(loss):
  a = jnp.ones((1, 4096), jnp.bfloat16)
  b = jnp.zeros((1, 4096), jnp.bfloat16)
  out = loss(a, b)
  assert out.dtype == jnp.float32 and out[0] == 1.0


def test_latent_statistics_give_mean_and_variance(pair):
  mean, square = vae.latent_statistics(jnp.asarray(pair[0]))
  z = pair[0].reshape(-1, 6)
  np.testing.assert_allclose(mean, z.mean(0), atol=1e-6)
  np.testing.assert_allclose(square - mean**2, z.var(0), rtol=1e-4)
