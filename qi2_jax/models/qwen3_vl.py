# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL as the condition encoder: states before the final norm.

Equals `Qwen3VLForConditionalGeneration` of transformers up to and without
its final norm and language head. Image features replace the embeddings of
image slots, and the deepstack features are added to the same slots after
the first decoder layers.

Shapes: B batch, T tokens, C width, H heads, K head channels, n image tokens
of a row, S deepstack taps, L layers.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.models import attention, layers, qwen3_vl_vision
from qi2_jax.models.qwen3_vl_vision import VisionConfig, rotate_halves
from qi2_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
  """Shape of the encoder.

  Attributes:
    vocab_size: rows of the embedding table.
    width: channels of the states.
    num_layers: decoder layers; they are scanned.
    num_heads: query heads.
    num_kv_heads: key and value heads; each serves num_heads / num_kv_heads.
    head_dim: channels per head.
    mlp_width: SwiGLU hidden width.
    rope_theta: base of the rotary frequencies.
    mrope_section: frequencies of the time, row and column axis.
    eps: epsilon of every RMSNorm.
    image_token_id: token id of an image slot, for the host's side.
    vision: shape of the vision tower.
    dtype: compute dtype; parameters keep theirs.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  rope_theta: float
  mrope_section: tuple[int, int, int]
  eps: float
  image_token_id: int
  vision: VisionConfig
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    """Raises InputError for shapes that do not fit together."""
    if self.num_heads % self.num_kv_heads:
      raise InputError(
        f"encoder.num_heads {self.num_heads} must be a multiple of "
        f"num_kv_heads {self.num_kv_heads}."
      )
    if 2 * sum(self.mrope_section) != self.head_dim:
      raise InputError(
        f"encoder.mrope_section {self.mrope_section} must sum to half of "
        f"head_dim {self.head_dim}."
      )
    if self.vision.out_width != self.width:
      raise InputError(
        f"encoder.vision.out_width {self.vision.out_width} must equal the "
        f"width {self.width}."
      )


PRESETS = {
  "qwen3_vl_8b": Qwen3VLConfig(
    vocab_size=151936, width=4096, num_layers=36, num_heads=32,
    num_kv_heads=8, head_dim=128, mlp_width=12288, rope_theta=5e6,
    mrope_section=(24, 20, 20), eps=1e-6, image_token_id=151655,
    dtype=jnp.bfloat16,
    vision=VisionConfig(
      depth=27, width=1152, num_heads=16, mlp_width=4304, patch_size=16,
      temporal_patch_size=2, merge_size=2, out_width=4096,
      num_positions=2304, deepstack_layers=(8, 16, 24), dtype=jnp.bfloat16,
    ),
  ),
  # Ours, sized for two CPU cores; the cell of 32 px is the public model's.
  "tiny": Qwen3VLConfig(
    vocab_size=2048, width=64, num_layers=4, num_heads=4, num_kv_heads=2,
    head_dim=32, mlp_width=128, rope_theta=5e6, mrope_section=(6, 5, 5),
    eps=1e-6, image_token_id=2047,
    vision=VisionConfig(
      depth=3, width=32, num_heads=2, mlp_width=64, patch_size=16,
      temporal_patch_size=2, merge_size=2, out_width=64, num_positions=64,
      deepstack_layers=(0, 1, 2),
    ),
  ),
}  # fmt: skip


def mrope_angles(positions_B3T, section, theta: float) -> jax.Array:
  """Rotary angles with the three axes interleaved over the frequencies.

  Frequency j belongs to rows if j % 3 == 1 and to columns if j % 3 == 2, as
  long as the axis has frequencies left, otherwise to time.

  Args:
    positions_B3T: integer (time, row, column) per token.
    section: frequencies of each axis; their sum is half the head size.
    theta: base of the geometric frequencies.

  Returns:
    fp32 `[B, T, sum(section)]`.
  """
  count = sum(section)
  axis = np.zeros(count, np.int32)
  axis[1 : 3 * section[1] : 3] = 1
  axis[2 : 3 * section[2] : 3] = 2
  exponent = np.arange(count, dtype=np.float32) / np.float32(count)
  freqs = np.float32(1) / np.power(np.float32(theta), exponent)
  picked = jnp.swapaxes(positions_B3T[:, axis], 1, 2)
  return picked.astype(jnp.float32) * freqs[None, None, :]


def at_slots(features_BnC: jax.Array, index_BT: jax.Array) -> jax.Array:
  """Feature `index` of the row at every slot, zero at text (index -1)."""
  picked = jnp.take_along_axis(
    features_BnC, jnp.maximum(index_BT, 0)[:, :, None], axis=1
  )
  return jnp.where((index_BT >= 0)[:, :, None], picked, 0)


def add_deepstack(x_BTC, layer, deepstack_SBTC) -> jax.Array:
  """Adds the layer's features after layers 0 .. S - 1, nothing after."""
  last = deepstack_SBTC.shape[0] - 1
  features = jax.lax.dynamic_index_in_dim(
    deepstack_SBTC, jnp.minimum(layer, last), keepdims=False
  )
  return jnp.where(layer <= last, x_BTC + features, x_BTC)


