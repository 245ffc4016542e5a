# SPDX-License-Identifier: Apache-2.0
"""Metrics of decoded pixels.

Transparent images are composited on white first, as a viewer would see them:
the colour under a transparent pixel is arbitrary.

Shapes: H height, W width; C channels.
"""

from typing import Any

import cv2
import imagehash
import numpy as np
from PIL import Image

from data_pipelines.images import on_white

THUMB_SIDE = 8
_BLOCK = 8  # side of a JPEG block
# Steps between JPEG blocks are small; larger ones are edges of the scene.
_MAX_BLOCK_STEP = 24
_FLAT_STEP = 1
_BLACK, _WHITE = 8, 247
# Hashes look at 32 x 32 pixels; much larger images are averaged down first.
_HASH_SIDE = 256
# Edits are compared in cells; smaller ones would show compression.
_CELL_SIDE, _MIN_CELLS, _MAX_CELLS = 8, 8, 64


def quality_metrics(luma: Image.Image) -> dict[str, Any]:
  """Metrics of the grey image.

  Args:
    luma: mode 'L'.

  Returns:
    `entropy`, bits of the grey histogram; `contrast`, standard deviation of
    grey, 0 to 127.5; `sharpness`, variance of the Laplacian; `blockiness`,
    see `blockiness`; `black_share` and `white_share` of nearly black and
    nearly white pixels; `flat_share` of pixels equal to their right
    neighbour; `upright`, see `upright`.
  """
  luma_HW = np.asarray(luma)
  histogram = np.bincount(luma_HW.ravel(), minlength=256) / luma_HW.size
  return {
    "entropy": luma.entropy(),
    "contrast": float(cv2.meanStdDev(luma_HW)[1].item()),
    "sharpness": sharpness(luma_HW),
    "blockiness": blockiness(luma_HW),
    "black_share": float(histogram[:_BLACK].sum()),
    "white_share": float(histogram[_WHITE + 1 :].sum()),
    "flat_share": flat_share(luma_HW),
    "upright": upright(luma_HW),
  }


def flat_share(luma_HW: np.ndarray) -> float:
  """Share of pixels, uint8, that equal their right neighbour, but for a step.

  The last column has no neighbour and counts as flat.
  """
  return 1 - float((_steps(luma_HW) > _FLAT_STEP).sum()) / luma_HW.size


def sharpness(luma_HW: np.ndarray) -> float:
  """Variance of the Laplacian of a grey image, uint8."""
  # 16 bits hold the Laplacian of bytes exactly.
  edges_HW = cv2.Laplacian(luma_HW, cv2.CV_16S)
  return float(cv2.meanStdDev(edges_HW)[1].item() ** 2)


def blockiness(luma_HW: np.ndarray) -> float:
  """How much larger grey steps are across a grid of 8 pixels than elsewhere.

  About 1 for clean images. Every phase of the grid is tried, so that cropping
  after compression does not hide it; saving again at a high quality does not
  either. The weaker direction counts: the grid shows in both, stripes in one.

  Args:
    luma_HW: uint8.

  Returns:
    Largest mean step of a phase over the median of the phases; 1 where a side
    is shorter than four blocks.
  """
  if min(luma_HW.shape) < 4 * _BLOCK:
    return 1.0
  ratios = []
  for grey_HW in (luma_HW, luma_HW.T):
    steps_W = np.minimum(_steps(grey_HW), _MAX_BLOCK_STEP).mean(axis=0)
    phases = np.array([steps_W[p::_BLOCK].mean() for p in range(_BLOCK)])
    # The constant keeps nearly flat images from dividing noise by noise.
    ratios.append((phases.max() + 0.1) / (np.median(phases) + 0.1))
  return float(min(ratios))


def _steps(grey_HW: np.ndarray) -> np.ndarray:
  """[H, W - 1] absolute differences of neighbours in a row, uint8."""
  left_HW, right_HW = grey_HW[:, :-1], grey_HW[:, 1:]
  return np.maximum(left_HW, right_HW) - np.minimum(left_HW, right_HW)


