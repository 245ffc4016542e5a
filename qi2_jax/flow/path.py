# SPDX-License-Identifier: Apache-2.0
"""The time convention, stated once.

sigma in [0, 1] is the noise level: `x_sigma = (1 - sigma) * x0 + sigma * eps`
with sigma = 1 pure noise; the network predicts `v = eps - x0`. Sampling walks
sigma from 1 to 0.
"""

import jax


def rows(sigma_B: jax.Array, x: jax.Array) -> jax.Array:
  """One number per example, shaped to broadcast over `x` `[B, ...]`."""
  return sigma_B.reshape((-1,) + (1,) * (x.ndim - 1))


def interpolate(x0: jax.Array, eps: jax.Array, sigma_B: jax.Array):
  """Noisy sample at `sigma`: `(1 - sigma) x0 + sigma eps`."""
  s = rows(sigma_B, x0)
  return (1.0 - s) * x0 + s * eps


def velocity(x0: jax.Array, eps: jax.Array) -> jax.Array:
  """Regression target `eps - x0`, the same at every sigma."""
  return eps - x0


def data_from_velocity(x: jax.Array, v: jax.Array, sigma_B: jax.Array):
  """Clean sample implied by `v` at `x_sigma`: `x - sigma v`."""
  return x - rows(sigma_B, x) * v


def noise_from_velocity(x: jax.Array, v: jax.Array, sigma_B: jax.Array):
  """Noise implied by `v` at `x_sigma`: `x + (1 - sigma) v`."""
  return x + (1.0 - rows(sigma_B, x)) * v
