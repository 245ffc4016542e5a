# SPDX-License-Identifier: Apache-2.0
"""Exact rule-based test of generated and edited images.

Pixels -> nearest palette colour -> 3x3 vote -> connected components -> shape
by mask IoU; text by correlation with the font (`reader`). Everything that the
atoms do not mention must be absent.
"""

import collections
import dataclasses
import functools
import math
from typing import Any

import numpy as np
from scipy import ndimage

from data_pipelines.errors import InputError
from data_pipelines.shapes import colour as colours
from data_pipelines.shapes import reader, render
from data_pipelines.shapes import vocabulary as vocab

# Smaller components are noise; at 64x64, and in proportion elsewhere.
_MIN_AREA = 14
# Clean renders reach 0.88, strongly blurred ones 0.80.
_MIN_IOU = 0.7
# The fullest scene covers 31 %. Without this limit, an all-red canvas would
# be "a red square".
_MAX_COVERED = 0.5
_MAX_DELTA_E = 10.0


@dataclasses.dataclass(frozen=True)
class Found:
  """One object seen in an image; x and y in pixels."""

  colour: str
  shape: str
  place: str
  x: float
  y: float


def check(image: np.ndarray, atoms: dict[str, Any]) -> dict[str, bool]:
  """Tests an image against the atoms of an example.

  Args:
    image: uint8 [H, W, 3], sRGB.
    atoms: as documented in `prompts`.

  Returns:
    One entry per atom and their conjunction 'all'. Objects give 'count' (so
    many and no more, on a background), 'colour', 'shape', where asked 'place'
    and 'relation', and 'binding': the properties sit together on the right
    objects. Text gives 'count' (nothing else is visible), 'colour' and 'text'.

  Raises:
    InputError: for an image of another shape or type, or a relation between
      other than two objects.
  """
  _require_image(image)
  labels_HW = colours.palette_labels(image)
  if "text" in atoms:
    result = _check_text(image, labels_HW, atoms)
  else:
    result = _check_objects(labels_HW, atoms)
  covered = np.mean(labels_HW != colours.BACKGROUND_LABEL)
  result["count"] &= bool(covered <= _MAX_COVERED)
  result["all"] = all(result.values())
  return result


def find_objects(image: np.ndarray) -> list[Found]:
  """Lists the coloured components of an image with their best shapes.

  Args:
    image: uint8 [H, W, 3], sRGB.

  Returns:
    One entry per component; `shape` is '' where none fits.
  """
  return _find(colours.palette_labels(image))


def _find(labels_HW: np.ndarray) -> list[Found]:
  return [_identify(*component) for component in components(labels_HW)]


def edit_scores(
  source: np.ndarray, target: np.ndarray, result: np.ndarray
) -> tuple[float, float, float]:
  """Scores an edit for which the one right result is known.

  Args:
    source: uint8 [H, W, 3], before the edit.
    target: uint8 [H, W, 3], the right result.
    result: uint8 [H, W, 3], what the model made.

  Returns:
    (E, P, O). E: the share of pixels within CIE76 dE 10 of the target among
    those that had to change (source and target differ by more than 10). P:
    the same among all others. O = sqrt(E * P).

  Raises:
    InputError: if the images differ in size, or source and target agree.
  """
  _require_image(result)
  if result.shape != source.shape:
    raise InputError(
      f"Source and result differ in shape ({source.shape} and "
      f"{result.shape}); resize the result before scoring it."
    )
  changed = changed_pixels(source, target)
  right = colours.delta_e(result, target) <= _MAX_DELTA_E
  e = float(right[changed].mean())
  p = float(right[~changed].mean()) if not changed.all() else 1.0
  return e, p, math.sqrt(e * p)


def changed_pixels(source: np.ndarray, target: np.ndarray) -> np.ndarray:
  """Pixels that an edit had to change: bool [H, W].

  Args:
    source: uint8 [H, W, 3], before the edit.
    target: uint8 [H, W, 3], the right result.

  Raises:
    InputError: the images differ in size, or in nothing visible.
  """
  for image in (source, target):
    _require_image(image)
  if target.shape != source.shape:
    raise InputError(
      f"Source and target differ in shape ({source.shape} and "
      f"{target.shape}); an edit keeps the size."
    )
  changed = colours.delta_e(source, target) > _MAX_DELTA_E
  if not changed.any():
    raise InputError(
      "Source and target show no visible difference; an edit needs one."
    )
  return changed


def _require_image(image: np.ndarray):
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise InputError(
      f"Expected a uint8 image [H, W, 3] but got {image.dtype} "
      f"{list(image.shape)}; convert it first."
    )