def upright(luma_HW: np.ndarray) -> float:
  """A hint of the content's orientation, -1 to 1.

  Light comes from above in most photographs: grey of the upper third minus
  the lower, less the difference between the sides, in units of the range. It
  is a weak cue, meant for statistics; a classifier's score is the remedy.
  """
  height, width = (max(1, side // 3) for side in luma_HW.shape)
  top, bottom = luma_HW[:height].mean(), luma_HW[-height:].mean()
  left, right = luma_HW[:, :width].mean(), luma_HW[:, -width:].mean()
  return float((top - bottom - abs(left - right)) / 255)


def transparent_share(image: Image.Image) -> float:
  """Mean transparency of an RGB or RGBA image, 0 opaque to 1."""
  if image.mode != "RGBA":
    return 0.0
  return float(1 - np.asarray(image.getchannel("A")).mean() / 255)


def hash_metrics(rgb: Image.Image, luma: Image.Image) -> dict[str, Any]:
  """Fingerprints that survive resizing and recompression.

  Returns:
    `phash` and `dhash`, 64 bits each, first bit highest; `thumb`, the colours
    of 8 x 8 cells, 192 bytes: hashes ignore colour, and agree on most images
    that are nearly flat.
  """
  small = luma.reduce(max(1, min(luma.size) // _HASH_SIDE))
  thumb = rgb.resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX)
  return {
    "phash": _to_int(imagehash.phash(small)),
    "dhash": _to_int(imagehash.dhash(small)),
    "thumb": thumb.tobytes(),
  }


def _to_int(value: imagehash.ImageHash) -> int:
  return int.from_bytes(np.packbits(value.hash).tobytes(), "big")


def edit_metrics(
  target: Image.Image, references: tuple[Image.Image, ...]
) -> dict[str, Any]:
  """How an edited image differs from what it started from.

  Images are averaged to at most 64 x 64 cells of colour on white, and of
  transparency.

  Returns:
    `edit_change`: change of the cell that changed most, 0 to 1, smallest over
    the references: about 0 means that the target is one of them.
    `edit_similarity`: correlation of grey cells, -1 to 1, largest over the
    references: about 0 means that nothing was kept. Both None without
    references.
  """
  if not references:
    return {"edit_change": None, "edit_similarity": None}
  cells = min(target.size) // _CELL_SIDE
  cells = min(max(cells, _MIN_CELLS), _MAX_CELLS)
  end_HWC = _cells(target, cells)
  changes, similarities = [], []
  for reference in references:
    start_HWC = _cells(reference, cells)
    changes.append(np.abs(end_HWC - start_HWC).mean(axis=-1).max())
    similarities.append(_correlation(end_HWC, start_HWC))
  return {
    "edit_change": float(min(changes)),
    "edit_similarity": float(max(similarities)),
  }


def _cells(image: Image.Image, cells: int) -> np.ndarray:
  """[cells, cells, 4] colour on white and transparency, 0 to 1."""
  size = (cells, cells)
  opaque = np.full((*size, 1), 255, np.uint8)
  if image.mode == "RGBA":
    alpha = image.getchannel("A").resize(size, Image.Resampling.BOX)
    opaque = np.asarray(alpha)[..., None]
  rgb = on_white(image).resize(size, Image.Resampling.BOX)
  return np.concatenate([np.asarray(rgb), opaque], axis=-1) / 255


def _correlation(first_HWC: np.ndarray, second_HWC: np.ndarray) -> float:
  grey = [x[..., :3].mean(axis=-1).ravel() for x in (first_HWC, second_HWC)]
  if min(x.std() for x in grey) < 1e-3:  # a flat image resembles nothing
    return 0.0
  return float(np.corrcoef(*grey)[0, 1])
