# SPDX-License-Identifier: Apache-2.0
"""Identities of the interpolation path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.flow import path


@pytest.fixture(params=[(5,), (5, 3), (5, 4, 2)], ids=str)
def sample(request):
  rng = np.random.default_rng(0)
  x0, eps = rng.normal(size=(2, *request.param)).astype(np.float32)
  return jnp.asarray(x0), jnp.asarray(eps), jnp.linspace(0.0, 1.0, 5)


def test_ends_are_data_and_noise(sample):
  x0, eps, sigma = sample
  np.testing.assert_array_equal(path.interpolate(x0, eps, 0 * sigma), x0)
  np.testing.assert_array_equal(path.interpolate(x0, eps, 0 * sigma + 1), eps)


def test_each_row_has_its_own_level(sample):
  x0, eps, sigma = sample
  x = path.interpolate(x0, eps, sigma)
  for i, s in enumerate(np.linspace(0, 1, 5)):
    expected = (1 - s) * np.asarray(x0[i]) + s * np.asarray(eps[i])
    np.testing.assert_allclose(x[i], expected, atol=1e-6)


def test_velocity_is_the_derivative_of_the_path(sample):
  x0, eps, sigma = sample
  _, slope = jax.jvp(
    lambda s: path.interpolate(x0, eps, s), (sigma,), (jnp.ones(5),)
  )
  np.testing.assert_allclose(slope, path.velocity(x0, eps), atol=1e-6)


def test_data_and_noise_are_recovered_from_the_velocity(sample):
  x0, eps, sigma = sample
  x, v = path.interpolate(x0, eps, sigma), path.velocity(x0, eps)
  np.testing.assert_allclose(
    path.data_from_velocity(x, v, sigma), x0, atol=1e-6
  )
  np.testing.assert_allclose(
    path.noise_from_velocity(x, v, sigma), eps, atol=1e-6
  )
