# SPDX-License-Identifier: Apache-2.0
"""The single-stream MMDiT of Qwen-Image-2.x (report section 3.2).

Text and reference-image tokens form the prefix, the image being denoised is
the target. Both run through the same weights as two streams, so modulation
is one row per stream and no mask over the whole sequence exists. With
block-causal attention and the condition at sigma = 0 the prefix never sees
the target or the noise level: its keys and values are computed once per
prompt and reused at every sampling step.

The preset `qwen_image_2_1` equals diffusers' `QwenImage21Transformer2DModel`;
`qwen_image_2_0` is our reading of the report, whose weights are not public.

Shapes: B batch, P prefix, N target, D width, H heads, K head channels,
L layers, Z latent channels.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.models import attention, layers, rope
from qi2_jax.models.condition import Conditioning, Layout
from qi2_jax.parallel.sharding import constrain

VARIANTS = {
  "attention": ("block_causal", "joint"),
  "condition_time": ("zero", "shared"),
  "modulation": ("shared", "per_block"),
  "gate": ("tanh", "linear"),
  "remat": ("none", "full", "dots"),
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
    remat: what a layer recomputes in the backward pass.
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


PRESETS = {
  "qwen_image_2_1": MMDiTConfig(dtype=jnp.bfloat16),
  # The report names joint attention and bias-free multiplicative modulation;
  # sizes are those of 2.1 because it does not give its own.
  "qwen_image_2_0": MMDiTConfig(
    attention="joint", condition_time="shared", modulation="per_block",
    gate="linear", dtype=jnp.bfloat16,
  ),
  # Ours, sized for two CPU cores.
  "tiny": MMDiTConfig(
    num_layers=4, num_heads=2, head_dim=64, context_dim=64,
    rope_axes=(16, 24, 24), remat="none",
  ),
}  # fmt: skip


@flax.struct.dataclass
class PrefixCache:
  """Keys (after RoPE) and values of the prefix, `[L, B, P, H, K]` each."""

  keys: jax.Array
  values: jax.Array


@flax.struct.dataclass
class Stream:
  """What the blocks need beside the activations of one stream.

  Attributes:
    modulation: fp32 `[B, 4D]`, or the fp32 `silu(temb)` `[B, D]` when
      modulation is per block.
    angles: rotary angles `[B, tokens, K/2]`.
  """

  modulation: jax.Array
  angles: jax.Array


class Attention(nn.Module):
  """Projections of one block; the attention itself is a free function."""

  config: MMDiTConfig

  def setup(self):
    """Declares projections shared by both streams."""
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

  def qkv(self, x_BND, angles):
    """Normed, rotated queries and keys, and values: `[B, N, H, K]` each."""
    dtype = self.config.dtype
    q = rope.rotate(self.norm_q(self.to_q(x_BND)), angles).astype(dtype)
    k = rope.rotate(self.norm_k(self.to_k(x_BND)), angles).astype(dtype)
    v = self.to_v(x_BND)
    return tuple(
      constrain(t, "batch", "tokens", "heads", None) for t in (q, k, v)
    )

  def project(self, x_BNHK):
    """Heads back to the model width."""
    return self.to_out(x_BNHK)


class Block(nn.Module):
  """One layer over the prefix, the target, or both.

  The carry is `(prefix, target)`, either of which may be None. A target
  without a prefix reads the layer's slice of the cache; a prefix without a
  target returns that slice.
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

  def _rows(self, stream: Stream):
    """Scales and gates `(s1, g1, s2, g2)`, fp32 `[B, D]` each."""
    rows = stream.modulation
    if self.config.modulation == "per_block":
      rows = self.modulation(rows)
    s1, g1, s2, g2 = jnp.split(rows, 4, axis=-1)
    if self.config.gate == "tanh":
      g1, g2 = jnp.tanh(g1), jnp.tanh(g2)
    return s1, g1, s2, g2

  def _normed(self, x, scale):
    x = layers.modulate(layers.layer_norm(x, self.config.eps), scale)
    return x.astype(self.config.dtype)

  def _finish(self, x, attended, rows):
    """Adds the gated attention output and the gated MLP."""
    _, g1, s2, g2 = rows
    x = x + (g1[:, None] * self.attn.project(attended)).astype(x.dtype)
    out = g2[:, None] * self.mlp(self._normed(x, s2))
    return constrain(x + out.astype(x.dtype), "batch", "tokens", None)

  def __call__(self, carry, cache, prefix, target, blocks, valid):
    """Runs the layer; returns `((prefix, target), (keys, values) | None)`."""
    x_p, x_t = carry
    keys, values = cache if cache is not None else (None, None)
    if x_p is not None:
      rows_p = self._rows(prefix)
      q_p, keys, values = self.attn.qkv(
        self._normed(x_p, rows_p[0]), prefix.angles
      )
    out = None
    if x_t is not None:
      rows_t = self._rows(target)
      q_t, k_t, v_t = self.attn.qkv(self._normed(x_t, rows_t[0]), target.angles)
      k_all = jnp.concatenate([keys.astype(k_t.dtype), k_t], axis=1)
      v_all = jnp.concatenate([values.astype(v_t.dtype), v_t], axis=1)
      seen = jnp.concatenate(
        [valid, jnp.ones(x_t.shape[:2], dtype=bool)], axis=1
      )
      y_t = attention.full_attention(q_t, k_all, v_all, seen)
    if x_p is not None and self.config.attention == "joint":
      # Without a target the joint prefix has nothing to attend to yet.
      y_p = attention.full_attention(q_p, k_all, v_all, seen)
    elif x_p is not None:
      y_p = attention.prefix_attention(q_p, keys, values, blocks, valid)
    if x_p is not None:
      x_p = self._finish(x_p, y_p, rows_p)
    if x_t is not None:
      x_t = self._finish(x_t, y_t, rows_t)
    elif x_p is not None:
      out = (keys, values)
    return (x_p, x_t), out


