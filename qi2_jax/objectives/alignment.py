# SPDX-License-Identifier: Apache-2.0
"""Semantic alignment of VAE latents (VA-VAE, Yao & Wang, CVPR 2025).

Latents are projected by a learned matrix without bias to the width of a
frozen network's patch features and compared with them on one token grid.
Margins may be traced, so schedules work inside `jit`. The published sources
for the numbers: VA-VAE trains with margins 0.5 (cosine) and 0.25 (distance)
and a weight of 0.1 to 0.5 on top of `adaptive_weight`; the Qwen-Image
reports name the form and no number.

Shapes: B batch, h, w token grid, N = h * w, Z latent channels, D width of
the features.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError

# The distance term holds N x N numbers per image: 4 MiB at this grid, which
# is 448 px for DINOv2, and 1 GiB at the 128 x 128 grid of a 2K image.
MAX_SIDE = 32
_WEIGHT_EPS = 1e-4
_WEIGHT_MAX = 1e8


def aligned_grid(h: int, w: int, max_side: int = MAX_SIDE) -> tuple[int, int]:
  """The token grid on which an h x w latent is compared.

  Itself if it fits, else the nearest grid of its aspect ratio whose longer
  side is `max_side`.
  """
  longest = max(h, w)
  if longest <= max_side:
    return h, w
  fit = lambda side: max(1, round(side * max_side / longest))  # noqa: E731
  return fit(h), fit(w)


def pooling_matrix(size: int, side: int) -> np.ndarray:
  """Area weights that average `side` cells into `size`: `[size, side]`."""
  edges = np.arange(size + 1) * side / size
  cells = np.arange(side)
  high = np.minimum(edges[1:, None], cells[None] + 1)
  low = np.maximum(edges[:-1, None], cells[None])
  return (np.maximum(high - low, 0) * size / side).astype(np.float32)


def pool_grid(x_BhwZ: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Averages a map over the cells of a coarser grid: fp32 `[B, *grid, Z]`.

  A cell that a border cuts counts by its area, so any size goes.

  Raises:
    InputError: the grid is finer than the map.
  """
  _, h, w, _ = x_BhwZ.shape
  if grid[0] > h or grid[1] > w:
    raise InputError(
      f"a {h} x {w} map cannot be pooled to the finer grid {grid[0]} x "
      f"{grid[1]}; use aligned_grid."
    )
  if grid == (h, w):
    return x_BhwZ.astype(jnp.float32)
  return jnp.einsum(
    "rs,bstz,ct->brcz", pooling_matrix(grid[0], h),
    x_BhwZ.astype(jnp.float32), pooling_matrix(grid[1], w),
    precision="highest",
  )  # fmt: skip


def unit(x: jax.Array) -> jax.Array:
  """Vectors of length one along the last axis, in fp32.

  Zero stays zero and gets no gradient, where torch gives 1e12.
  """
  x = x.astype(jnp.float32)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  alive = square > 0
  return x * jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, square, 1.0)), 0.0)


def _check(projected_BhwD, features_BhwD) -> None:
  if projected_BhwD.shape != features_BhwD.shape:
    raise InputError(
      f"alignment compares latents {projected_BhwD.shape} with features "
      f"{features_BhwD.shape}, which must have one shape; pool or resize one "
      "of them and project the latents to the width of the features."
    )
  _, h, w, _ = features_BhwD.shape
  if max(h, w) > MAX_SIDE:
    raise InputError(
      f"alignment on a {h} x {w} token grid would need {(h * w) ** 2 * 4} "
      f"bytes per image; pool_grid to at most {MAX_SIDE} x {MAX_SIDE}."
    )


def marginal_cosine(
  projected_BhwD: jax.Array, features_BhwD: jax.Array, margin
) -> jax.Array:
  """Mean over tokens of `relu(1 - margin - cos(z', f))`: fp32 `[B]`.

  Args:
    projected_BhwD: projected latents.
    features_BhwD: patch features of the frozen network on the same grid.
    margin: similarity is wanted up to `1 - margin` only.

  Raises:
    InputError: the shapes differ, or the grid is larger than 32 x 32.
  """
  _check(projected_BhwD, features_BhwD)
  cosine = jnp.sum(unit(projected_BhwD) * unit(features_BhwD), axis=-1)
  return jnp.mean(jax.nn.relu(1.0 - margin - cosine), axis=(1, 2))


def _similarity(x_BhwD: jax.Array) -> jax.Array:
  """Cosines of all pairs of tokens of one image: `[B, N, N]`."""
  b, h, w, d = x_BhwD.shape
  x_BND = unit(x_BhwD).reshape(b, h * w, d)
  # At a TPU's default precision the error would be as large as a margin.
  return jnp.einsum("bnd,bmd->bnm", x_BND, x_BND, precision="highest")


def marginal_distance(
  projected_BhwD: jax.Array, features_BhwD: jax.Array, margin
) -> jax.Array:
  """Mean over pairs of `relu(|cos z'z' - cos ff| - margin)`: fp32 `[B]`.

  Args:
    projected_BhwD: projected latents.
    features_BhwD: patch features of the frozen network on the same grid.
    margin: differences of similarity up to it are free.

  Raises:
    InputError: the shapes differ, or the grid is larger than 32 x 32.
  """
  _check(projected_BhwD, features_BhwD)
  gap = _similarity(projected_BhwD) - _similarity(features_BhwD)
  return jnp.mean(jax.nn.relu(jnp.abs(gap) - margin), axis=(1, 2))


def adaptive_weight(
  pull_kernel: Callable, rec_gradient: jax.Array, align_gradient: jax.Array
) -> jax.Array:
  """VA-VAE's weight that makes both gradients of the encoder equally large.

  The ratio of the gradient norms at the kernel of the encoder's last
  convolution, `|rec| / (|align| + 1e-4)` in [0, 1e8], without a gradient.
  Both arguments are gradients at the latents, so no second pass through the
  decoder or the encoder is needed:

      z, pull = jax.vjp(encode, encoder_params)
      weight = adaptive_weight(
        lambda g: pull(g)[0]["encoder"]["conv_out"]["kernel"], g_rec, g_align)
      (gradient,) = pull(g_rec + strength * weight * g_align)

  Under `jit` the two calls of `pull` shrink to the one convolution, for
  nothing else of their results is used.

  Args:
    pull_kernel: linear; gradient at the latents -> gradient at the kernel.
    rec_gradient: of the reconstruction loss at the latents. Losses are means
      over the global batch, so that devices agree on the norms.
    align_gradient: of the alignment loss at the latents.

  Returns:
    fp32 scalar.
  """
  reconstruction, alignment = (
    jnp.linalg.norm(pull_kernel(g).astype(jnp.float32).reshape(-1))
    for g in (rec_gradient, align_gradient)
  )
  weight = reconstruction / (alignment + _WEIGHT_EPS)
  return jax.lax.stop_gradient(jnp.clip(weight, 0.0, _WEIGHT_MAX))
