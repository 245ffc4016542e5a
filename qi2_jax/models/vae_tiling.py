# SPDX-License-Identifier: Apache-2.0
"""The VAE at 2048 px and above in bounded memory, equal to the whole pass.

Only the mid block's attention looks at the whole image, and it runs at 1/16
of the resolution: it is computed on the whole map, in chunks of queries. All
other parts are 3x3 convolutions with a bounded reach, so they run on tiles
that carry a halo of neighbouring pixels. The halo is as wide as the reach
and is cropped after each part as far as the next one allows; what remains
equals the untiled result up to rounding. There is no overlap to blend and
there are no seams.

A tile at the image's border is moved inwards, not padded: its outer edge is
the image's own, where zero padding is right, and every other edge lies a
full halo away from what is kept. All tiles have one shape, so one compiled
loop body serves them all.

Shapes: images `x_BHWC` in [-1, 1]; latents `z_BhwZ`, h = H/16, w = W/16.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.models import vae_blocks
from qi2_jax.models.vae import VAE, VAEConfig, denormalise, normalise

# The kept part of a tile, in latents per side (512 px), and the area from
# which on tiles are used; both are ours.
TILE = 32
TILED_PIXELS = 2048 * 2048

DOWN, SAME, UP = Fraction(1, 2), Fraction(1), Fraction(2)


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of the network with a bounded reach.

  Attributes:
    run: `(bound VAE, x) -> x`.
    convs: 3x3 convolutions before the map is resized.
    scale: side of the result over side of the input; a resizing stage ends
      with one more 3x3 convolution, of stride 2 or after doubling.
  """

  run: Callable
  convs: int
  scale: Fraction = SAME

  def reach(self, halo: int) -> int:
    """Input pixels needed beside a tile for `halo` correct ones after it."""
    if self.scale == UP:
      return self.convs + (halo + 2) // 2
    if self.scale == DOWN:
      # Pixel o reads 2o, 2o + 1 and 2o + 2; kept even so that tiles start on
      # the grid of the halved map.
      return self.convs + self.convs % 2 + 2 * (halo + 1)
    return self.convs + halo


def _scale(stages: Sequence[Stage]) -> Fraction:
  return math.prod((s.scale for s in stages), start=SAME)


def halos(stages: Sequence[Stage]) -> tuple[int, ...]:
  """Halo before each stage and after the last one, in pixels there."""
  out = [0]
  for stage in reversed(stages):
    out.append(stage.reach(out[-1]))
  return tuple(reversed(out))


def decoder_stages(config: VAEConfig) -> tuple[Stage, ...]:
  """What follows the decoder's mid block: the levels and the head."""
  last = len(config.dim_mult) - 1
  levels = [
    Stage(
      lambda vae, x, i=i: vae.decoder.level(x, i),
      convs=2 * (config.num_res_blocks + 1), scale=SAME if i == last else UP,
    )
    for i in range(last + 1)
  ]  # fmt: skip
  return (*levels, Stage(lambda vae, x: vae.decoder.tail(x), convs=1))


def encoder_stages(config: VAEConfig) -> tuple[Stage, ...]:
  """What precedes the encoder's mid block: the stem and the levels."""
  last = len(config.dim_mult) - 1
  levels = [
    Stage(
      lambda vae, x, i=i: vae.encoder.level(x, i),
      convs=2 * config.num_res_blocks, scale=SAME if i == last else DOWN,
    )
    for i in range(last + 1)
  ]  # fmt: skip
  return (Stage(lambda vae, x: vae.encoder.stem(x), convs=1), *levels)


def needs_tiling(height: int, width: int) -> bool:
  """Whether an image of this size in pixels is decoded in tiles."""
  return height * width >= TILED_PIXELS


def _one_tile(apply, stages, x_BHWC, tile, start):
  """Runs `stages` on one tile and returns its kept part.

  Args:
    apply: `(run, x) -> x`.
    stages: parts to run.
    x_BHWC: the whole input.
    tile: (height, width) of the kept part on the coarsest grid, i.e. in
      input pixels if the stages enlarge, else in output pixels.
    start: int32 `[2]`, its first row and column on that grid.
  """
  scales = (s.scale for s in stages)
  scales = list(itertools.accumulate(scales, operator.mul, initial=SAME))
  origin, x = np.zeros(2, np.int32), x_BHWC
  for i, halo in enumerate(halos(stages)):
    factor = int(scales[i] / min(scales))
    whole = [int(n * scales[i]) for n in x_BHWC.shape[1:3]]
    size = [min(n * factor + 2 * halo, m) for n, m in zip(tile, whole)]
    room = np.array(whole, np.int32) - np.array(size, np.int32)
    first = jnp.clip(start * factor - halo, 0, room)
    y, c = first - origin
    x = jax.lax.dynamic_slice(x, (0, y, c, 0), (x.shape[0], *size, x.shape[-1]))
    if i < len(stages):
      x = apply(stages[i].run, x)
      step = stages[i].scale
      origin = first * step.numerator // step.denominator
  return x


