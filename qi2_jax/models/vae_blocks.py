# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the residual VAE, single frame, channels last.

The shortcuts are DC-AE's non-parametric residuals (arXiv 2410.10733) in the
form of diffusers' `QwenImage21AvgDown3D` / `DupUp3D`, specialised to one
frame: a temporal factor of 2 pairs the frame with a zero frame on the way
down and keeps the second of two frames on the way up.

Shapes: `x_BHWC` feature maps.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.models.attention import full_attention


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
  """Folds patches into channels ordered (channel, column, row).

  Args:
    x_BHWC: `[B, H, W, C]`, H and W divisible by `patch`.

  Returns:
    `[B, H/p, W/p, C*p*p]`; the order is that of diffusers' `_patchify`.
  """
  b, h, w, c = x_BHWC.shape
  x = x_BHWC.reshape(b, h // patch, patch, w // patch, patch, c)
  x = x.transpose(0, 1, 3, 5, 4, 2)
  return x.reshape(b, h // patch, w // patch, c * patch * patch)


def unpatchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
  """Inverse of `patchify`: `[B, h, w, C*p*p]` -> `[B, h*p, w*p, C]`."""
  b, h, w, c = x_BHWC.shape
  x = x_BHWC.reshape(b, h, w, c // patch**2, patch, patch)
  x = x.transpose(0, 1, 5, 2, 4, 3)
  return x.reshape(b, h * patch, w * patch, c // patch**2)


def average_down(
  x_BHWC: jax.Array, out_channels: int, *, space: int, time: int
) -> jax.Array:
  """Space-to-channel shortcut: consecutive channel groups are averaged.

  Args:
    x_BHWC: `[B, H, W, C]`.
    out_channels: channels of the result.
    space: spatial factor, 1 or 2.
    time: temporal factor, 1 or 2; with 2 the absent first frame is zero.

  Returns:
    `[B, H/space, W/space, out_channels]`.
  """
  b, h, w, c = x_BHWC.shape
  x = x_BHWC.reshape(b, h // space, space, w // space, space, c)
  x = x.transpose(0, 1, 3, 5, 2, 4)
  x = x.reshape(b, h // space, w // space, c, 1, space * space)
  if time == 2:
    x = jnp.concatenate([jnp.zeros_like(x), x], axis=4)
  group = c * time * space * space // out_channels
  x = x.reshape(b, h // space, w // space, out_channels, group)
  return x.mean(axis=-1)


def duplicate_up(
  x_BHWC: jax.Array, out_channels: int, *, time: int
) -> jax.Array:
  """Channel-to-space shortcut: channels are repeated, then unfolded 2x2.

  Args:
    x_BHWC: `[B, H, W, C]`.
    out_channels: channels of the result.
    time: temporal factor, 1 or 2; with 2 the second frame is kept.

  Returns:
    `[B, 2H, 2W, out_channels]`.
  """
  b, h, w, c = x_BHWC.shape
  repeats = out_channels * time * 4 // c
  out = np.arange(out_channels)[:, None] * time + (time - 1)
  source = (out * 4 + np.arange(4)[None]) // repeats
  x = x_BHWC[..., source.reshape(-1)].reshape(b, h, w, out_channels, 2, 2)
  x = x.transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(b, 2 * h, 2 * w, out_channels)


def _fold(kernel: jax.Array, axis: int, parity: int) -> jax.Array:
  """Taps along `axis` that fall on the same source pixel, summed: 3 -> 2."""
  first, middle, last = jnp.split(kernel, 3, axis=axis)
  taps = (first + middle, last) if parity else (first, middle + last)
  return jnp.concatenate(taps, axis=axis)


def upsample_conv(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
  """Nearest 2x followed by a 3x3 convolution, without the enlarged map.

  An output pixel of parity (a, b) sees only 2x2 source pixels, so four 2x2
  convolutions with summed taps give the same values up to rounding for 4/9
  of the multiplications (sub-pixel convolution, Shi et al. 2016).

  Args:
    x_BHWC: `[B, H, W, C]`.
    kernel: `[3, 3, C, O]` of the convolution after the enlargement; summed
      in its own dtype, then cast to that of x.

  Returns:
    `[B, 2H, 2W, O]`.
  """
  b, h, w, _ = x_BHWC.shape

  def part(row: int, column: int):
    taps = _fold(_fold(kernel, 0, row), 1, column)
    return jax.lax.conv_general_dilated(
      x_BHWC, taps.astype(x_BHWC.dtype), (1, 1),
      ((1 - row, row), (1 - column, column)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

  rows = [jnp.stack([part(a, 0), part(a, 1)], axis=3) for a in (0, 1)]
  return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, kernel.shape[-1])


def channel_norm(x: jax.Array, gamma: jax.Array) -> jax.Array:
  """L2 normalisation over channels times sqrt(C) * gamma, in fp32.

  The floor sits inside the root, so a zero vector has a zero gradient.
  """
  x32 = x.astype(jnp.float32)
  square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
  unit = x32 * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
  gamma = gamma.reshape((1,) * (x.ndim - 1) + (-1,)).astype(jnp.float32)
  return (unit * np.sqrt(x.shape[-1]) * gamma).astype(x.dtype)


class ChannelNorm(nn.Module):
  """Holds the scale of `channel_norm`."""

  @nn.compact
  def __call__(self, x):
    """Normalises `[..., C]`."""
    gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],))
    return channel_norm(x, gamma)


class ResBlock(nn.Module):
  """norm-silu-conv3 twice, plus a 1x1 shortcut where widths differ."""

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """`[B, H, W, C]` -> `[B, H, W, features]`."""

    def conv(size, name, init=nn.linear.default_kernel_init):
      return nn.Conv(
        self.features, (size, size), padding=size // 2, dtype=self.dtype,
        kernel_init=init, name=name,
      )  # fmt: skip

    shortcut = x
    if x.shape[-1] != self.features:
      shortcut = conv(1, "conv_shortcut")(x)
    x = conv(3, "conv1")(nn.silu(ChannelNorm(name="norm1")(x)))
    # A zero last convolution makes every block the identity at the start.
    zeros = nn.initializers.zeros
    x = conv(3, "conv2", zeros)(nn.silu(ChannelNorm(name="norm2")(x)))
    return x + shortcut


def res_block(remat: bool):
  """`ResBlock`, or its form that is recomputed in the backward pass.

  The levels are recomputed block by block: a level's activations at full
  resolution are several times the size of its blocks' inputs.
  """
  return nn.remat(ResBlock) if remat else ResBlock


class SpatialAttention(nn.Module):
  """Single-head self-attention over all positions, with residual."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """`[B, H, W, C]` -> the same shape."""
    b, h, w, c = x.shape
    x_norm = ChannelNorm(name="norm")(x)
    qkv = nn.Dense(3 * c, dtype=self.dtype, name="to_qkv")(x_norm)
    q, k, v = (t.reshape(b, h * w, 1, c) for t in jnp.split(qkv, 3, axis=-1))
    out = full_attention(q, k, v, jnp.ones((b, h * w), dtype=bool))
    out = out.reshape(b, h, w, c)
    zeros = nn.initializers.zeros
    return x + nn.Dense(c, dtype=self.dtype, kernel_init=zeros, name="proj")(
      out
    )


class MidBlock(nn.Module):
  """Residual block, attention, residual block at the lowest resolution."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """`[B, h, w, C]` -> the same shape."""
    x = ResBlock(x.shape[-1], self.dtype, name="resnet_0")(x)
    x = SpatialAttention(self.dtype, name="attention")(x)
    return ResBlock(x.shape[-1], self.dtype, name="resnet_1")(x)


class TimeConv(nn.Module):
  """Carries the temporal 1x1 kernels that images never use.

  They live in the collection `carried`, outside `params`, so that counts and
  exports equal the public files while no optimizer sees them.
  """

  in_features: int
  features: int

  @nn.compact
  def __call__(self):
    """Declares the arrays; there is nothing to compute for one frame."""
    if not self.is_initializing():
      return
    shape = (1, 1, self.in_features, self.features)
    self.variable("carried", "kernel", jnp.zeros, shape)
    self.variable("carried", "bias", jnp.zeros, (self.features,))


class DownBlock(nn.Module):
  """Residual blocks, stride-2 convolution, averaged shortcut."""

  features: int
  num_res_blocks: int
  down: bool
  temporal: bool
  carry_temporal: bool
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    """`[B, H, W, C]` -> `[B, H/2, W/2, features]` (same size if not down)."""
    shortcut = average_down(
      x, self.features, space=2 if self.down else 1,
      time=2 if self.temporal else 1,
    )  # fmt: skip
    block = res_block(self.remat)
    for i in range(self.num_res_blocks):
      x = block(self.features, self.dtype, name=f"resnet_{i}")(x)
    if self.down:
      x = nn.Conv(
        self.features, (3, 3), strides=2, padding=((0, 1), (0, 1)),
        dtype=self.dtype, name="downsample",
      )(x)  # fmt: skip
      if self.temporal and self.carry_temporal:
        TimeConv(self.features, self.features, name="time_conv")()
    return x + shortcut


class UpsampleConv(nn.Module):
  """Holds the parameters of `upsample_conv`, named as in `nn.Conv`."""

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """`[B, h, w, C]` -> `[B, 2h, 2w, features]`."""
    kernel = self.param(
      "kernel", nn.linear.default_kernel_init,
      (3, 3, x.shape[-1], self.features),
    )  # fmt: skip
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    out = upsample_conv(x.astype(self.dtype), kernel)
    return out + bias.astype(self.dtype)[None, None, None, :]


class UpBlock(nn.Module):
  """Residual blocks, nearest 2x + convolution, duplicated shortcut."""

  features: int
  num_res_blocks: int
  up: bool
  temporal: bool
  carry_temporal: bool
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    """`[B, h, w, C]` -> `[B, 2h, 2w, features]` (same size if not up)."""
    source = x
    block = res_block(self.remat)
    for i in range(self.num_res_blocks + 1):
      x = block(self.features, self.dtype, name=f"resnet_{i}")(x)
    if not self.up:
      return x
    if self.temporal and self.carry_temporal:
      TimeConv(self.features, 2 * self.features, name="time_conv")()
    x = UpsampleConv(self.features, self.dtype, name="upsample")(x)
    time = 2 if self.temporal else 1
    return x + duplicate_up(source, self.features, time=time)
