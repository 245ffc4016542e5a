# SPDX-License-Identifier: Apache-2.0
"""Reads the characters of a flat-coloured line of text.

Template matching against the one font that drew the training data: exact on
clean renders, strict on malformed ones, and no substitute for an independent
OCR engine when text accuracy is reported.
"""

import functools

import numpy as np
from PIL import Image
from scipy import ndimage

from data_pipelines.shapes import colour as colours
from data_pipelines.shapes import fonts, render
from data_pipelines.shapes import vocabulary as vocab

UNREADABLE = "?"

# A glyph is scaled until its ink is _INK_ROWS high, then centred in the patch.
_INK_ROWS = 20
_PATCH = (26, 38)  # rows, columns: fits W, the widest
_MIN_CORRELATION = 0.75
_MIN_INK_PIXELS = 5
# Low resolution moves the measured box by up to half a pixel per side, which
# is about one patch cell; shifts are in cells.
_SCALES = (0.93, 1.0, 1.07)
_SHIFTS = (-1.4, -0.7, 0.0, 0.7, 1.4)


def read_text(image: np.ndarray, colour: str) -> str:
  """Reads the text that is drawn in one colour.

  Args:
    image: uint8 [H, W, 3], sRGB, one line of text on the background.
    colour: key of `vocabulary.COLOURS`; the colour of the text.

  Returns:
    One of `vocabulary.GLYPHS` or UNREADABLE per blot of ink, left to right.
  """
  return "".join(map(_best_glyph, glyph_correlations(image, colour)))


def glyph_correlations(image: np.ndarray, colour: str) -> list[np.ndarray]:
  """How much each blot of ink of one colour looks like each glyph.

  Args:
    image: uint8 [H, W, 3], sRGB, one line of text on the background.
    colour: key of `vocabulary.COLOURS`; the colour of the text.

  Returns:
    From left to right, a correlation in [-1, 1] for each of
    `vocabulary.GLYPHS`; zeros for a blot that is no single glyph.
  """
  ink_HW = _ink(image, colour)
  mask_HW = _without_specks(ink_HW > 0.5)
  runs, _ = ndimage.label(mask_HW.any(axis=0))
  return [
    _correlations(ink_HW[:, columns], mask_HW[:, columns])
    for (columns,) in ndimage.find_objects(runs)
  ]


def _ink(image: np.ndarray, colour: str) -> np.ndarray:
  """Coverage by `colour`: position on the line from background to colour."""
  start = np.array(vocab.BACKGROUND, np.float32)
  line = np.array(vocab.COLOURS[colour], np.float32) - start
  ink_HW = (image - start) @ (line / (line @ line))
  return ink_HW.clip(0, 1)


def _without_specks(mask_HW: np.ndarray) -> np.ndarray:
  height, width = mask_HW.shape
  parts, count = ndimage.label(mask_HW)
  areas = np.bincount(parts.ravel(), minlength=count + 1)
  keep = areas >= _MIN_INK_PIXELS * max(1, height * width / 64**2)
  keep[0] = False
  return keep[parts]


def _best_glyph(correlations: np.ndarray) -> str:
  best = int(correlations.argmax())
  if correlations[best] < _MIN_CORRELATION:
    return UNREADABLE
  return vocab.GLYPHS[best]


def _correlations(ink_HW: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
  """The best correlation with each glyph over its scales and shifts."""
  # Every glyph we draw is one piece; a second one is something extra.
  _, pieces = ndimage.label(mask_HW, np.ones((3, 3)))
  patch = _patch(ink_HW, mask_HW) if pieces == 1 else None
  if patch is None:
    return np.zeros(len(vocab.GLYPHS), np.float32)
  # einsum, because a threaded BLAS spends 8 ms on waking up for this.
  scores = np.einsum("tc,c->t", _templates(), _normalise(patch.ravel()))
  return scores.reshape(len(vocab.GLYPHS), -1).max(axis=1)


def _patch(
  ink_HW: np.ndarray,
  mask_HW: np.ndarray,
  scale: float = 1.0,
  dx: float = 0.0,
  dy: float = 0.0,
) -> np.ndarray | None:
  """Scales and centres the ink; None if the blot is too flat for a glyph."""
  rows, columns = np.nonzero(mask_HW)
  y0, y1 = rows.min(), rows.max() + 1
  x0, x1 = columns.min(), columns.max() + 1
  if x1 - x0 > 2 * (y1 - y0):
    return None
  step = (y1 - y0) / _INK_ROWS / scale  # pixels of the image per patch cell
  margin = 2 * (y1 - y0)
  crop = np.pad(ink_HW[y0:y1, x0:x1], margin)
  x = margin + (x1 - x0) / 2 + dx * step
  y = margin + (y1 - y0) / 2 + dy * step
  half_h, half_w = step * _PATCH[0] / 2, step * _PATCH[1] / 2
  box = (x - half_w, y - half_h, x + half_w, y + half_h)
  size = (_PATCH[1], _PATCH[0])
  return np.asarray(
    Image.fromarray(crop).resize(size, Image.Resampling.BILINEAR, box=box)
  )


def _normalise(vectors: np.ndarray) -> np.ndarray:
  """Zero mean and unit length along the last axis, so products correlate."""
  centred = vectors - vectors.mean(-1, keepdims=True)
  return centred / (np.linalg.norm(centred, axis=-1, keepdims=True) + 1e-6)


@functools.cache
def _templates() -> np.ndarray:
  """All glyphs at all scales and shifts: float32 [36 * 75, cells].

  One matrix product with it replaces the search loop. Drawn about as small as
  the letters of a word at 64x64, because sharper templates tell a blurred S
  from a 5 less well, and large glyphs need no help.
  """
  side, cap = 48, 16
  patches = []
  for char in vocab.GLYPHS:
    ink_HW = render.text_mask(
      char, side, side, side / 2, side / 2, cap, fonts.default_font()
    )
    patches += [
      _patch(ink_HW, ink_HW > 0.5, scale, dx, dy).ravel()
      for scale in _SCALES
      for dx in _SHIFTS
      for dy in _SHIFTS
    ]
  return _normalise(np.stack(patches))


def dominant_colour(labels_HW: np.ndarray) -> str | None:
  """The commonest colour of a label map; None if all is background."""
  counts = np.bincount(labels_HW.ravel(), minlength=len(vocab.COLOURS) + 1)
  counts[colours.BACKGROUND_LABEL] = 0
  return list(vocab.COLOURS)[counts.argmax()] if counts.any() else None
