# SPDX-License-Identifier: Apache-2.0
"""Reconstructions of a VAE and their figures, image by image.

The protocol is that of OmniDoc-TokenBench, which the VAE report uses: the
posterior mode is decoded in fp32, clamped and rounded to uint8 before
anything is measured, on RGB over white; a table shows means over images.

Shapes: images are uint8 `[H, W, C]`, B of one shape at a time.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.conditioning.conditioner import to_uint8, to_unit
from qi2_jax.evaluation import image_metrics
from qi2_jax.evaluation.images import flatten
from qi2_jax.models import vae_tiling
from qi2_jax.models.lpips import LPIPS
from qi2_jax.models.vae import VAE

Image = np.ndarray
Reconstruct = Callable[[Sequence[Image]], list[Image]]
FIGURES = ("psnr", "ssim", "lpips", "ned")


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image to reconstruct.

  Attributes:
    name: unique; what the table of samples calls it.
    pixels: uint8 `[H, W, 3|4]`.
  """

  name: str
  pixels: Image


@dataclasses.dataclass(frozen=True)
class Scored:
  """One reconstruction.

  Attributes:
    name: of the picture.
    original: uint8 RGB over white.
    reconstruction: likewise.
    figures: of `FIGURES`; what could not be measured is left out.
    texts: what was read in original and reconstruction, if anything was.
  """

  name: str
  original: Image
  reconstruction: Image
  figures: dict[str, float]
  texts: tuple[str, str] | None


def batches(
  pictures: Iterable[Picture], size: int
) -> Iterator[list[Picture]]:  # fmt: skip
  """Groups of at most `size` pictures of one shape, in order of filling."""
  waiting: dict[tuple[int, ...], list[Picture]] = {}
  for picture in pictures:
    group = waiting.setdefault(picture.pixels.shape[:2], [])
    group.append(picture)
    if len(group) == size:
      yield waiting.pop(picture.pixels.shape[:2])
  yield from waiting.values()


def padded(images: Sequence[Image], factor: int, channels: int) -> np.ndarray:
  """One batch whose sides are multiples of `factor`: `[B, H', W', C]`.

  Edges are repeated to the right and below. RGB gets an opaque alpha where
  the VAE has one; RGBA is laid over white where it has none.
  """
  out = []
  for image in images:
    if channels == 3:
      image = flatten(image)
    elif image.shape[-1] == 3:
      alpha = np.full((*image.shape[:2], 1), 255, np.uint8)
      image = np.concatenate([image, alpha], axis=-1)
    out.append(image)
  batch = np.stack(out)
  down, right = (-side % factor for side in batch.shape[1:3])
  return np.pad(batch, ((0, 0), (0, down), (0, right), (0, 0)), mode="edge")


def reconstructor(module: VAE, variables) -> Reconstruct:
  """A VAE as a function from images of one shape to images."""
  config = dataclasses.replace(module.config, dtype=jnp.float32)
  exact = VAE(config)

  @jax.jit
  def run(variables, x_BHWC):
    latents = vae_tiling.encode(exact, variables, to_unit(x_BHWC))
    return vae_tiling.decode(exact, variables, latents)

  def reconstruct(images):
    height, width = images[0].shape[:2]
    batch = padded(images, config.factor, config.image_channels)
    out = to_uint8(np.asarray(run(variables, batch)))
    return [flatten(image[:height, :width]) for image in out]

  return reconstruct


def perceptual(model: LPIPS, params) -> Callable:
  """LPIPS of two lists of RGB images of one shape: list of floats."""

  @jax.jit
  def distance(params, a_BHWC, b_BHWC):
    return model.apply({"params": params}, to_unit(a_BHWC), to_unit(b_BHWC))

  def measure(a, b):
    return np.asarray(distance(params, np.stack(a), np.stack(b))).tolist()

  return measure


def score(
  group: Sequence[Picture], reconstruct: Reconstruct,
  distance: Callable | None = None, read: Callable | None = None,
) -> list[Scored]:  # fmt: skip
  """Reconstructs and measures pictures of one shape.

  Args:
    group: B pictures.
    reconstruct: the model.
    distance: see `perceptual`.
    read: image -> text. The text of the original is the reference, so that
      what the reader gets wrong counts in both.
  """
  originals = [flatten(picture.pixels) for picture in group]
  outs = reconstruct([picture.pixels for picture in group])
  distances = distance(originals, outs) if distance else [None] * len(group)
  scored = []
  for picture, a, b, lpips in zip(group, originals, outs, distances):
    texts = (read(a), read(b)) if read else None
    figures = {
      "psnr": image_metrics.psnr(a, b),
      "ssim": image_metrics.ssim(a, b),
      "lpips": lpips,
      "ned": image_metrics.text_similarity(*texts) if texts else None,
    }
    known = {k: v for k, v in figures.items() if v is not None}
    scored.append(Scored(picture.name, a, b, known, texts))
  return scored


def summary(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
  """Mean, 95 % half-width and count of each figure.

  A PSNR without an error is infinite and left out of the mean, as in the
  protocol; the count says so.

  Args:
    rows: `Scored.figures` of all images.
  """
  out = {}
  for name in FIGURES:
    values = [r[name] for r in rows if name in r and math.isfinite(r[name])]
    if values:
      spread = statistics.stdev(values) if len(values) > 1 else 0.0
      out[name] = {
        "mean": statistics.fmean(values),
        "half_width": 1.96 * spread / math.sqrt(len(values)),
        "n": len(values),
      }
  return out


def worst(scored: Sequence[Scored], count: int) -> list[Scored]:
  """The `count` reconstructions of the lowest PSNR, worst first."""
  return sorted(scored, key=lambda s: s.figures["psnr"])[:count]
