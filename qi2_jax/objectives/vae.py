# SPDX-License-Identifier: Apache-2.0
"""Losses of the VAE (report section 3.1) beside LPIPS and alignment; no GAN.

The reports name L1, LPIPS and alignment, and say that their ratio changes
during training; they give no number. Every weight and margin can therefore
be a `piecewise_linear` schedule.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError


def l1(reconstruction: jax.Array, image: jax.Array) -> jax.Array:
  """Per-example mean absolute error over pixels and channels: fp32 `[B]`."""
  error = reconstruction.astype(jnp.float32) - image.astype(jnp.float32)
  return jnp.mean(jnp.abs(error), axis=tuple(range(1, error.ndim)))


def smooth_l1(reconstruction: jax.Array, image: jax.Array, width) -> jax.Array:
  """L1 with a round bottom, `sqrt(d^2 + width^2) - width`: fp32 `[B]`.

  Plain L1 rewards predicting the median, which on flat synthetic images is
  the background; early in training a width of about 0.3 avoids that trap.
  Later it blurs nothing away, but leaves noise on flat areas. `width=0` is
  `l1` up to a zero gradient at zero error; a traced width must be positive.
  """
  if isinstance(width, (int, float)) and width == 0:
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


def kl(mean_BhwZ: jax.Array, logvar_BhwZ: jax.Array) -> jax.Array:
  """Per-example KL to the unit normal, mean over latents: fp32 `[B]`.

  The Qwen VAE is trained without it; VA-VAE weighs the sum over latents by
  1e-6.
  """
  mean = mean_BhwZ.astype(jnp.float32)
  logvar = logvar_BhwZ.astype(jnp.float32)
  divergence = 0.5 * (mean * mean + jnp.exp(logvar) - 1.0 - logvar)
  return jnp.mean(divergence, axis=(1, 2, 3))


def over_background(image_BHWC: jax.Array, background: float) -> jax.Array:
  """RGB of an image in [-1, 1] over a flat background: fp32 `[B, H, W, 3]`.

  LPIPS and DINOv2 see RGB. Alpha runs from -1 (clear) to 1 (opaque) and is
  not clipped, so that a reconstruction outside that range keeps a gradient.
  RGB passes through.

  Args:
    image_BHWC: RGB or RGBA.
    background: grey level in [-1, 1]; 1 is white.

  Raises:
    InputError: another number of channels.
  """
  image = image_BHWC.astype(jnp.float32)
  channels = image.shape[-1]
  if channels == 3:
    return image
  if channels != 4:
    raise InputError(
      f"an image of {channels} channels is neither RGB nor RGBA; convert it "
      "first."
    )
  opacity = (image[..., 3:] + 1.0) / 2.0
  return image[..., :3] * opacity + background * (1.0 - opacity)


def piecewise_linear(points: Sequence[tuple[int, float]]) -> Callable:
  """A schedule through `(step, value)` points, flat before and after them.

  Args:
    points: at least one; steps increase strictly.

  Returns:
    `step -> value`, fp32 scalar; `step` may be traced.

  Raises:
    InputError: no points, steps that do not increase, or a value that is not
      finite.
  """
  points = [tuple(point) for point in points]
  if not points or any(len(point) != 2 for point in points):
    raise InputError(
      f"schedule {points} must be a non-empty list of (step, value) pairs."
    )
  steps, values = zip(*points)
  if any(a >= b for a, b in itertools.pairwise(steps)):
    raise InputError(f"schedule steps {steps} must increase strictly.")
  if not all(math.isfinite(v) for v in values):
    raise InputError(f"schedule values {values} must be finite numbers.")
  xs, ys = np.asarray(steps, np.float32), np.asarray(values, np.float32)
  return lambda step: jnp.interp(jnp.asarray(step, jnp.float32), xs, ys)
