# SPDX-License-Identifier: Apache-2.0
"""Backward simulation meets the states of the sampler, without gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.flow import backward_simulation, sampler

SIGMAS = jnp.asarray([1.0, 0.9, 0.75, 0.5, 0.0])
NOISE = jax.random.normal(jax.random.key(0), (3, 2, 4))


def velocity(x, sigma):
  return jnp.sin(3.0 * x) + sigma * x


@pytest.mark.parametrize(
  "steps, expected",
  [
    (1, (1.0,)),
    (2, (1.0, 0.75)),
    (4, (1.0, 0.9, 0.75, 0.5)),
    (8, (1.0, 21 / 22, 0.9, 15 / 18, 0.75, 9 / 14, 0.5, 0.3)),
  ],
)
def test_grids(steps, expected):
  found = backward_simulation.grid(steps)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  even = backward_simulation.grid(steps, shift=1.0)
  np.testing.assert_allclose(even, np.linspace(1, 1 / steps, steps))


@pytest.mark.parametrize("stop", range(4))
def test_states_are_those_of_the_sampler(stop):
  x = NOISE
  for i in range(stop):
    x = x + (SIGMAS[i + 1] - SIGMAS[i]) * velocity(x, SIGMAS[i])
  found = backward_simulation.state_at(velocity, NOISE, SIGMAS, stop)
  np.testing.assert_allclose(found, x, rtol=1e-6, atol=1e-6)


def test_the_last_clean_sample_is_the_image():
  """Training at the last step is training on what the user will get."""
  x = backward_simulation.state_at(velocity, NOISE, SIGMAS, 3)
  clean = x - SIGMAS[3] * velocity(x, SIGMAS[3])
  image = sampler.euler_scan(velocity, NOISE, SIGMAS)
  np.testing.assert_allclose(clean, image, rtol=1e-6, atol=1e-6)


def test_renoising_keeps_the_clean_sample_and_draws_anew():
  key = jax.random.key(5)
  first = backward_simulation.state_at(velocity, NOISE, SIGMAS, 1, key)
  x0 = NOISE - SIGMAS[0] * velocity(NOISE, SIGMAS[0])
  eps = jax.random.normal(jax.random.fold_in(key, 0), NOISE.shape)
  np.testing.assert_allclose(first, 0.1 * x0 + 0.9 * eps, rtol=1e-5, atol=1e-6)
  second = backward_simulation.state_at(velocity, NOISE, SIGMAS, 2, key)
  x0 = first - SIGMAS[1] * velocity(first, SIGMAS[1])
  left = (second - 0.25 * x0) / 0.75
  assert np.abs(left - eps).max() > 0.5  # not the same noise again


def test_one_program_serves_every_step():
  traces = []

  @jax.jit
  def run(stop):
    traces.append(stop)
    return backward_simulation.state_at(velocity, NOISE, SIGMAS, stop)

  states = [run(stop) for stop in range(4)]
  assert len(traces) == 1
  assert len({float(s.sum()) for s in states}) == 4


def test_nothing_flows_back():
  def loss(noise):
    x = backward_simulation.state_at(velocity, noise, SIGMAS, 2)
    return jnp.sum(x**2)

  np.testing.assert_array_equal(jax.grad(loss)(NOISE), 0.0)
