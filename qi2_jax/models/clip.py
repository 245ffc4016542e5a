# SPDX-License-Identifier: Apache-2.0
"""CLIP (Radford et al. 2021): images and texts in one space.

Equals `CLIPModel` of transformers. Images have the one size of the config.

Shapes: B images, C texts, H, W pixels, N patches, T text tokens, D width of a
tower, P width of the common space.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from qi2_jax.models import layers, vit
from qi2_jax.models.vit import StackConfig


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Shape of both towers.

  Attributes:
    vision: blocks of the image tower.
    text: blocks of the text tower.
    projection: P.
    image_size: pixels along an image.
    patch_size: pixels along a patch.
    vocabulary: text tokens.
    length: text positions.
    eos: token whose first place is read as the text; None is the highest id
      of a text, as configs written before the field was right mean it.
  """

  vision: StackConfig
  text: StackConfig
  projection: int
  image_size: int = 224
  patch_size: int = 14
  vocabulary: int = 49408
  length: int = 77
  eos: int | None = 49407

  @property
  def side(self) -> int:
    """Patches along an image."""
    return self.image_size // self.patch_size


def _stack(layers: int, width: int, heads: int) -> StackConfig:
  return StackConfig(layers, width, heads, 4 * width, "quick_gelu", 1e-5)


# `vit_l_14` is openai/clip-vit-large-patch14.
PRESETS = {
  "vit_l_14": CLIPConfig(_stack(24, 1024, 16), _stack(12, 768, 12), 768),
}


class Vision(nn.Module):
  """Images to the class token and the patches."""

  config: CLIPConfig

  @nn.compact
  def __call__(self, image_BHWC):
    """`[B, H, W, 3]` -> `(normed class token [B, D], patches [B, N, D])`."""
    cfg, stack = self.config, self.config.vision
    x = vit.square_patches(
      image_BHWC, cfg.image_size, cfg.patch_size, stack.width, stack.dtype,
      bias=False,
    )  # fmt: skip
    init = nn.initializers.normal(0.02)
    cls = self.param("cls_token", init, (stack.width,)).astype(stack.dtype)
    cls = jnp.broadcast_to(cls[None, None], (x.shape[0], 1, stack.width))
    table = self.param("pos_embed", init, (1 + cfg.side**2, stack.width))
    x = jnp.concatenate([cls, x], axis=1) + table.astype(stack.dtype)[None]
    # Named after its place: the published name has a typing error.
    x = layers.affine_norm(stack.eps, stack.dtype, "norm_in")(x)
    x = vit.stack(stack, x)
    norm = layers.affine_norm(stack.eps, stack.dtype, "norm_out")
    return norm(x[:, 0]), x[:, 1:]


def end_of_text(ids_CT: jax.Array, eos: int | None) -> jax.Array:
  """Place of the token that stands for the text: `[C]`."""
  hit = ids_CT if eos is None else ids_CT == eos
  return jnp.argmax(hit, axis=1)


class Text(nn.Module):
  """Texts to the state of their last token."""

  config: CLIPConfig

  @nn.compact
  def __call__(self, ids_CT):
    """`[C, T]` -> `[C, D]`."""
    cfg, stack = self.config, self.config.text
    x = vit.token_embedding(
      ids_CT, cfg.vocabulary, cfg.length, stack.width, stack.dtype
    )
    x = vit.stack(stack, x, causal=True)
    last = end_of_text(ids_CT, cfg.eos)[:, None, None]
    x = jnp.take_along_axis(x, last, axis=1)[:, 0]
    return layers.affine_norm(stack.eps, stack.dtype, "norm_out")(x)


class CLIP(nn.Module):
  """Both towers and their projections."""

  config: CLIPConfig

  def setup(self):
    """Declares the towers."""
    cfg = self.config
    self.vision, self.text = Vision(cfg), Text(cfg)
    project = lambda dtype: nn.Dense(  # noqa: E731
      cfg.projection, use_bias=False, dtype=dtype
    )
    self.image_projection = project(cfg.vision.dtype)
    self.text_projection = project(cfg.text.dtype)
    # ln(1 / 0.07), where the published training starts.
    init = nn.initializers.constant(2.6592)
    self.logit_scale = self.param("logit_scale", init, ())

  def embed_images(self, image_BHWC):
    """Prepared images -> fp32 unit vectors `[B, P]`."""
    return vit.unit(self.image_projection(self.vision(image_BHWC)[0]))

  def patches(self, image_BHWC):
    """Prepared images -> their patches' states `[B, h, w, D]`."""
    x, side = self.vision(image_BHWC)[1], self.config.side
    return x.reshape(x.shape[0], side, side, -1)

  def embed_texts(self, ids_CT):
    """Token ids -> fp32 unit vectors `[C, P]`."""
    return vit.unit(self.text_projection(self.text(ids_CT)))

  def scaled(self, cosine):
    """Cosines -> logits."""
    return cosine * jnp.exp(self.logit_scale.astype(jnp.float32))

  def __call__(self, image_BHWC, ids_CT):
    """Logits of every image with every text: fp32 `[B, C]`."""
    image, text = self.embed_images(image_BHWC), self.embed_texts(ids_CT)
    return self.scaled(vit.cosines(image, text))


SHARDING_RULES = (
  *vit.SHARDING_RULES,
  (r"(.*/)?(image|text)_projection/kernel", ("fsdp",)),
  (r"(.*/)?vision/pos_embed", (None, "fsdp")),
  (r"(.*/)?(cls_token|logit_scale)", ()),
)
