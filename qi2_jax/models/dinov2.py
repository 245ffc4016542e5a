# SPDX-License-Identifier: Apache-2.0
"""DINOv2 (Oquab et al. 2023): frozen patch features for VAE alignment.

Equals `Dinov2Model` and `Dinov2WithRegistersModel` of transformers up to the
last block that the config keeps; the final norm is not part of it. To stop
at a middle layer, drop the later blocks (`upto`): they then cost neither
time nor memory.

Shapes: B batch, H, W pixels, h, w patches along an axis, N tokens (class
token, registers, patches row by row), D width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.models import layers, vit
from qi2_jax.parallel.sharding import constrain

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Of the cubic kernel in torch's `interpolate` without antialias.
_CUBIC = -0.75


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
  """Shape of the network.

  Attributes:
    num_layers: blocks; they are scanned.
    width: channels of a token.
    num_heads: attention heads.
    mlp_width: hidden width of a block's MLP.
    patch_size: pixels along a patch.
    side: patches along the square position table.
    num_registers: extra tokens between the class token and the patches.
    eps: epsilon of the norms.
    dtype: compute dtype.
  """

  num_layers: int
  width: int
  num_heads: int
  mlp_width: int
  patch_size: int = 14
  side: int = 37
  num_registers: int = 0
  eps: float = 1e-6
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    """Raises InputError for heads that do not divide the width."""
    if self.width % self.num_heads:
      raise InputError(
        f"dinov2.width {self.width} must be a multiple of num_heads "
        f"{self.num_heads}."
      )


# `tiny` is ours; `dinov2_large` is facebook/dinov2-large.
PRESETS = {
  "dinov2_large": DINOv2Config(
    num_layers=24, width=1024, num_heads=16, mlp_width=4096
  ),
  "tiny": DINOv2Config(
    num_layers=4, width=64, num_heads=2, mlp_width=128, side=5
  ),
}


def preprocess(
  image_BHWC: jax.Array, grid: tuple[int, int], patch_size: int = 14
) -> jax.Array:
  """RGB images in [-1, 1] -> the network's input for a grid of patches.

  Bilinear, antialiased when shrinking, then ImageNet's mean and std in fp32.
  VA-VAE's code leaves mean and std out; they are how DINOv2 was trained.

  Args:
    image_BHWC: `[B, H, W, 3]` in [-1, 1], any size.
    grid: patches along height and width.
    patch_size: pixels along a patch.

  Returns:
    fp32 `[B, grid[0] * patch_size, grid[1] * patch_size, 3]`.

  Raises:
    InputError: the images are not RGB.
  """
  batch, _, _, channels = image_BHWC.shape
  if channels != 3:
    raise InputError(
      f"DINOv2 needs RGB images but these have {channels} channels; lay RGBA "
      "over a background first."
    )
  h, w = (n * patch_size for n in grid)
  x = (image_BHWC.astype(jnp.float32) + 1.0) / 2.0
  x = jax.image.resize(x, (batch, h, w, 3), "bilinear", precision="highest")
  mean = jnp.asarray(MEAN, jnp.float32)[None, None, None]
  std = jnp.asarray(STD, jnp.float32)[None, None, None]
  return (x - mean) / std


def cubic_weights(distance: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel, zero from a distance of 2 on."""
  x = np.abs(distance)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resample_matrix(size: int, side: int) -> np.ndarray:
  """Bicubic weights of `side` table entries at `size` points: `[size, side]`.

  Half-pixel centres, border entries repeated, no antialias, as torch's
  `interpolate(mode="bicubic")`; `jax.image.resize` has another kernel (-0.5)
  and renormalises at the border instead.
  """
  centre = (np.arange(size) + 0.5) * side / size - 0.5
  taps = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)[None]
  weights = cubic_weights(centre[:, None] - taps, _CUBIC)
  out = np.zeros((size, side))
  rows = np.broadcast_to(np.arange(size)[:, None], taps.shape)
  np.add.at(out, (rows, np.clip(taps, 0, side - 1)), weights)
  return out.astype(np.float32)


def patch_positions(table_ssD: jax.Array, h: int, w: int) -> jax.Array:
  """The square position table resampled to h x w patches: `[h, w, D]`."""
  side = table_ssD.shape[0]
  # At a TPU's default precision the weights would be rounded to bf16.
  return jnp.einsum(
    "rs,std,ct->rcd", resample_matrix(h, side), table_ssD,
    resample_matrix(w, side), precision="highest",
  )  # fmt: skip


