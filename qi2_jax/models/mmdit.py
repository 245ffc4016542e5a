# SPDX-License-Identifier: Apache-2.0
"""The single-stream MMDiT of Qwen-Image-2.x (report section 3.2).

Text and reference-image tokens form the prefix, the image being denoised is
the target. They lie one behind the other in one sequence, so every weight is
multiplied once per layer and its gradient reduced once; in attention they are
two streams, so no mask over the whole sequence exists. With block-causal
attention and the condition at sigma = 0 the prefix never sees the target or
the noise level: its keys and values are computed once per prompt and reused
at every sampling step.

The preset `qwen_image_2_1` equals diffusers' `QwenImage21Transformer2DModel`;
`qwen_image_2_0` is our reading of the report, whose weights are not public.

Shapes: B batch, P prefix, N target, S = P + N (either may be 0), D width,
H heads, K head channels, L layers, Z latent channels.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.models import kernels, layers, rope
from qi2_jax.models.condition import Conditioning, Layout
from qi2_jax.models.mmdit_block import Block, MMDiTConfig, Tokens
from qi2_jax.parallel import sharding
from qi2_jax.parallel.sharding import constrain

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


def _pin_layer(params):
  """Constrains one layer's parameters to their places on the mesh.

  The constraint holds for their gradients too. Without it the compiler sums
  the whole gradient of every layer on every chip and slices it afterwards.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return params

  def one(path, x):
    name = sharding.path_name(path)
    if name.endswith(("lora_a", "lora_b")):
      return x  # Small, and placed by rules of their own.
    spec = sharding.spec_for(name, x.shape, SHARDING_RULES, mesh)
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree_util.tree_map_with_path(one, params)


def _block_class(config: MMDiTConfig, initialising: bool):
  """The scanned (and, by config, rematerialised) block."""
  block = nn.map_variables(
    Block, "params", trans_in_fn=_pin_layer, init=initialising
  )
  if config.remat != "none":
    policies = jax.checkpoint_policies
    policy = {
      "full": None,
      "dots": policies.dots_with_no_batch_dims_saveable,
      "attention": policies.save_only_these_names(kernels.SAVED),
    }[config.remat]
    block = nn.remat(block, prevent_cse=False, policy=policy)
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(0, nn.broadcast),
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
    self.blocks = _block_class(cfg, self.is_initializing())(cfg)
    self.norm_out = layers.Einsum((d, d), "bd,de->be", scale=0.1)
    # Zero at the start, so training begins from the zero velocity.
    self.proj_out = layers.Einsum(
      (d, cfg.latent_channels), "bnd,dz->bnz", scale=0, dtype=cfg.dtype
    )

  def _rows(self, sigma_B) -> tuple[jax.Array, jax.Array]:
    """`(modulation rows or silu(temb), silu(temb))` of one stream."""
    temb = nn.silu(self.time_embedder(sigma_B))
    shared = self.config.modulation == "shared"
    return (self.modulation(temb) if shared else temb), temb

  def _angles(self, positions):
    return rope.angles(positions, self.config.rope_axes, self.config.rope_theta)

  def _embed_prefix(self, cond: Conditioning):
    """Gathers projected text states and latents into sequence order."""
    tokens = jnp.concatenate(
      [self.txt_in(cond.text_BTC), self.img_in(cond.references_BRZ)], axis=1
    )
    source = cond.layout.source_BP[:, :, None]
    return jnp.take_along_axis(tokens, source, axis=1)

  def _head(self, x_BND, temb):
    x = layers.layer_norm(x_BND, self.config.eps)
    x = layers.modulate(x, self.norm_out(temb)[:, None])
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
    rows, _ = self._rows(jnp.zeros((cond.text_BTC.shape[0],)))
    tokens = Tokens(
      rows, None, self._angles(layout.positions_BP3), _blocks(cond),
      layout.valid_BP,
    )  # fmt: skip
    x = constrain(self._embed_prefix(cond), "batch", "tokens", None)
    _, (keys, values) = self.blocks(x, None, tokens)
    return PrefixCache(keys, values)

  def decode(self, latents_BNZ, sigma_B, cache: PrefixCache, layout):
    """Velocity of the target given a prefix cache: fp32 `[B, N, Z]`."""
    rows, temb = self._rows(sigma_B)
    angles = self._angles(layout.target_positions_BN3)
    tokens = Tokens(None, rows, angles, None, layout.valid_BP)
    x = constrain(self.img_in(latents_BNZ), "batch", "tokens", None)
    x, _ = self.blocks(x, (cache.keys, cache.values), tokens)
    return self._head(x, temb)

  def __call__(self, latents_BNZ, sigma_B, cond: Conditioning):
    """Velocity of the target: fp32 `[B, N, Z]`.

    Args:
      latents_BNZ: noisy normalised latents, row-major tokens.
      sigma_B: noise levels in [0, 1].
      cond: text states, reference latents and token layout.
    """
    return self.with_hidden(latents_BNZ, sigma_B, cond)[0]

  def with_hidden(self, latents_BNZ, sigma_B, cond: Conditioning):
    """`(velocity, last hidden states [B, N, D])` of the target.

    Args:
      latents_BNZ: see `__call__`.
      sigma_B: likewise.
      cond: likewise.
    """
    layout = cond.layout
    zero = self.config.condition_time == "zero"
    prefix_rows, _ = self._rows(jnp.zeros_like(sigma_B) if zero else sigma_B)
    target_rows, temb = self._rows(sigma_B)
    positions = jnp.concatenate(
      [layout.positions_BP3, layout.target_positions_BN3], axis=1
    )
    tokens = Tokens(
      prefix_rows, target_rows, self._angles(positions), _blocks(cond),
      layout.valid_BP,
    )  # fmt: skip
    x = jnp.concatenate(
      [self._embed_prefix(cond), self.img_in(latents_BNZ)], axis=1
    )
    x, _ = self.blocks(constrain(x, "batch", "tokens", None), None, tokens)
    x_BND = x[:, layout.valid_BP.shape[1] :]
    return self._head(x_BND, temb), x_BND


def _blocks(cond: Conditioning) -> jax.Array | None:
  """Image of each prefix token; None where the shapes tell: no images."""
  return cond.layout.blocks_BP if cond.references_BRZ.shape[1] else None


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
