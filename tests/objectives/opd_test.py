# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation: a guided teacher into a student without guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_toy as toy

from qi2_jax.flow import sde
from qi2_jax.objectives import flow_grpo, opd

RNG = np.random.default_rng(0)
GUIDANCE = 2.0


def normal(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("kind", sde.KERNELS)
def test_the_kl_form_differs_by_a_weight_per_step(kind):
  kernel = sde.Kernel(kind, 0.7)
  sigma_B = jnp.asarray([1.0, 0.8, 0.5, 0.2])
  following_B = jnp.asarray([0.9, 0.6, 0.3, 0.0])
  x, v, teacher = (normal(4, 6) for _ in "abc")
  steps = flow_grpo.Transition(x, x, sigma_B, following_B)
  mine, other = (flow_grpo.score(kernel, u, steps) for u in (v, teacher))
  kl = flow_grpo.gaussian_kl(mine.mean, other.mean, mine.std)
  weight = opd.kl_weight(kernel, sigma_B, following_B)
  np.testing.assert_allclose(
    kl, weight * opd.velocity_loss(v, teacher), rtol=1e-4
  )
  assert weight[3] == 0 and np.all(weight[:3] > 0)


def test_the_weight_of_a_flow_step_in_closed_form():
  t, following, a = 0.6, 0.45, 0.7
  weight = opd.kl_weight(
    sde.Kernel("flow", a), jnp.asarray([t]), jnp.asarray([following])
  )
  s2 = a**2 * t / (1 - t)
  exact = (t - following) * (1 + a**2 / 2) ** 2 / (2 * s2)
  np.testing.assert_allclose(weight, exact, rtol=1e-5)


def test_the_student_learns_to_do_without_guidance():
  """Two networks of one size, trained on the student's own ODE states."""
  teacher, start = (toy.init(jax.random.key(0)) for _ in "ab")
  class_B = toy.classes(128, True)
  rows = jnp.repeat(class_B, 10)
  t_B = jnp.tile(jnp.asarray(toy.TRAIN[:10]), 128)

  def loss(params, key):
    noise = jax.random.normal(key, (128, 2))
    own = toy.rollout("none", 1.0, jax.lax.stop_gradient(params), class_B)
    ode = sde.Kernel("flow", 0.0)
    x = sde.walk(own, noise, toy.TRAIN, ode, 0, 9, key).states.reshape(-1, 2)
    c, u = (
      toy.apply(teacher, x, t_B, which)
      for which in (rows, jnp.full_like(rows, toy.NONE))
    )
    goal = flow_grpo.rollout_velocity("full", c, u, GUIDANCE)
    return opd.velocity_loss(toy.apply(params, x, t_B, rows), goal).mean()

  params, losses = toy.descend(loss, start, 300, jax.random.key(1), 1e-2)
  assert np.mean(losses[-10:]) < losses[0] / 50
  test = toy.classes(512, True)
  goal = toy.samples(teacher, test, GUIDANCE, toy.TRAIN)
  before, after = (
    float(jnp.abs(toy.samples(p, test, None, toy.TRAIN) - goal).mean())
    for p in (start, params)
  )
  assert after < before / 2