def patch_positions_smooth(table_ssD: jax.Array, h: int, w: int) -> jax.Array:
  """As `patch_positions`, the antialiased way of models with registers."""
  return jax.image.resize(
    table_ssD, (h, w, table_ssD.shape[-1]), "cubic", precision="highest"
  )


class Block(nn.Module):
  """One pre-norm block with a learned scale on each branch."""

  config: DINOv2Config

  @nn.compact
  def __call__(self, x_BND, _):
    """Runs the block; shaped for `nn.scan`."""
    cfg = self.config
    h = layers.affine_norm(cfg.eps, cfg.dtype, "norm1")(x_BND)
    h = vit.self_attention(h, cfg.num_heads, cfg.dtype)
    x_BND = x_BND + h * self._scale("scale1")
    h = layers.affine_norm(cfg.eps, cfg.dtype, "norm2")(x_BND)
    h = vit.mlp(h, cfg.mlp_width, vit.exact_gelu, cfg.dtype)
    x_BND = x_BND + h * self._scale("scale2")
    return constrain(x_BND, "batch", None, None), None

  def _scale(self, name: str):
    scale = self.param(name, nn.initializers.ones, (self.config.width,))
    return scale.astype(self.config.dtype)[None, None]


class DINOv2(nn.Module):
  """Normalised images to patch features of the config's last block."""

  config: DINOv2Config

  @nn.compact
  def __call__(self, image_BHWC):
    """Runs all blocks.

    Args:
      image_BHWC: `[B, H, W, 3]` of `preprocess`; sides are multiples of the
        patch size and need not be equal.

    Returns:
      The residual stream at the patches, without the final norm:
      `[B, h, w, D]`.

    Raises:
      InputError: the images do not split into patches.
    """
    cfg = self.config
    b, height, width, channels = image_BHWC.shape
    p = cfg.patch_size
    if height % p or width % p or not height or not width or channels != 3:
      raise InputError(
        f"an image of {height} x {width} px and {channels} channels does not "
        f"fit DINOv2; give RGB with sides that are multiples of {p} px."
      )
    h, w = height // p, width // p
    x = nn.Conv(
      cfg.width, (p, p), strides=(p, p), padding="VALID", dtype=cfg.dtype,
      name="patch_embed",
    )(image_BHWC.astype(cfg.dtype))  # fmt: skip
    x = self._tokens(x.reshape(b, h * w, cfg.width), h, w)
    blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=cfg.num_layers,
    )(cfg, name="blocks")
    x, _ = blocks(constrain(x, "batch", None, None), None)
    return x[:, 1 + cfg.num_registers :].reshape(b, h, w, cfg.width)

  def _tokens(self, patches_BND, h: int, w: int):
    """Adds positions, and puts class token and registers in front."""
    cfg = self.config
    init = nn.initializers.normal(0.02)
    shape = (cfg.side**2 + 1, cfg.width)
    table = self.param("pos_embed", init, shape).astype(jnp.float32)
    cls = self.param("cls_token", init, (cfg.width,)).astype(jnp.float32)
    grid = table[1:].reshape(cfg.side, cfg.side, cfg.width)
    resample = patch_positions_smooth if cfg.num_registers else patch_positions
    positions = resample(grid, h, w).reshape(h * w, cfg.width)
    x = patches_BND + positions[None].astype(cfg.dtype)
    first = [(cls + table[0])[None]]
    if cfg.num_registers:
      shape = (cfg.num_registers, cfg.width)
      first.append(self.param("registers", init, shape).astype(jnp.float32))
    first = jnp.concatenate(first)[None].astype(cfg.dtype)
    first = jnp.broadcast_to(first, (x.shape[0], *first.shape[1:]))
    return jnp.concatenate([first, x], axis=1)


def upto(config: DINOv2Config, layer: int) -> DINOv2Config:
  """The config that stops after block `layer`, counted from 0.

  Its features are `hidden_states[layer + 1]` of transformers.

  Raises:
    InputError: there is no such block.
  """
  if not 0 <= layer < config.num_layers:
    raise InputError(
      f"DINOv2 layer {layer} does not exist; choose one of 0 to "
      f"{config.num_layers - 1}."
    )
  return dataclasses.replace(config, num_layers=layer + 1)


def init_params(model: DINOv2, key: jax.Array) -> dict:
  """Fresh parameters; their shapes do not depend on the image size."""
  side = model.config.patch_size
  return model.init(key, jnp.zeros((1, side, side, 3)))["params"]


SHARDING_RULES = (
  *vit.SHARDING_RULES,
  (r"(.*/)?(pos_embed|registers)", (None, "fsdp")),
  (r"(.*/)?(cls_token|scale\d)", ()),
)
