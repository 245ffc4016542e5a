# SPDX-License-Identifier: Apache-2.0
"""Flow-matching regression (report section 4.1; Lipman et al. 2022)."""

import jax
import jax.numpy as jnp


def velocity_mse(predicted: jax.Array, target: jax.Array) -> jax.Array:
  """Per-example mean squared error over tokens and channels: fp32 `[B]`."""
  error = predicted.astype(jnp.float32) - target.astype(jnp.float32)
  return jnp.mean(error * error, axis=tuple(range(1, error.ndim)))
