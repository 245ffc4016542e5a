# SPDX-License-Identifier: Apache-2.0
"""The vision tower of Qwen3-VL for single images of one size.

Equals `Qwen3VLVisionModel` of transformers on images. Patches run in merge
blocks (block row, block column, row in block, column in block), so the four
patches of a merged token are neighbours. Everything that depends on the
image size alone is numpy at trace time.

Shapes: B batch, H, W pixels, h, w patches along an axis, N patches, n merged
tokens, M patches per merged token, D width, A heads, K head channels, S
deepstack taps, O width of the text decoder.
"""

import dataclasses
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.models import attention, layers
from qi2_jax.parallel.sharding import constrain

ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Shape of the vision tower.

  Attributes:
    depth: number of blocks; they are scanned.
    width: channels of a patch token.
    num_heads: attention heads.
    mlp_width: hidden width of a block's MLP.
    patch_size: pixels along a patch.
    temporal_patch_size: frames the patch kernel spans; an image is repeated.
    merge_size: patches along a merged token.
    out_width: width of the text decoder.
    num_positions: entries of the square position table.
    deepstack_layers: blocks whose output also goes to the text decoder.
    eps: epsilon of every norm.
    dtype: compute dtype.
  """

  depth: int
  width: int
  num_heads: int
  mlp_width: int
  patch_size: int
  temporal_patch_size: int
  merge_size: int
  out_width: int
  num_positions: int
  deepstack_layers: tuple[int, ...]
  eps: float = 1e-6
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    """Raises InputError for shapes that the tower cannot have."""
    taps = self.deepstack_layers
    ordered = all(a < b for a, b in itertools.pairwise(taps))
    if not taps or not ordered or taps[0] < 0 or taps[-1] >= self.depth:
      raise InputError(
        f"vision.deepstack_layers {taps} must be increasing block numbers "
        f"below depth {self.depth}."
      )
    if self.width % (4 * self.num_heads):
      raise InputError(
        f"vision.width {self.width} must be a multiple of 4 * num_heads = "
        f"{4 * self.num_heads} for two-axis rotary embedding."
      )
    if math.isqrt(self.num_positions) ** 2 != self.num_positions:
      raise InputError(
        f"vision.num_positions {self.num_positions} must be a square number."
      )

  @property
  def cell(self) -> int:
    """Pixels along one merged token."""
    return self.patch_size * self.merge_size

  @property
  def head_dim(self) -> int:
    """Channels per head."""
    return self.width // self.num_heads


def rotate_halves(x_BNAK: jax.Array, angles_BNk: jax.Array) -> jax.Array:
  """Rotates channel pairs (j, j + K/2) by `angles` (k = K/2), in fp32."""
  cos = jnp.cos(angles_BNk)[:, :, None, :]
  sin = jnp.sin(angles_BNk)[:, :, None, :]
  a, b = jnp.split(x_BNAK.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x_BNAK.dtype)


def in_blocks(x_hwX, merge: int):
  """Row-major `[h, w, ...]` -> merge-block order `[h * w, ...]`."""
  h, w, *rest = x_hwX.shape
  x = x_hwX.reshape(h // merge, merge, w // merge, merge, *rest)
  return x.swapaxes(1, 2).reshape(h * w, *rest)


def patches(image_BHWC: jax.Array, patch: int, merge: int) -> jax.Array:
  """Cuts images into flat patches in merge-block order.

  Returns:
    `[B, N, C * patch * patch]`, channels first inside a patch.
  """
  b, h, w, c = image_BHWC.shape
  cell = patch * merge
  x = image_BHWC.reshape(b, h // cell, merge, patch, w // cell, merge, patch, c)
  x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)
  return x.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def resample_matrix(size: int, side: int) -> np.ndarray:
  """Bilinear weights of a table's `side` entries at `size` points.

  The end points of both grids coincide (align_corners).

  Returns:
    fp32 `[size, side]`; rows sum to one.
  """
  index = np.arange(size, dtype=np.float32)
  source = index * np.float32(side - 1) / np.float32(max(size - 1, 1))
  distance = np.abs(source[:, None] - np.arange(side, dtype=np.float32)[None])
  return np.maximum(np.float32(1) - distance, np.float32(0))


def position_embedding(
  table_PD: jax.Array, h: int, w: int, merge: int
) -> jax.Array:
  """The square position table resampled to h x w patches: fp32 `[N, D]`."""
  side = math.isqrt(table_PD.shape[0])
  grid = table_PD.astype(jnp.float32).reshape(side, side, -1)
  # At a TPU's default precision the weights would be rounded to bf16.
  out = jnp.einsum(
    "rs,std,ct->rcd", resample_matrix(h, side), grid, resample_matrix(w, side),
    precision="highest",
  )  # fmt: skip
  return in_blocks(out, merge)


def axial_angles(h: int, w: int, merge: int, head_dim: int) -> np.ndarray:
  """Rotary angles of h x w patches, rows first: fp32 `[N, head_dim / 2]`."""
  half = head_dim // 2
  exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
  freqs = np.float32(1) / np.power(np.float32(ROPE_THETA), exponent)
  shape = (h, w, half // 2)
  rows = np.arange(h, dtype=np.float32)[:, None, None] * freqs
  columns = np.arange(w, dtype=np.float32)[None, :, None] * freqs
  parts = [np.broadcast_to(rows, shape), np.broadcast_to(columns, shape)]
  return in_blocks(np.concatenate(parts, axis=-1), merge)


class PatchEmbed(nn.Module):
  """One linear map per patch, with a kernel that spans repeated frames."""

  config: VisionConfig

  @nn.compact
  def __call__(self, image_BHWC):
    """`[B, H, W, C]` -> `[B, N, D]`."""
    cfg = self.config
    p = cfg.patch_size
    shape = (image_BHWC.shape[-1], cfg.temporal_patch_size, p, p, cfg.width)
    init = nn.initializers.normal(math.prod(shape[:-1]) ** -0.5)
    kernel = self.param("kernel", init, shape)
    bias = self.param("bias", nn.initializers.zeros, (cfg.width,))
    # All frames show the same image, so their kernels act as their sum.
    kernel = kernel.astype(jnp.float32).sum(axis=1).reshape(-1, cfg.width)
    x = patches(image_BHWC.astype(cfg.dtype), p, cfg.merge_size)
    return x @ kernel.astype(cfg.dtype) + bias.astype(cfg.dtype)[None, None]


class VisionBlock(nn.Module):
  """One pre-norm transformer block.

  The carry is `(tokens, taps)`: each block writes its output to one entry of
  `taps`, which has a last entry for blocks that are no tap. So the scan
  keeps the tapped outputs and no others.
  """

  config: VisionConfig

  @nn.compact
  def __call__(self, carry, entry, angles_1Nk):
    """Runs the block; `entry` is where its output goes in `taps`."""
    cfg = self.config
    x_BND, taps_SBND = carry
    x_BND = x_BND + self._attend(
      layers.affine_norm(cfg.eps, cfg.dtype, "norm1")(x_BND), angles_1Nk
    )
    h = layers.affine_norm(cfg.eps, cfg.dtype, "norm2")(x_BND)
    h = nn.Dense(cfg.mlp_width, dtype=cfg.dtype, name="fc1")(h)
    h = nn.gelu(h, approximate=True)
    x_BND = x_BND + nn.Dense(cfg.width, dtype=cfg.dtype, name="fc2")(h)
    x_BND = constrain(x_BND, "batch", "tokens", None)
    taps_SBND = jax.lax.dynamic_update_index_in_dim(taps_SBND, x_BND, entry, 0)
    taps_SBND = constrain(taps_SBND, None, "batch", "tokens", None)
    return (x_BND, taps_SBND), None

  def _attend(self, x_BND, angles_1Nk):
    """Self-attention over the whole image."""
    cfg = self.config
    heads = (cfg.num_heads, cfg.head_dim)
    qkv = nn.DenseGeneral((3, *heads), dtype=cfg.dtype, name="qkv")(x_BND)
    q, k, v = (
      constrain(qkv[:, :, i], "batch", "tokens", "heads", None)
      for i in range(3)
    )
    q, k = rotate_halves(q, angles_1Nk), rotate_halves(k, angles_1Nk)
    seen = jnp.ones(x_BND.shape[:2], bool)
    out = attention.full_attention(q, k, v, seen)
    return nn.DenseGeneral(
      cfg.width, axis=(-2, -1), dtype=cfg.dtype, name="proj"
    )(out)


class Merger(nn.Module):
  """Norm, then the patches of a merged token through an MLP.

  The norm runs over the last axis of what it is given: per patch on
  `[B, n, M, D]`, over the whole merged token on `[B, n, M * D]`.
  """

  config: VisionConfig

  @nn.compact
  def __call__(self, x):
    """`[B, n, M, D]` or `[B, n, M * D]` -> `[B, n, O]`."""
    cfg = self.config
    x = layers.affine_norm(cfg.eps, cfg.dtype, "norm")(x).reshape(
      *x.shape[:2], -1
    )
    x = nn.Dense(x.shape[-1], dtype=cfg.dtype, name="fc1")(x)
    # The blocks use the tanh form, the mergers the exact one.
    x = nn.gelu(x, approximate=False)
    return nn.Dense(cfg.out_width, dtype=cfg.dtype, name="fc2")(x)


class VisionTower(nn.Module):
  """Images to merged tokens and deepstack features."""

  config: VisionConfig

  @nn.compact
  def __call__(self, image_BHWC):
    """Encodes images of one size.

    Args:
      image_BHWC: normalised floats; H and W are multiples of `config.cell`.

    Returns:
      `(merged [B, n, O], deepstack [S, B, n, O])`, n row-major over cells.

    Raises:
      InputError: the image does not split into cells.
    """
    cfg = self.config
    b, height, width, channels = image_BHWC.shape
    if height % cfg.cell or width % cfg.cell or channels != 3:
      raise InputError(
        f"a condition image of {height} x {width} px and {channels} channels "
        f"does not fit the vision tower; give RGB with sides that are "
        f"multiples of {cfg.cell} px."
      )
    h, w = height // cfg.patch_size, width // cfg.patch_size
    merge = cfg.merge_size
    table = self.param(
      "pos_embed", nn.initializers.normal(0.02), (cfg.num_positions, cfg.width)
    )
    x = PatchEmbed(cfg, name="patch_embed")(image_BHWC)
    x = x + position_embedding(table, h, w, merge).astype(x.dtype)[None]
    taps = cfg.deepstack_layers
    entries = np.full(cfg.depth, len(taps), np.int32)
    entries[list(taps)] = np.arange(len(taps))
    blocks = nn.scan(
      VisionBlock,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=cfg.depth,
    )(cfg, name="blocks")
    carry = (x, jnp.zeros((len(taps) + 1, *x.shape), x.dtype))
    angles = axial_angles(h, w, merge, cfg.head_dim)
    (x, tapped), _ = blocks(carry, jnp.asarray(entries), angles[None])
    merged = Merger(cfg, name="merger")(x.reshape(b, -1, merge**2, cfg.width))
    deepstack = nn.vmap(
      Merger, variable_axes={"params": 0}, split_rngs={"params": True}
    )(cfg, name="deepstack")
    tapped = tapped[:-1].reshape(len(taps), b, -1, merge**2 * cfg.width)
    return merged, deepstack(tapped)


# Heads and MLP width over tensor, the other large dimension over fsdp.
SHARDING_RULES = (
  (r"(.*/)?blocks/qkv/kernel", ("fsdp", None, "tensor", None)),
  (r"(.*/)?blocks/proj/kernel", ("tensor", None, "fsdp")),
  (r"(.*/)?fc1/kernel", ("fsdp", "tensor")),
  (r"(.*/)?fc2/kernel", ("tensor", "fsdp")),
  (r"(.*/)?patch_embed/kernel", ("fsdp",)),
  (r"(.*/)?pos_embed", (None, "fsdp")),
  (r"(.*/)?(norm|norm1|norm2|patch_embed|qkv|proj|fc1|fc2)/(scale|bias)", ()),
)
