# SPDX-License-Identifier: Apache-2.0
"""Layers of the MMDiT (bias-free) and of the encoders, free functions first.

Shapes: B batch, N tokens, D width, H heads, K head channels, F mlp width.
Norms, the time embedding and the modulation run in fp32.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
  """LayerNorm over the last axis without scale or bias, in fp32."""
  x32 = x.astype(jnp.float32)
  centred = x32 - x32.mean(axis=-1, keepdims=True)
  variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + eps)


def affine_norm(eps: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
  """LayerNorm with scale and bias, as the vision transformers have it."""
  # The fast variance E[x^2] - E[x]^2 cancels where the mean dominates.
  return nn.LayerNorm(eps, dtype=dtype, use_fast_variance=False, name=name)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """RMSNorm over the last axis with an effective `scale`, in fp32."""
  x32 = x.astype(jnp.float32)
  variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
  return x32 * jax.lax.rsqrt(variance + eps) * scale


def time_features(sigma_B: jax.Array, dim: int = 256) -> jax.Array:
  """Sinusoids of 1000 * sigma, cosine half first: fp32 `[B, dim]`."""
  half = dim // 2
  # fp32 from start to end, as in the public model: one ulp of a frequency
  # times a phase of 1000 is visible in the output.
  exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32)
  freqs = jnp.asarray(np.exp(exponent / np.float32(half)))
  phase = 1000.0 * sigma_B.astype(jnp.float32)[:, None] * freqs[None, :]
  return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


def modulate(x_BND: jax.Array, scale: jax.Array) -> jax.Array:
  """Multiplicative modulation `x * (1 + scale)` (report eq. 2).

  Args:
    x_BND: tokens.
    scale: `[B, N or 1, D]`.
  """
  return x_BND * (1.0 + scale)


class Einsum(nn.Module):
  """A bias-free linear map that keeps its logical dimensions.

  Attributes:
    shape: kernel shape, e.g. `(D, H, K)`.
    equation: einsum of (input, kernel).
    fan_in: axes of the kernel that are summed over (for the initialiser).
    scale: variance scale of the initialiser; 0 gives zeros.
    dtype: compute dtype.
  """

  shape: Sequence[int]
  equation: str
  fan_in: Sequence[int] = (0,)
  scale: float = 1.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Applies the map in `dtype`."""
    fan = int(np.prod([self.shape[a] for a in self.fan_in]))
    init = nn.initializers.normal((self.scale / fan) ** 0.5)
    if self.scale == 0:
      init = nn.initializers.zeros
    kernel = self.param("kernel", init, tuple(self.shape))
    return jnp.einsum(
      self.equation, x.astype(self.dtype), kernel.astype(self.dtype)
    )


class HeadNorm(nn.Module):
  """Per-head RMSNorm of queries or keys."""

  eps: float

  @nn.compact
  def __call__(self, x_BNHK):
    """Normalises the last axis in fp32."""
    scale = self.param("scale", nn.initializers.ones, (x_BNHK.shape[-1],))
    return rms_norm(x_BNHK, scale, self.eps)


class TextProjection(nn.Module):
  """Encoder states to the model width: RMSNorm (1 + w), GELU MLP."""

  width: int
  eps: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, states_BTC):
    """`[B, T, C]` -> `[B, T, D]`."""
    dim = states_BTC.shape[-1]
    weight = self.param("text_norm", nn.initializers.zeros, (dim,))
    x = rms_norm(states_BTC, 1.0 + weight.astype(jnp.float32), self.eps)
    x = Einsum((dim, self.width), "btc,cd->btd", dtype=self.dtype,
               name="in_layer")(x)  # fmt: skip
    return Einsum((self.width, self.width), "btd,de->bte", dtype=self.dtype,
                  name="out_layer")(nn.gelu(x))  # fmt: skip


class TimeEmbedder(nn.Module):
  """sigma -> fp32 embedding `[B, D]` by a two-layer SiLU MLP."""

  width: int

  @nn.compact
  def __call__(self, sigma_B):
    """Embeds noise levels in [0, 1]; 1 is pure noise."""
    x = Einsum((256, self.width), "bf,fd->bd", name="linear_1")(
      time_features(sigma_B)
    )
    return Einsum((self.width, self.width), "bd,de->be", name="linear_2")(
      nn.silu(x)
    )


class SwiGLU(nn.Module):
  """Gated MLP `W_out(silu(W_gate x) * W_proj x)` (report eq. 3)."""

  hidden: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x_BND):
    """`[B, N, D]` -> `[B, N, D]`."""
    dim = x_BND.shape[-1]
    up = lambda name: Einsum(  # noqa: E731
      (dim, self.hidden), "bnd,df->bnf", dtype=self.dtype, name=name
    )(x_BND)
    return Einsum((self.hidden, dim), "bnf,fd->bnd", dtype=self.dtype,
                  name="out")(nn.silu(up("gate")) * up("proj"))  # fmt: skip