def _block_class(config: MMDiTConfig):
  """The scanned (and, by config, rematerialised) block."""
  block = Block
  if config.remat != "none":
    policy = None
    if config.remat == "dots":
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    block = nn.remat(Block, prevent_cse=False, policy=policy)
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(0,) + (nn.broadcast,) * 4,
    length=config.num_layers,
  )


class MMDiT(nn.Module):
  """Velocity network `v(x_sigma, sigma, condition)`."""

  config: MMDiTConfig

  def setup(self):
    """Declares embeddings, blocks and head."""
    cfg = self.config
    d = cfg.width
    self.img_in = layers.Einsum(
      (cfg.latent_channels, d), "bnz,zd->bnd", dtype=cfg.dtype
    )
    self.txt_in = layers.TextProjection(d, cfg.eps, cfg.dtype)
    self.time_embedder = layers.TimeEmbedder(d)
    if cfg.modulation == "shared":
      self.modulation = layers.Einsum((d, 4 * d), "bd,de->be", scale=0.1)
    self.blocks = _block_class(cfg)(cfg)
    self.norm_out = layers.Einsum((d, d), "bd,de->be", scale=0.1)
    # Zero at the start, so training begins from the zero velocity.
    self.proj_out = layers.Einsum(
      (d, cfg.latent_channels), "bnd,dz->bnz", scale=0, dtype=cfg.dtype
    )

  def _stream(self, sigma_B, positions) -> tuple[Stream, jax.Array]:
    cfg = self.config
    temb = nn.silu(self.time_embedder(sigma_B))
    rows = self.modulation(temb) if cfg.modulation == "shared" else temb
    angles = rope.angles(positions, cfg.rope_axes, cfg.rope_theta)
    return Stream(rows, angles), temb

  def _embed_prefix(self, cond: Conditioning):
    """Gathers projected text states and latents into sequence order."""
    tokens = jnp.concatenate(
      [self.txt_in(cond.text_BTC), self.img_in(cond.references_BRZ)], axis=1
    )
    source = cond.layout.source_BP[:, :, None]
    prefix = jnp.take_along_axis(tokens, source, axis=1)
    return constrain(prefix, "batch", "tokens", None)

  def _run(self, carry, cache, prefix, target, layout):
    return self.blocks(
      carry, cache, prefix, target, layout.blocks_BP, layout.valid_BP
    )

  def _head(self, x_BND, temb):
    x = layers.layer_norm(x_BND, self.config.eps)
    x = layers.modulate(x, self.norm_out(temb))
    return self.proj_out(x).astype(jnp.float32)

  def prefix_cache(self, cond: Conditioning) -> PrefixCache:
    """Keys and values of the prefix, valid at every noise level.

    Raises:
      InputError: for a variant whose prefix depends on target or noise.
    """
    if not self.config.cacheable:
      raise InputError(
        "this model variant has no prefix cache; it needs "
        "attention=block_causal and condition_time=zero."
      )
    layout = cond.layout
    sigma = jnp.zeros((cond.text_BTC.shape[0],))
    stream, _ = self._stream(sigma, layout.positions_BP3)
    carry = (self._embed_prefix(cond), None)
    _, (keys, values) = self._run(carry, None, stream, None, layout)
    return PrefixCache(keys, values)

  def decode(self, latents_BNZ, sigma_B, cache: PrefixCache, layout):
    """Velocity of the target given a prefix cache: fp32 `[B, N, Z]`."""
    stream, temb = self._stream(sigma_B, layout.target_positions_BN3)
    carry = (None, self.img_in(latents_BNZ))
    (_, x), _ = self._run(
      carry, (cache.keys, cache.values), None, stream, layout
    )
    return self._head(x, temb)

  def __call__(self, latents_BNZ, sigma_B, cond: Conditioning):
    """Velocity of the target: fp32 `[B, N, Z]`.

    Args:
      latents_BNZ: noisy normalised latents, row-major tokens.
      sigma_B: noise levels in [0, 1].
      cond: text states, reference latents and token layout.
    """
    layout = cond.layout
    zero = self.config.condition_time == "zero"
    sigma_p = jnp.zeros_like(sigma_B) if zero else sigma_B
    prefix, _ = self._stream(sigma_p, layout.positions_BP3)
    target, temb = self._stream(sigma_B, layout.target_positions_BN3)
    carry = (self._embed_prefix(cond), self.img_in(latents_BNZ))
    (_, x), _ = self._run(carry, None, prefix, target, layout)
    return self._head(x, temb)