def _on_tiles(apply, stages, x_BHWC, tile: int):
  """Runs `stages` tile by tile; equals running them on the whole map."""
  batch, *sides, _ = x_BHWC.shape
  scale = _scale(stages)
  grid = [int(n * min(scale, SAME)) for n in sides]
  sizes = [min(tile, n) for n in grid]
  # The last tile may reach past the edge; every slice below moves it inwards.
  places = [range(0, n, size) for n, size in zip(grid, sizes)]
  places = jnp.asarray(list(itertools.product(*places)), jnp.int32)
  run = functools.partial(_one_tile, apply, stages, x_BHWC, sizes)
  factor = int(max(scale, SAME))
  made = jax.eval_shape(run, jax.ShapeDtypeStruct((2,), jnp.int32))
  out = jnp.zeros((batch, *(n * factor for n in grid), made.shape[-1]),
                  made.dtype)  # fmt: skip

  def step(out, start):
    y, x = start * factor
    return jax.lax.dynamic_update_slice(out, run(start), (0, y, x, 0)), None

  return jax.lax.scan(step, out, places)[0]


def _check_tile(tile: int) -> None:
  if tile < 1:
    raise InputError(f"a VAE tile of {tile} latents is empty; use 32 or so.")


@functools.partial(jax.jit, static_argnames=("vae", "tile"))
def tiled_decode(vae: VAE, variables, z_BhwZ, *, tile: int = TILE):
  """`vae.decode` in bounded memory.

  Beside the whole latents, their feature map and the image, only one tile's
  activations exist: for the public decoder its halo is 13 latents at first
  and 1 pixel at last (`halos(decoder_stages(config))`). The batch is not
  split.

  Args:
    vae: the module.
    variables: its variables.
    z_BhwZ: normalised latents.
    tile: latents per side that a tile keeps; larger is faster and bigger.

  Returns:
    Images `[B, H, W, C]` in [-1, 1], fp32.

  Raises:
    InputError: the tile is empty.
  """
  _check_tile(tile)
  config = vae.config

  def stem(vae, z):
    z = denormalise(z, vae.latent_mean.value, vae.latent_std.value)
    return vae.decoder.stem(vae.post_quant_conv(z))

  apply = lambda run, x: vae.apply(variables, x, method=run)  # noqa: E731
  x = _on_tiles(apply, decoder_stages(config), apply(stem, z_BhwZ), tile)
  x = vae_blocks.unpatchify(x, config.patch_size)
  return jnp.clip(x.astype(jnp.float32), -1.0, 1.0)


@functools.partial(jax.jit, static_argnames=("vae", "tile"))
def tiled_encode(vae: VAE, variables, x_BHWC, *, tile: int = TILE):
  """`vae.encode` in bounded memory.

  Levels shrink the map, so each runs on tiles of its own and its whole
  result is kept: the reach of one level is 7 pixels, that of all is 155.

  Args:
    vae: the module.
    variables: its variables.
    x_BHWC: images in [-1, 1], sides divisible by the VAE's factor.
    tile: latents per side that a tile stands for.

  Returns:
    Normalised posterior means `[B, h, w, Z]`.

  Raises:
    InputError: the tile is empty, or the size is no multiple of the factor.
  """
  _check_tile(tile)
  config = vae.config
  height, width = x_BHWC.shape[1:3]
  if height % config.factor or width % config.factor:
    raise InputError(
      f"an image of {height} x {width} px cannot be encoded; both sides must "
      f"be multiples of {config.factor} px."
    )

  def tail(vae, x):
    x = vae.quant_conv(vae.encoder.tail(x))
    mean, _ = jnp.split(x, 2, axis=-1)
    return normalise(mean, vae.latent_mean.value, vae.latent_std.value)

  apply = lambda run, x: vae.apply(variables, x, method=run)  # noqa: E731
  x = vae_blocks.patchify(x_BHWC, config.patch_size)
  stem, first, *rest = encoder_stages(config)
  left = Fraction(1, config.factor // config.patch_size)
  for group in ((stem, first), *((stage,) for stage in rest)):
    left /= _scale(group)
    x = _on_tiles(apply, group, x, int(tile / left))
  return apply(tail, x)


def decode(vae: VAE, variables, z_BhwZ):
  """`vae.decode`, in tiles where the image `needs_tiling`."""
  factor = vae.config.factor
  if needs_tiling(z_BhwZ.shape[1] * factor, z_BhwZ.shape[2] * factor):
    return tiled_decode(vae, variables, z_BhwZ)
  return vae.apply(variables, z_BhwZ, method="decode")


def encode(vae: VAE, variables, x_BHWC):
  """`vae.encode`, in tiles where the image `needs_tiling`."""
  if needs_tiling(*x_BHWC.shape[1:3]):
    return tiled_encode(vae, variables, x_BHWC)
  return vae.apply(variables, x_BHWC, method="encode")
