# SPDX-License-Identifier: Apache-2.0
"""States that a few-step sampler meets at inference, made without data.

Backward simulation (Yin et al. 2024, arXiv 2405.14867, section 4.5): a
student in training sees what it will see when it samples, its own states at
the noise levels of its own grid, and not noised images of a data set.

Shapes: S steps; samples x have any shape `[B, ...]`.
"""

import jax
import jax.numpy as jnp

from qi2_jax.flow import sampler

SAMPLERS = ("euler", "renoise")


def grid(steps: int, shift: float = 3.0) -> tuple[float, ...]:
  """Levels of a few-step sampler without the final 0: 1, .9, .75, .5 for 4.

  Evenly spaced, then moved by `shift s / (1 + (shift - 1) s)`; a shift of 3
  is Qwen-Image-Lightning's.
  """
  even = [1.0 - i / steps for i in range(steps)]
  return tuple(shift * s / (1.0 + (shift - 1.0) * s) for s in even)


def renoise_step(velocity: sampler.Velocity, x, sigma, following, key):
  """To the clean estimate and back to `following` with fresh noise."""
  x0 = x - sigma * velocity(x, sigma)
  fresh = jax.random.normal(key, x.shape)
  return (1.0 - following) * x0 + following * fresh


def state_at(
  velocity: sampler.Velocity, noise: jax.Array, sigmas: jax.Array, stop,
  renoise: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
  """The state that the sampler meets at step `stop`, without any gradient.

  `velocity` must hold no parameter that is being differentiated: a loop of
  traced length has no reverse derivative.

  Args:
    velocity: `(x, sigma scalar) -> v` of the student.
    noise: starting noise.
    sigmas: `[S + 1]` decreasing levels ending at 0.
    stop: number of the step, 0 for the first; may be traced.
    renoise: key of the noise between two steps; None walks by Euler steps,
      as the public pipeline does.
  """

  def step(i, x):
    if renoise is None:
      return sampler.euler_step(velocity, x, sigmas[i], sigmas[i + 1])
    key = jax.random.fold_in(renoise, i)
    return renoise_step(velocity, x, sigmas[i], sigmas[i + 1], key)

  x = jax.lax.fori_loop(0, stop, step, noise.astype(jnp.float32))
  return jax.lax.stop_gradient(x)
