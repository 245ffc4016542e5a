# SPDX-License-Identifier: Apache-2.0
"""DiffusionNFT: reinforcement by flow matching (arXiv 2509.16117).

    v+ = (1 - b) v_old + b v        v- = (1 + b) v_old - b v
    L  = r |v+ - u|^2 + (1 - r) |v- - u|^2,   u = eps - x0

on images x0 of the old policy with fresh noise; r in [0, 1] says how good an
image is for its prompt. Good images pull v towards themselves, bad ones push
it away: the minimum is v_old + (2 / b) E[r (u - v_old) | x_t], so r = 1/2
everywhere teaches nothing, unlike plain flow matching on the images.

Any sampler may make the images, without log-probabilities, but without
guidance: the loss is that of a single velocity.

Shapes: B images; samples have any shape `[B, ...]`.
"""

import jax
import jax.numpy as jnp

from qi2_jax.flow import path
from qi2_jax.flow.sde import mean_of_rows

# An image that equals its estimate must not divide by zero (published).
_FLOOR = 1e-5


def optimality(advantage_B: jax.Array, clip: float = 5.0) -> jax.Array:
  """r in [0, 1]: `1/2 + 1/2 clip(A / clip, -1, 1)`."""
  return 0.5 + 0.5 * jnp.clip(advantage_B / clip, -1.0, 1.0)


def _branches(v, v_old, beta: float):
  """`(v+, v-)`."""
  v_old = jax.lax.stop_gradient(v_old)
  return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v


def velocity_loss(v, v_old, target, r_B, beta: float) -> jax.Array:
  """The loss above, mean over the elements: `[B]`.

  Args:
    v: trained velocity at x_t.
    v_old: of the old policy.
    target: `eps - x0`.
    r_B: see `optimality`.
    beta: b, how far the implicit policies lie from the old one.
  """
  good, bad = (
    mean_of_rows(jnp.square(branch - target))
    for branch in _branches(v, v_old, beta)
  )
  return r_B * good + (1.0 - r_B) * bad


def data_loss(x_t, x0, t_B, v, v_old, r_B, beta: float) -> jax.Array:
  """The loss in clean estimates with the published weight: `[B]`.

  Each branch's squared error of x0 is divided by its own mean absolute error,
  without gradient, so that no noise level dominates.

  Args:
    x_t: noised images.
    x0: the images.
    t_B: noise levels.
    v: trained velocity at x_t.
    v_old: of the old policy.
    r_B: see `optimality`.
    beta: see `velocity_loss`.
  """

  def error(branch):
    gap = path.data_from_velocity(x_t, branch, t_B) - x0
    size = jax.lax.stop_gradient(mean_of_rows(jnp.abs(gap)))
    return mean_of_rows(jnp.square(gap)) / jnp.maximum(size, _FLOOR)

  good, bad = (error(branch) for branch in _branches(v, v_old, beta))
  return (r_B * good + (1.0 - r_B) * bad) / beta


def old_decay(step, rate: float = 0.001, highest: float = 0.5) -> jax.Array:
  """Decay of the old policy's parameters after a step: `min(rate i, highest)`.

  At 0 the old policy is the trained one, which is on-policy and unstable; the
  published default rises slowly.
  """
  return jnp.minimum(rate * jnp.asarray(step, jnp.float32), highest)
