# SPDX-License-Identifier: Apache-2.0
"""The sampler: order of convergence, guidance, prefix cache, one compile."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from qi2_jax.flow import sampler, schedules
from qi2_jax.models.mmdit import MMDiT

SIGMAS = schedules.sampling_sigmas(4, 24, schedules.ShiftConfig())
REFERENCES = {
  "t2i": (),
  "one_reference": ((4, 2),),
  "two_references": ((2, 4), (4, 4)),
}


def gaussian_velocity(mean, std):
  """Exact `E[eps - x0 | x]` for data N(mean, std^2)."""

  def velocity(x, sigma):
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    covariance = sigma - (1 - sigma) * std**2
    return covariance / variance * (x - (1 - sigma) * mean) - mean

  return velocity


def gaussian_error(steps, mean=1.5, std=0.5):
  """Relative error of the variance that `steps` Euler steps end with.

  The flow is affine, so two points give the exact mean and deviation.
  """
  sigmas = jnp.linspace(1.0, 0.0, steps + 1)
  velocity = gaussian_velocity(mean, std)
  ends = sampler.euler_scan(velocity, jnp.array([-1.0, 1.0]), sigmas)
  np.testing.assert_allclose(ends.mean(), mean, atol=1e-5)
  return abs(float(((ends[1] - ends[0]) / 2) ** 2 / std**2) - 1)


def test_euler_converges_at_first_order():
  errors = [gaussian_error(n) for n in (10, 40, 160, 640)]
  for coarse, fine in itertools.pairwise(errors):
    assert 0.2 <= fine / coarse <= 0.32
  assert errors[-1] < 0.006


def test_one_euler_step_is_exact_for_a_constant_velocity():
  x = jnp.arange(6.0).reshape(2, 3)
  out = sampler.euler_scan(lambda x, s: x * 0 + 2.0, x, jnp.array([1.0, 0.0]))
  np.testing.assert_allclose(out, x - 2.0)


@pytest.fixture(scope="module")
def model():
  return MMDiT(tiny_models.MMDIT)


@pytest.fixture(scope="module")
def variables(model):
  return {"params": tiny_models.mmdit_params(model)}


@functools.partial(jax.jit, static_argnames=("model", "use_cache"))
def draw(model, variables, cond, negative=None, guidance=1.0, use_cache=True):
  x = tiny_models.noise(model.config, size=2)
  return sampler.sample(
    model, variables, x, SIGMAS, cond, negative, guidance, use_cache=use_cache
  )


@pytest.mark.parametrize("name", REFERENCES)
def test_cached_equals_uncached(model, variables, name):
  cond = tiny_models.conditioning(
    model.config, references=REFERENCES[name], length=30
  )
  cached = draw(model, variables, cond)
  uncached = draw(model, variables, cond, use_cache=False)
  assert tiny_models.relative(cached, uncached) <= 1e-5
  other = cond.replace(text_BTC=cond.text_BTC[:, ::-1])
  assert tiny_models.relative(draw(model, variables, other), cached) > 1e-2


def test_a_variant_without_cache_samples_too(variables):
  model = MMDiT(dataclasses.replace(tiny_models.MMDIT, attention="joint"))
  out = draw(model, variables, tiny_models.conditioning(model.config))
  assert np.isfinite(out).all()


@pytest.fixture(scope="module")
def conditions(model):
  refs = REFERENCES["one_reference"]
  cond = tiny_models.conditioning(model.config, references=refs, length=20)
  other = tiny_models.conditioning(
    model.config, words=(1, 1), references=refs, length=20, seed=5
  )
  return cond, other.replace(references_BRZ=cond.references_BRZ)


def test_guidance_one_equals_no_guidance(model, variables, conditions):
  cond, negative = conditions
  plain = draw(model, variables, cond)
  guided = draw(model, variables, cond, negative, 1.0)
  assert tiny_models.relative(guided, plain) <= 1e-5


def test_guidance_zero_equals_the_negative_prompt(model, variables, conditions):
  cond, negative = conditions
  plain = draw(model, variables, negative)
  guided = draw(model, variables, cond, negative, 0.0)
  assert tiny_models.relative(guided, plain) <= 1e-5


def test_guidance_moves_along_the_difference(model, variables, conditions):
  cond, negative = conditions
  x, sigma = tiny_models.noise(model.config), jnp.float32(0.7)

  @jax.jit
  def at(cond, negative=None, guidance=1.0):
    velocity = sampler.guided_velocity(
      model, variables, cond, negative, guidance
    )
    return velocity(x, sigma)

  positive, other = at(cond), at(negative)
  assert tiny_models.relative(positive, other) > 1e-2
  expected = positive + 2.5 * (positive - other)
  assert tiny_models.relative(at(cond, negative, 3.5), expected) <= 1e-5


def test_one_compilation_serves_every_prompt_of_a_shape(model, variables):
  traces = []

  @jax.jit
  def run(x, cond):
    traces.append(x.shape)
    return sampler.sample(model, variables, x, SIGMAS, cond)

  x = tiny_models.noise(model.config)
  outs = []
  for seed, words in enumerate([(4, 7), (1, 2), (9, 9)]):
    cond = tiny_models.conditioning(
      model.config, words=words, length=12, seed=seed
    )
    outs.append(run(x, cond))
  assert len(traces) == 1
  assert tiny_models.relative(outs[0], outs[1]) > 1e-2
