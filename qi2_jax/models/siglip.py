# SPDX-License-Identifier: Apache-2.0
"""SigLIP (Zhai et al. 2023) and SigLIP 2 of a fixed resolution.

Equals `SiglipModel` of transformers, which holds both: images of the one size
of the config, pooled by a learned query; texts padded to their full length
and read at the last place, whatever stands there.

Shapes: B images, C texts, H, W pixels, N patches, T text tokens, D width of a
tower, A heads, K head channels, P width of the common space (that of the
image tower).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.models import layers, vit
from qi2_jax.models.vit import StackConfig
from qi2_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class SigLIPConfig:
  """Shape of both towers.

  Attributes:
    vision: blocks of the image tower.
    text: blocks of the text tower.
    projection: P of the texts; must be the image tower's width.
    image_size: pixels along an image.
    patch_size: pixels along a patch.
    vocabulary: text tokens.
    length: text positions.
  """

  vision: StackConfig
  text: StackConfig
  projection: int
  image_size: int = 384
  patch_size: int = 14
  vocabulary: int = 32000
  length: int = 64

  def __post_init__(self):
    """Raises InputError if images and texts do not meet in one space."""
    if self.projection != self.vision.width:
      raise InputError(
        f"texts are projected to {self.projection} channels but images have "
        f"{self.vision.width}; check projection_size in the config.json."
      )

  @property
  def side(self) -> int:
    """Patches along an image."""
    return self.image_size // self.patch_size


def _stack(layers: int, width: int, heads: int, mlp: int) -> StackConfig:
  return StackConfig(layers, width, heads, mlp, "gelu_pytorch_tanh", 1e-6)


# `so400m` is google/siglip-so400m-patch14-384; `tiny` is ours.
PRESETS = {
  "so400m": SigLIPConfig(
    _stack(27, 1152, 16, 4304), _stack(27, 1152, 16, 4304), 1152
  ),
  "tiny": SigLIPConfig(
    _stack(2, 32, 2, 64), _stack(2, 32, 2, 64), 32, image_size=32,
    patch_size=8, vocabulary=1024, length=32,
  ),
}  # fmt: skip


class Pool(nn.Module):
  """A learned query attends to the patches, then an MLP."""

  config: StackConfig

  @nn.compact
  def __call__(self, x_BND):
    """`[B, N, D]` -> `[B, D]`."""
    cfg = self.config
    heads = (cfg.num_heads, cfg.width // cfg.num_heads)
    init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
    # One array for query, key and value, as torch's own layer has it.
    kernel = self.param("qkv", init, (cfg.width, 3, *heads)).astype(cfg.dtype)
    bias = self.param("qkv_bias", nn.initializers.zeros, (3, *heads))
    bias = bias.astype(cfg.dtype)
    probe = self.param("probe", nn.initializers.normal(0.02), (cfg.width,))
    q_AK = jnp.einsum("d,dak->ak", probe.astype(cfg.dtype), kernel[:, 0])
    q_BAK = jnp.broadcast_to((q_AK + bias[0])[None], (x_BND.shape[0], *heads))
    kv = jnp.einsum("bnd,dsak->sbnak", x_BND, kernel[:, 1:])
    kv = kv + bias[1:][:, None, None]
    k, v = (constrain(a, "batch", None, "heads", None) for a in kv)
    x = jax.nn.dot_product_attention(q_BAK[:, None], k, v)
    x = nn.DenseGeneral(
      cfg.width, axis=(-2, -1), dtype=cfg.dtype, name="to_out"
    )(x)
    h = layers.affine_norm(cfg.eps, cfg.dtype, "norm")(x)
    act = vit.ACTIVATIONS[cfg.activation]
    return (x + vit.mlp(h, cfg.mlp_width, act, cfg.dtype))[:, 0]


class Vision(nn.Module):
  """Images to one vector and the patches."""

  config: SigLIPConfig

  @nn.compact
  def __call__(self, image_BHWC):
    """`[B, H, W, 3]` -> `(pooled [B, D], normed patches [B, N, D])`."""
    cfg, stack = self.config, self.config.vision
    x = vit.square_patches(
      image_BHWC, cfg.image_size, cfg.patch_size, stack.width, stack.dtype,
      bias=True,
    )  # fmt: skip
    init = nn.initializers.normal(stack.width**-0.5)
    table = self.param("pos_embed", init, (cfg.side**2, stack.width))
    x = vit.stack(stack, x + table.astype(stack.dtype)[None])
    x = layers.affine_norm(stack.eps, stack.dtype, "norm_out")(x)
    return Pool(stack, name="pool")(x), x


class Text(nn.Module):
  """Padded texts to the common space."""

  config: SigLIPConfig

  @nn.compact
  def __call__(self, ids_CT):
    """`[C, T]` -> `[C, P]`."""
    cfg, stack = self.config, self.config.text
    x = vit.token_embedding(
      ids_CT, cfg.vocabulary, cfg.length, stack.width, stack.dtype
    )
    x = vit.stack(stack, x)[:, -1]
    x = layers.affine_norm(stack.eps, stack.dtype, "norm_out")(x)
    return nn.Dense(cfg.projection, dtype=stack.dtype, name="head")(x)


class SigLIP(nn.Module):
  """Both towers; the methods are those of `models.clip.CLIP`."""

  config: SigLIPConfig

  def setup(self):
    """Declares the towers."""
    self.vision, self.text = Vision(self.config), Text(self.config)
    # ln 10 and -10, where the published training starts.
    scale, bias = (nn.initializers.constant(v) for v in (2.3026, -10.0))
    self.logit_scale = self.param("logit_scale", scale, ())
    self.logit_bias = self.param("logit_bias", bias, ())

  def embed_images(self, image_BHWC):
    """Prepared images -> fp32 unit vectors `[B, P]`."""
    return vit.unit(self.vision(image_BHWC)[0])

  def patches(self, image_BHWC):
    """Prepared images -> their patches' states `[B, h, w, D]`."""
    x, side = self.vision(image_BHWC)[1], self.config.side
    return x.reshape(x.shape[0], side, side, -1)

  def embed_texts(self, ids_CT):
    """Token ids -> fp32 unit vectors `[C, P]`."""
    return vit.unit(self.text(ids_CT))

  def scaled(self, cosine):
    """Cosines -> logits; their sigmoid is the chance of a pair."""
    scale, bias = (
      x.astype(jnp.float32) for x in (self.logit_scale, self.logit_bias)
    )
    return cosine * jnp.exp(scale) + bias

  def __call__(self, image_BHWC, ids_CT):
    """Logits of every image with every text: fp32 `[B, C]`."""
    image, text = self.embed_images(image_BHWC), self.embed_texts(ids_CT)
    return self.scaled(vit.cosines(image, text))


SHARDING_RULES = (
  *vit.SHARDING_RULES,
  (r"(.*/)?pool/qkv", ("fsdp", None, "tensor", None)),
  (r"(.*/)?text/head/kernel", ("fsdp",)),
  (r"(.*/)?vision/pos_embed", (None, "fsdp")),
  (r"(.*/)?(qkv_bias|probe|logit_scale|logit_bias)", ()),
)
