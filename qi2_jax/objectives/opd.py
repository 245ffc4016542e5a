# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation: a teacher corrects the student's own walk.

    L = mean_n |v(x_n, t_n) - v*(x_n, t_n)|^2

over states x_n that the student itself visits from noise to data, with v* the
teacher's velocity under guidance: the student learns to do without. Several
teachers (one trained on text to image, one on edits) meet in one student by
turns, one per batch (Qwen-Image-2.0-RL, arXiv 2606.27608, as reviews of it
report).

Shapes: B rows, one state each; samples have any shape `[B, ...]`.
"""

import jax
import jax.numpy as jnp

from qi2_jax.flow import sde
from qi2_jax.flow.sde import mean_of_rows


def velocity_loss(v: jax.Array, v_teacher: jax.Array) -> jax.Array:
  """Squared velocity error, mean over the elements: fp32 `[B]`."""
  gap = v.astype(jnp.float32) - v_teacher.astype(jnp.float32)
  return mean_of_rows(jnp.square(gap))


def kl_weight(kernel: sde.Kernel, sigma_B, following_B) -> jax.Array:
  """What turns `velocity_loss` into the KL of stochastic steps, `[B]`.

  The KL of the two Gaussians of a step from the same state is
  (d mean / d v)^2 |v - v*|^2 / (2 std^2), the form in which verl-omni
  distils; 0 for the last, deterministic step.

  Args:
    kernel: of the steps.
    sigma_B: levels of the states.
    following_B: levels after the steps.
  """
  zero = jnp.zeros((sigma_B.shape[0], 1))
  at = [
    sde.transition(kernel, zero, v, sigma_B, following_B)[0][:, 0]
    for v in (zero, zero + 1.0)
  ]
  std_B = sde.step_std(kernel, sigma_B, following_B)
  drawn = std_B > 0
  gain = (at[1] - at[0]) / jnp.where(drawn, std_B, 1.0)
  return jnp.where(drawn, 0.5 * jnp.square(gain), 0.0)
