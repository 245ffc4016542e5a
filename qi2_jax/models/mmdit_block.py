# SPDX-License-Identifier: Apache-2.0
"""One layer of the MMDiT, and the configuration of all of them.

Shapes: B batch, P prefix, N target, S = P + N (either may be 0), D width,
H heads, K head channels.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qi2_jax.errors import InputError
from qi2_jax.models import kernels, layers, rope
from qi2_jax.parallel.sharding import constrain

VARIANTS = {
  "attention": ("block_causal", "joint"),
  "condition_time": ("zero", "shared"),
  "modulation": ("shared", "per_block"),
  "gate": ("tanh", "linear"),
  "remat": ("none", "full", "dots", "attention"),
  "kernel": kernels.KERNELS,
}


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
  """Shape and variant of the MMDiT.

  Attributes:
    latent_channels: channels of one latent token.
    num_layers: depth; layers are scanned, so compile time is constant in it.
    num_heads: attention heads.
    head_dim: channels per head; the width is num_heads * head_dim.
    context_dim: width of the text encoder's states.
    mlp_ratio: SwiGLU hidden width over the model width.
    rope_axes: head channels for frame, row, column.
    rope_theta: base of the rotary frequencies.
    eps: epsilon of every norm.
    attention: `block_causal` (2.1) or `joint` (2.0: every token sees all).
    condition_time: prefix modulated at sigma `zero`, or `shared` with target.
    modulation: one projection `shared` by all blocks, or `per_block`.
    gate: residual gates through `tanh`, or `linear`.
    remat: what a layer recomputes in the backward pass: all (`full`), all but
      the attention (`attention`), all but products of weights (`dots`).
    kernel: what computes the attention, see `kernels`.
    dtype: compute dtype; parameters stay fp32.
  """

  latent_channels: int = 64
  num_layers: int = 32
  num_heads: int = 32
  head_dim: int = 128
  context_dim: int = 4096
  mlp_ratio: int = 3
  rope_axes: tuple[int, int, int] = (16, 56, 56)
  rope_theta: float = 10000.0
  eps: float = 1e-6
  attention: str = "block_causal"
  condition_time: str = "zero"
  modulation: str = "shared"
  gate: str = "tanh"
  remat: str = "full"
  kernel: str = "xla"
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    """Raises InputError for values that no code path implements."""
    for name, allowed in VARIANTS.items():
      if getattr(self, name) not in allowed:
        raise InputError(
          f"model.{name}={getattr(self, name)!r} is unknown; "
          f"use one of {list(allowed)}."
        )
    if sum(self.rope_axes) != self.head_dim:
      raise InputError(
        f"model.rope_axes {self.rope_axes} must sum to head_dim "
        f"{self.head_dim}."
      )

  @property
  def width(self) -> int:
    """Model width D."""
    return self.num_heads * self.head_dim

  @property
  def cacheable(self) -> bool:
    """Whether the prefix is independent of target and noise level."""
    return self.attention == "block_causal" and self.condition_time == "zero"


@flax.struct.dataclass
class Tokens:
  """What the blocks need beside the activations of a sequence.

  Attributes:
    prefix_rows: modulation of the prefix, fp32 `[B, 4D]`, or the fp32
      `silu(temb)` `[B, D]` when modulation is per block; None without one.
    target_rows: the same of the target.
    angles: rotary angles `[B, S, K/2]`.
    blocks_BP: image of each prefix token, -1 for text; None: no images.
    valid_BP: true where a prefix token is not padding.
  """

  prefix_rows: jax.Array | None
  target_rows: jax.Array | None
  angles: jax.Array
  blocks_BP: jax.Array | None
  valid_BP: jax.Array


def per_token(prefix_BD, target_BD, prefix: int, length: int):
  """One row per stream spread over the sequence: `[B, S or 1, D]`."""
  if prefix_BD is None or target_BD is None:
    row = target_BD if prefix_BD is None else prefix_BD
    return row[:, None]
  is_prefix = (jnp.arange(length) < prefix)[None, :, None]
  return jnp.where(is_prefix, prefix_BD[:, None], target_BD[:, None])


class Attention(nn.Module):
  """Projections of one block; the attention itself is a free function."""

  config: MMDiTConfig

  def setup(self):
    """Declares the projections."""
    cfg = self.config
    d, h, k = cfg.width, cfg.num_heads, cfg.head_dim
    proj = lambda: layers.Einsum(  # noqa: E731
      (d, h, k), "bnd,dhk->bnhk", dtype=cfg.dtype
    )
    self.to_q, self.to_k, self.to_v = proj(), proj(), proj()
    self.to_out = layers.Einsum(
      (h, k, d), "bnhk,hkd->bnd", fan_in=(0, 1), dtype=cfg.dtype
    )
    self.norm_q = layers.HeadNorm(cfg.eps)
    self.norm_k = layers.HeadNorm(cfg.eps)

  def qkv(self, x_BSD, angles):
    """Normed, rotated queries and keys, and values: `[B, S, H, K]` each."""
    dtype = self.config.dtype
    q = rope.rotate(self.norm_q(self.to_q(x_BSD)), angles).astype(dtype)
    k = rope.rotate(self.norm_k(self.to_k(x_BSD)), angles).astype(dtype)
    v = self.to_v(x_BSD)
    # Whole sequences, heads over the seq axis as well: an all-to-all there
    # and back (Ulysses), and nothing where that axis is 1.
    return tuple(
      constrain(t, "batch", None, "attention_heads", None) for t in (q, k, v)
    )

  def project(self, x_BSHK):
    """Heads back to the model width."""
    x_BSHK = constrain(x_BSHK, "batch", "tokens", "heads", None)
    return self.to_out(x_BSHK)


class Block(nn.Module):
  """One layer over a prefix, a target, or both.

  A target without a prefix reads the layer's slice of the cache; a prefix
  without a target returns that slice.
  """

  config: MMDiTConfig

  def setup(self):
    """Declares the layer's parameters."""
    cfg = self.config
    self.attn = Attention(cfg)
    self.mlp = layers.SwiGLU(cfg.width * cfg.mlp_ratio, cfg.dtype)
    if cfg.modulation == "per_block":
      self.modulation = layers.Einsum(
        (cfg.width, 4 * cfg.width), "bd,de->be", scale=0.1
      )

  def _rows(self, tokens: Tokens, prefix: int, length: int):
    """Scales and gates `(s1, g1, s2, g2)`, fp32 `[B, S or 1, D]` each."""

    def of_stream(rows):
      if rows is None:
        return (None,) * 4
      if self.config.modulation == "per_block":
        rows = self.modulation(rows)
      s1, g1, s2, g2 = jnp.split(rows, 4, axis=-1)
      if self.config.gate == "tanh":
        g1, g2 = jnp.tanh(g1), jnp.tanh(g2)
      return s1, g1, s2, g2

    both = zip(of_stream(tokens.prefix_rows), of_stream(tokens.target_rows))
    return tuple(per_token(p, t, prefix, length) for p, t in both)

  def _normed(self, x, scale):
    x = layers.modulate(layers.layer_norm(x, self.config.eps), scale)
    return x.astype(self.config.dtype)

  def _attend(self, q, k, v, tokens: Tokens, prefix: int):
    """Attention of both streams, `prefix` queries first: `[B, S, H, K]`."""
    cfg = self.config
    if cfg.attention == "joint" and prefix < q.shape[1]:
      return kernels.target_attention(cfg.kernel, q, k, v, tokens.valid_BP)
    parts = []
    if prefix:
      parts += [
        kernels.prefix_attention(
          cfg.kernel, q[:, :prefix], k[:, :prefix], v[:, :prefix],
          tokens.blocks_BP, tokens.valid_BP,
        )
      ]  # fmt: skip
    if prefix < q.shape[1]:
      parts += [
        kernels.target_attention(
          cfg.kernel, q[:, prefix:], k, v, tokens.valid_BP
        )
      ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

  def __call__(self, x_BSD, cache, tokens: Tokens):
    """Runs the layer; returns `(x, (keys, values) | None)`."""
    length = x_BSD.shape[1]
    prefix = 0
    if tokens.prefix_rows is not None:
      prefix = tokens.valid_BP.shape[1]
    s1, g1, s2, g2 = self._rows(tokens, prefix, length)
    q, k, v = self.attn.qkv(self._normed(x_BSD, s1), tokens.angles)
    out = (k, v) if tokens.target_rows is None else None
    if cache is not None:
      k = jnp.concatenate([cache[0].astype(k.dtype), k], axis=1)
      v = jnp.concatenate([cache[1].astype(v.dtype), v], axis=1)
    attended = self._attend(q, k, v, tokens, prefix)
    attended = checkpoint_name(attended, kernels.SAVED)
    x = x_BSD + (g1 * self.attn.project(attended)).astype(x_BSD.dtype)
    x = x + (g2 * self.mlp(self._normed(x, s2))).astype(x.dtype)
    return constrain(x, "batch", "tokens", None), out