def _check_objects(
  labels_HW: np.ndarray, atoms: dict[str, Any]
) -> dict[str, bool]:
  wanted, found = atoms["objects"], _find(labels_HW)
  fields = ["colour", "shape"]
  if wanted and all("place" in thing for thing in wanted):
    fields.append("place")
  result = {"count": len(found) == len(wanted)}
  for field in fields:
    result[field] = _tally(found, [field]) == _tally(wanted, [field])
  result["binding"] = _tally(found, fields) == _tally(wanted, fields)
  if "relation" in atoms:
    result["relation"] = _related(found, wanted, atoms["relation"])
  return result


def _tally(things: list, fields: list[str]) -> collections.Counter:
  records = [t if isinstance(t, dict) else vars(t) for t in things]
  return collections.Counter(tuple(r[f] for f in fields) for r in records)


def _related(found: list[Found], wanted: list[dict], relation: str) -> bool:
  """Whether first and second stand as asked, more so than crosswise."""
  if len(wanted) != 2:
    raise InputError(
      f"The relation {relation!r} has {len(wanted)} objects; give two."
    )
  pair = [
    next(
      (
        f
        for f in found
        if (f.colour, f.shape) == (thing["colour"], thing["shape"])
      ),
      None,
    )
    for thing in wanted
  ]
  if None in pair:
    return False
  dx, dy = pair[1].x - pair[0].x, pair[1].y - pair[0].y
  along, across = {
    "left of": (dx, dy),
    "right of": (-dx, dy),
    "above": (dy, dx),
    "below": (-dy, dx),
  }[relation]
  return along > abs(across)


def _check_text(
  image: np.ndarray, labels_HW: np.ndarray, atoms: dict[str, Any]
) -> dict[str, bool]:
  colour = reader.dominant_colour(labels_HW)
  others = {name for name, _ in components(labels_HW)} - {colour}
  text = reader.read_text(image, colour) if colour else ""
  return {
    "count": not others,
    "colour": colour == atoms["colour"],
    "text": text == atoms["text"],
  }


def components(labels_HW: np.ndarray) -> list[tuple[str, np.ndarray]]:
  """Colour and boolean mask [H, W] of every component that is no speck."""
  min_area = _MIN_AREA * labels_HW.size / 64**2
  counts = np.bincount(labels_HW.ravel(), minlength=len(vocab.COLOURS) + 1)
  components = []
  for label, colour in enumerate(vocab.COLOURS):
    if counts[label] < min_area:
      continue
    parts_HW, _ = ndimage.label(labels_HW == label)
    areas = np.bincount(parts_HW.ravel())
    components += [
      (colour, parts_HW == part)
      for part in range(1, len(areas))
      if areas[part] >= min_area
    ]
  return components


def _identify(colour: str, mask_HW: np.ndarray) -> Found:
  x, y = centroid(mask_HW)
  ious = shape_ious(mask_HW)
  shape = max(ious, key=ious.get)
  height, width = mask_HW.shape
  return Found(
    colour=colour,
    shape=shape if ious[shape] >= _MIN_IOU else "",
    place=vocab.place_of(x / width, y / height),
    x=x,
    y=y,
  )


def centroid(mask_HW: np.ndarray) -> tuple[float, float]:
  """Mean (x, y) of the true pixels, in pixels."""
  rows, columns = np.nonzero(mask_HW)
  return columns.mean() + 0.5, rows.mean() + 0.5


def shape_ious(mask_HW: np.ndarray) -> dict[str, float]:
  """IoU of a mask with each shape of the same area and centroid.

  Moments, not the bounding box, because one stray pixel moves a box.
  """
  return dict(_shape_ious(mask_HW.tobytes(), mask_HW.shape))


# An image that is both checked and graded asks twice.
@functools.lru_cache(maxsize=4096)
def _shape_ious(pixels: bytes, size: tuple[int, int]):
  mask_HW = np.frombuffer(pixels, bool).reshape(size)
  height, width = size
  x, y = centroid(mask_HW)
  ious = []
  for shape in vocab.SHAPES:
    unit_area, unit_v = render.shape_moments(shape)
    radius = math.sqrt(mask_HW.sum() / unit_area)
    ideal_HW = render.shape_mask(
      shape, width, height, x, y - unit_v * radius, 2 * radius
    )
    ideal_HW = ideal_HW > 0.5
    iou = (ideal_HW & mask_HW).sum() / (ideal_HW | mask_HW).sum()
    ious.append((shape, iou))
  return tuple(ious)
