# SPDX-License-Identifier: Apache-2.0
"""How near an image is to passing the rules, for learning from them.

The checker says right or wrong, and most images of a prompt that is too hard
or too easy get one and the same answer, which teaches nothing. A grade also
tells a blurred square from a circle. It is never reported as a score: the
formulae here are ours, and only the checker decides.
"""

from typing import Any

import numpy as np
from scipy import optimize

from data_pipelines.shapes import checker, reader
from data_pipelines.shapes import colour as colours
from data_pipelines.shapes import vocabulary as vocab

# A colour difference (CIE76) at which nothing is left of the credit; the
# nearest two colours of the palette are 50 apart.
_FAR_DELTA_E = 50.0
# A shape is certain when its IoU is so far above that of every other shape.
_CERTAIN_IOU = 0.12
_CERTAIN_CORRELATION = 0.15
# Beyond the border of the right quadrant, as a fraction of the canvas.
_FAR_PLACE = 0.25


def grade(image: np.ndarray, atoms: dict[str, Any]) -> float:
  """Grades an image against the atoms of an example.

  Args:
    image: uint8 [H, W, 3], sRGB.
    atoms: as documented in `prompts`.

  Returns:
    From 0 (nothing of what was asked for) to 1. Every object or
    character has the mean of its properties; what is missing and what is too
    much count as 0.
  """
  if "text" in atoms:
    return _text_grade(image, atoms)
  wanted = atoms["objects"]
  found = checker.components(colours.palette_labels(image))
  if not wanted or not found:
    return float(not wanted and not found)
  grades = np.array(
    [[_object_grade(image, mask, thing) for _, mask in found]
     for thing in wanted]
  )  # fmt: skip
  rows, columns = optimize.linear_sum_assignment(grades, maximize=True)
  total = grades[rows, columns].sum() / max(len(wanted), len(found))
  if "relation" not in atoms:
    return float(total)
  masks = [found[column][1] for column in columns]
  return float((2 * total + _relation_grade(masks, atoms["relation"])) / 3)


def _object_grade(image: np.ndarray, mask_HW: np.ndarray, thing: dict) -> float:
  """Mean of colour, shape and, where asked for, place of one component."""
  grades = [_colour_grade(image[mask_HW], thing["colour"])]
  ious = checker.shape_ious(mask_HW)
  grades.append(_certainty(ious, thing["shape"], _CERTAIN_IOU))
  if "place" in thing:
    height, width = mask_HW.shape
    x, y = checker.centroid(mask_HW)
    grades.append(_place_grade(x / width, y / height, thing["place"]))
  return float(np.mean(grades))


def _colour_grade(pixels_NC: np.ndarray, colour: str) -> float:
  """Falls from 1 to 0 with the mean difference to the named colour."""
  wanted = np.array(vocab.COLOURS[colour], np.uint8)
  difference = colours.delta_e(pixels_NC, wanted[None])
  return max(0.0, 1.0 - float(difference.mean()) / _FAR_DELTA_E)


def _certainty(values: dict[str, float], wanted: str, certain: float) -> float:
  """How good the wanted one is, and how far ahead of every other."""
  other = max(value for name, value in values.items() if name != wanted)
  ahead = 0.5 + 0.5 * (values[wanted] - other) / certain
  return 0.5 * (max(values[wanted], 0.0) + float(np.clip(ahead, 0.0, 1.0)))


def _place_grade(x: float, y: float, place: str) -> float:
  """1 inside the right quadrant, falling outside of it."""
  centre = vocab.PLACES[place]
  outside = [
    max(0.0, (0.5 - at) if middle > 0.5 else (at - 0.5))
    for at, middle in zip((x, y), centre)
  ]
  return max(0.0, 1.0 - float(np.hypot(*outside)) / _FAR_PLACE)


def _relation_grade(masks: list[np.ndarray], relation: str) -> float:
  """Rises from 0 to 1 with the distance along the axis that was asked for."""
  if len(masks) < 2:
    return 0.0
  height, width = masks[0].shape
  (x0, y0), (x1, y1) = map(checker.centroid, masks)
  dx, dy = (x1 - x0) / width, (y1 - y0) / height
  along, across = {
    "left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx),
    "below": (-dy, dx),
  }[relation]  # fmt: skip
  return float(np.clip(0.5 + 2.0 * (along - abs(across)), 0.0, 1.0))


def _text_grade(image: np.ndarray, atoms: dict[str, Any]) -> float:
  """Half for the colour of the ink, half for its characters in order."""
  labels_HW = colours.palette_labels(image)
  ink_HW = labels_HW != colours.BACKGROUND_LABEL
  if not ink_HW.any():
    return 0.0
  colour = _colour_grade(image[ink_HW], atoms["colour"])
  blots = reader.glyph_correlations(image, reader.dominant_colour(labels_HW))
  grades = [
    _certainty(
      dict(zip(vocab.GLYPHS, blot.tolist())), char, _CERTAIN_CORRELATION
    )
    for blot, char in zip(blots, atoms["text"])
  ]
  count = max(len(blots), len(atoms["text"]))
  return 0.5 * colour + 0.5 * float(sum(grades)) / count


def grade_edit(
  source: np.ndarray, target: np.ndarray, result: np.ndarray
) -> float:
  """Grades an edit for which the one right result is known.

  Args:
    source: uint8 [H, W, 3], before the edit.
    target: uint8 [H, W, 3], the right result.
    result: uint8 [H, W, 3], what the model made.

  Returns:
    In [0, 1], the mean of two: how close pixels are to the target, and how
    well components of one colour lie on those of the target. Pixels alone
    would reward a pale blot that is nowhere quite wrong.

  Raises:
    InputError: see `checker.changed_pixels`.
  """
  changed = checker.changed_pixels(source, target)
  near = 1.0 - colours.delta_e(result, target) / _FAR_DELTA_E
  near = near.clip(0.0, 1.0)
  kept = near[~changed].mean() if not changed.all() else 1.0
  pixels = float(np.sqrt(near[changed].mean() * kept))
  return 0.5 * (pixels + _overlap_grade(target, result))


def _overlap_grade(target: np.ndarray, result: np.ndarray) -> float:
  """IoU of components of equal colour, what is missing or extra counts 0."""
  wanted, found = (
    checker.components(colours.palette_labels(image))
    for image in (target, result)
  )
  if not wanted or not found:
    return float(len(wanted) == len(found))
  ious = np.array(
    [[_iou(mask, other) if name == colour else 0.0 for name, other in found]
     for colour, mask in wanted]
  )  # fmt: skip
  rows, columns = optimize.linear_sum_assignment(ious, maximize=True)
  return float(ious[rows, columns].sum()) / max(len(wanted), len(found))


def _iou(mask_HW: np.ndarray, other_HW: np.ndarray) -> float:
  return (mask_HW & other_HW).sum() / (mask_HW | other_HW).sum()