class DecoderLayer(nn.Module):
  """Causal grouped-query attention and a SwiGLU MLP."""

  config: Qwen3VLConfig

  @nn.compact
  def __call__(self, x_BTC, layer, angles_BTk, valid_BT, deepstack_SBTC):
    """Runs layer number `layer`; deepstack is None without images."""
    cfg = self.config
    attended = self._attend(self._normed(x_BTC, "input_norm"), angles_BTk,
                            valid_BT)  # fmt: skip
    x_BTC = x_BTC + attended
    mlp = layers.SwiGLU(cfg.mlp_width, cfg.dtype, name="mlp")
    x_BTC = x_BTC + mlp(self._normed(x_BTC, "mlp_norm"))
    if deepstack_SBTC is not None:
      x_BTC = add_deepstack(x_BTC, layer, deepstack_SBTC)
    return constrain(x_BTC, "batch", "tokens", None), None

  def _normed(self, x_BTC, name):
    cfg = self.config
    scale = self.param(name, nn.initializers.ones, (cfg.width,))
    return layers.rms_norm(x_BTC, scale, cfg.eps).astype(cfg.dtype)

  def _attend(self, x_BTC, angles_BTk, valid_BT):
    cfg = self.config
    c, k = cfg.width, cfg.head_dim

    def heads(name, count):
      out = layers.Einsum(
        (c, count, k), "btc,chk->bthk", dtype=cfg.dtype, name=name
      )(x_BTC)
      return constrain(out, "batch", "tokens", "heads", None)

    def placed(x_BTHK, name):
      x_BTHK = layers.HeadNorm(cfg.eps, name=name)(x_BTHK)
      return rotate_halves(x_BTHK, angles_BTk).astype(cfg.dtype)

    group = cfg.num_heads // cfg.num_kv_heads
    query = placed(heads("to_q", cfg.num_heads), "norm_q")
    key = placed(heads("to_k", cfg.num_kv_heads), "norm_k")
    key = jnp.repeat(key, group, axis=2)
    value = jnp.repeat(heads("to_v", cfg.num_kv_heads), group, axis=2)
    # Without blocks the prefix rule is plain causal attention.
    no_blocks = jnp.full(valid_BT.shape, -1, jnp.int32)
    out = attention.prefix_attention(query, key, value, no_blocks, valid_BT)
    return layers.Einsum(
      (cfg.num_heads, k, c), "bthk,hkc->btc", fan_in=(0, 1), dtype=cfg.dtype,
      name="to_out",
    )(out)  # fmt: skip


class Qwen3VL(nn.Module):
  """Token ids and images to states before the final norm."""

  config: Qwen3VLConfig

  def setup(self):
    """Declares the table, the tower and the scanned decoder."""
    cfg = self.config
    # Unit variance: the scale at which a random encoder's layers and words
    # both show in the states.
    self.embed_tokens = self.param(
      "embed_tokens", nn.initializers.normal(1.0), (cfg.vocab_size, cfg.width)
    )
    self.visual = qwen3_vl_vision.VisionTower(cfg.vision)
    self.layers = nn.scan(
      DecoderLayer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0,) + (nn.broadcast,) * 3,
      length=cfg.num_layers,
    )(cfg)

  def _image_features(self, images):
    """Features of a row's images in order: `[B, n, C]`, `[S, B, n, C]`."""
    merged, deepstack = zip(*(self.visual(image) for image in images))
    return jnp.concatenate(merged, axis=1), jnp.concatenate(deepstack, axis=2)

  def __call__(
    self, ids_BT, valid_BT, positions_B3T, image_index_BT=None, images=()
  ):
    """States before the final norm, in the compute dtype: `[B, T, C]`.

    Padding may be on either side; its states mean nothing. A row without
    image k carries any image of that size there and never indexes it.
    Without images the vision tower does not run.

    Args:
      ids_BT: int32 token ids.
      valid_BT: bool, false on padding.
      positions_B3T: int32 (time, row, column) of each token.
      image_index_BT: int32, -1 at text tokens, otherwise the index into the
        row's merged image tokens, all images one after the other.
      images: normalised float images `[B, H, W, 3]`, one entry per image of
        a row.

    Raises:
      InputError: images without an index, or of a size the tower lacks.
    """
    cfg = self.config
    if images and image_index_BT is None:
      raise InputError(
        "the encoder got images but no image_index; pass the index of every "
        "image slot (qi2_jax.conditioning.vl_layout.text_positions)."
      )
    x = jnp.take(self.embed_tokens, ids_BT, axis=0).astype(cfg.dtype)
    deepstack = None
    if images:
      merged, features = self._image_features(images)
      slots = at_slots(merged, image_index_BT)
      x = jnp.where((image_index_BT >= 0)[:, :, None], slots, x)
      deepstack = jax.vmap(at_slots, (0, None))(features, image_index_BT)
      deepstack = constrain(deepstack, None, "batch", "tokens", None)
    x = constrain(x, "batch", "tokens", None)
    angles = mrope_angles(positions_B3T, cfg.mrope_section, cfg.rope_theta)
    number = jnp.arange(cfg.num_layers)
    x, _ = self.layers(x, number, angles, valid_BT, deepstack)
    return x


# Heads and MLP width over tensor, the other large dimension over fsdp.
SHARDING_RULES = (
  (r"(.*/)?layers/to_[qkv]/kernel", ("fsdp", "tensor", None)),
  (r"(.*/)?layers/to_out/kernel", ("tensor", None, "fsdp")),
  (r"(.*/)?layers/mlp/(gate|proj)/kernel", ("fsdp", "tensor")),
  (r"(.*/)?layers/mlp/out/kernel", ("tensor", "fsdp")),
  (r"(.*/)?layers/(input_norm|mlp_norm|norm_[qk]/scale)", ()),
  (r"(.*/)?embed_tokens", (None, "fsdp")),
  *qwen3_vl_vision.SHARDING_RULES,
)


def init_params(model: Qwen3VL, key: jax.Array) -> dict:
  """Fresh parameters, the tower's included; shapes know no length."""
  one = jnp.zeros((1, 1), jnp.int32)
  cell = model.config.vision.cell
  images = (jnp.zeros((1, cell, cell, 3)),)
  positions = jnp.zeros((1, 3, 1), jnp.int32)
  return model.init(key, one, one == 0, positions, one, images)["params"]
