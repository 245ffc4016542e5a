# SPDX-License-Identifier: Apache-2.0
"""LPIPS on VGG16 (Zhang et al. 2018), the perceptual loss of the VAE.

Equals version 0.1 of the `lpips` package with `net="vgg"`. The network is
frozen: differentiate with respect to the images only. Images of 2048 px make
large feature maps; wrap the call in `jax.checkpoint` or score crops.

Shapes: B batch, H, W pixels, h, w a feature map, C channels of a tap.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.parallel.sharding import constrain

# The channel statistics of ImageNet, moved to images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# Outside the square root, as in the reference.
EPS = 1e-10


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
  """Shape of the network; the defaults are VGG16's.

  Attributes:
    widths: channels of each stage; a pooling stands between two stages.
    depths: convolutions of each stage; the last one is tapped.
    dtype: compute dtype of the convolutions; the distance itself is fp32.
  """

  widths: tuple[int, ...] = (64, 128, 256, 512, 512)
  depths: tuple[int, ...] = (2, 2, 3, 3, 3)
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    """Raises InputError if a stage has a width and no depth or vice versa."""
    if len(self.widths) != len(self.depths):
      raise InputError(
        f"lpips.widths {self.widths} and lpips.depths {self.depths} must have "
        "one entry per stage each."
      )

  @property
  def smallest_side(self) -> int:
    """Pixels along the smallest image that reaches the last stage."""
    return 2 ** (len(self.widths) - 1)


def scale_input(x_BHWC: jax.Array) -> jax.Array:
  """Images in [-1, 1] to the scale VGG16 was trained on, in fp32."""
  shift = jnp.asarray(SHIFT, jnp.float32)[None, None, None]
  scale = jnp.asarray(SCALE, jnp.float32)[None, None, None]
  return (x_BHWC.astype(jnp.float32) - shift) / scale


def unit_channels(x_BhwC: jax.Array) -> jax.Array:
  """Divides each pixel's feature vector by its length, in fp32.

  Unlike the plain formula, the gradient at an all-zero vector is finite.
  """
  x = x_BhwC.astype(jnp.float32)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  alive = square > 0
  length = jnp.where(alive, jnp.sqrt(jnp.where(alive, square, 1.0)), 0.0)
  return x / (length + EPS)


def tap_distance(
  a_BhwC: jax.Array, b_BhwC: jax.Array, weights_C: jax.Array
) -> jax.Array:
  """Weighted squared distance of unit features, mean over pixels: `[B]`."""
  difference = unit_channels(a_BhwC) - unit_channels(b_BhwC)
  weights = weights_C.astype(jnp.float32)[None, None, None]
  weighted = jnp.sum(difference * difference * weights, axis=-1)
  return jnp.mean(weighted, axis=(1, 2))


class VGG(nn.Module):
  """The convolutions of VGG16, tapped after the last ReLU of each stage."""

  config: LPIPSConfig

  @nn.compact
  def __call__(self, x_BHWC) -> list[jax.Array]:
    """Feature maps of an RGB batch in [-1, 1], one `[B, h, w, C]` per tap.

    Raises:
      InputError: the images are not RGB, or too small for the last stage.
    """
    cfg = self.config
    _, height, width, channels = x_BHWC.shape
    if channels != 3:
      raise InputError(
        f"LPIPS needs RGB images but these have {channels} channels; lay "
        "RGBA over a background first."
      )
    if min(height, width) < cfg.smallest_side:
      raise InputError(
        f"LPIPS needs images of at least {cfg.smallest_side} px a side but "
        f"these have {height} x {width}; use larger images."
      )
    he = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    x = scale_input(x_BHWC).astype(cfg.dtype)
    taps = []
    for stage, (features, depth) in enumerate(zip(cfg.widths, cfg.depths), 1):
      if stage > 1:
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
      for i in range(1, depth + 1):
        x = nn.Conv(
          features, (3, 3), padding=1, dtype=cfg.dtype, kernel_init=he,
          name=f"conv{stage}_{i}",
        )(x)  # fmt: skip
        x = constrain(nn.relu(x), "batch", None, None, None)
      taps.append(x)
    return taps


class LPIPS(nn.Module):
  """Perceptual distance of two image batches."""

  config: LPIPSConfig

  def setup(self):
    """Declares the network and one weight vector per tap."""
    widths = self.config.widths
    self.vgg = VGG(self.config)
    # Fresh weights give the mean over taps of the unweighted distance.
    init = nn.initializers.constant(1.0 / len(widths))
    self.weights = [
      self.param(f"lin{i}", init, (width,)) for i, width in enumerate(widths)
    ]

  def __call__(self, a_BHWC, b_BHWC):
    """Distance of each pair of RGB images in [-1, 1]: fp32 `[B]`.

    The two batches run one after the other, so that a target image without
    a gradient costs no backward pass.

    Raises:
      InputError: the images are not RGB, or too small.
    """
    pairs = zip(self.vgg(a_BHWC), self.vgg(b_BHWC), self.weights)
    return sum(tap_distance(a, b, w) for a, b, w in pairs)


def init_params(model: LPIPS, key: jax.Array) -> dict:
  """Fresh parameters; their shapes do not depend on the image size."""
  side = model.config.smallest_side
  image = jnp.zeros((1, side, side, 3))
  return model.init(key, image, image)["params"]


# Small and frozen: output features over fsdp, the rest whole.
SHARDING_RULES = (
  (r"(.*/)?conv\d_\d/kernel", ("fsdp",)),
  (r"(.*/)?(bias|lin\d)", ()),
)
