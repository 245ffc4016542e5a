# SPDX-License-Identifier: Apache-2.0
"""Reconstruction loss of the VAE (report section 3.1); no KL, no GAN."""

import jax
import jax.numpy as jnp


def l1(reconstruction: jax.Array, image: jax.Array) -> jax.Array:
  """Per-example mean absolute error over pixels and channels: fp32 `[B]`."""
  error = reconstruction.astype(jnp.float32) - image.astype(jnp.float32)
  return jnp.mean(jnp.abs(error), axis=tuple(range(1, error.ndim)))


def smooth_l1(
  reconstruction: jax.Array, image: jax.Array, width: float
) -> jax.Array:
  """L1 with a round bottom, `sqrt(d^2 + width^2) - width`: fp32 `[B]`.

  Plain L1 rewards predicting the median, which on flat synthetic images is
  the background; early in training a width of about 0.3 avoids that trap.
  `width=0` is `l1` up to a zero gradient at zero error.
  """
  if width == 0:
    return l1(reconstruction, image)
  error = reconstruction.astype(jnp.float32) - image.astype(jnp.float32)
  loss = jnp.sqrt(error * error + width * width) - width
  return jnp.mean(loss, axis=tuple(range(1, error.ndim)))


def latent_statistics(mean_BhwZ: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Per-channel sums for the latent mean and variance: `[Z]`, `[Z]`.

  Returns the mean of `z` and of `z^2` over the batch, to be averaged over
  batches by the caller.
  """
  z = mean_BhwZ.astype(jnp.float32)
  return jnp.mean(z, axis=(0, 1, 2)), jnp.mean(z * z, axis=(0, 1, 2))