# Megatron layout inside a block (heads and mlp width over tensor), the other
# large dimension over fsdp; embeddings and head over fsdp only.
SHARDING_RULES = (
  (r"(.*/)?attn/to_[qkv]/kernel", ("fsdp", "tensor", None)),
  (r"(.*/)?attn/to_out/kernel", ("tensor", None, "fsdp")),
  (r"(.*/)?mlp/(gate|proj)/kernel", ("fsdp", "tensor")),
  (r"(.*/)?mlp/out/kernel", ("tensor", "fsdp")),
  (r"(.*/)?(norm_[qk]/scale|text_norm)", ()),
  (r"(.*/)?proj_out/kernel", ("fsdp", None)),
  (r"(.*/)?(img_in|in_layer|out_layer|linear_[12]|modulation|norm_out)/kernel",
   (None, "fsdp")),
)  # fmt: skip


def init_params(model: MMDiT, key: jax.Array) -> dict:
  """Fresh parameters; their shapes do not depend on any sequence length."""
  cfg = model.config
  one = jnp.zeros((1, 1), jnp.int32)
  positions = jnp.zeros((1, 1, 3), jnp.int32)
  cond = Conditioning(
    text_BTC=jnp.zeros((1, 1, cfg.context_dim)),
    references_BRZ=jnp.zeros((1, 0, cfg.latent_channels)),
    layout=Layout(one, one - 1, one == 0, positions, positions),
  )
  latents = jnp.zeros((1, 1, cfg.latent_channels))
  return model.init(key, latents, jnp.ones((1,)), cond)["params"]
