# SPDX-License-Identifier: Apache-2.0
"""Which kinds of caption suit a record.

Shapes: H height, W width of the grey image.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data_pipelines.caption.kinds import CATEGORIES
from data_pipelines.filters import pixels

# What a category asks for, besides *knowledge* where something is known.
_KINDS = {
  "photo": ("general",),
  "illustration": ("general",),
  "slide": ("general", "text"),
  "poster": ("general", "text"),
  "comic": ("general", "text"),
  "educational": ("general", "text", "structured"),
  "document": ("general", "text"),
  "interface": ("general", "text"),
  "chart": ("text", "structured"),
  "diagram": ("text", "structured"),
}
# Labels of sources and generators that name a category by another word.
_SYNONYMS = {
  "photograph": "photo", "painting": "illustration", "drawing":
  "illustration", "slides": "slide", "infographic": "educational",
  "advertisement": "poster", "page": "document", "table": "document", "ui":
  "interface", "screenshot": "interface", "mockup": "interface", "plot":
  "chart", "graph": "diagram", "flowchart": "diagram",
}  # fmt: skip
COLUMNS = ("text_share", "flat_share", "entropy")
# Ours, from pictures of scikit-image and pages of this project.
_SOME_TEXT, _MUCH_TEXT = 0.04, 0.15
_FLAT, _PLAIN_ENTROPY = 0.6, 6.0
# Text is looked for in images of at most so many pixels a side.
_SIDE = 768
_MIN_GLYPH, _MAX_GLYPH = 5, 96  # height of a line, pixels
_MIN_LINE_ASPECT, _MIN_FILL = 2.0, 0.45
# Steps of grey at a stroke; fine texture has weaker ones of its own.
_STEP_FLAT, _STEP_TEXTURED = 48, 110


@dataclasses.dataclass(frozen=True)
class Route:
  """What to ask for.

  Attributes:
    kinds: of `caption.kinds`, not empty.
    category: for the prompt of *text*.
  """

  kinds: tuple[str, ...]
  category: str


def route(
  columns: Mapping[str, Any],
  allowed: Sequence[str],
  references: int = 0,
  known: bool = False,
) -> Route:
  """Kinds for one record.

  Args:
    columns: `category` if it is known, else the COLUMNS of the target.
    allowed: kinds that may be asked for.
    references: of the record; an edit gets its instruction only.
    known: whether there are notes for *knowledge*.

  Returns:
    The route; without kinds if none of those that suit is allowed.
  """
  category = columns.get("category") or by_columns(columns)
  if references:
    wanted: tuple[str, ...] = ("edit",)
  else:
    wanted = _KINDS[category] + (("knowledge",) if known else ())
  kinds = tuple(kind for kind in wanted if kind in allowed)
  if not kinds and not references and "general" in allowed:
    kinds = ("general",)  # suits every image
  return Route(kinds, category)


def by_columns(columns: Mapping[str, Any]) -> str:
  """The category that measured columns suggest.

  They tell text and flat graphics from photographs, not a slide from a
  poster: what has both counts as 'poster', whose prompt asks for both.
  """
  text, flat, entropy = (columns.get(name) or 0.0 for name in COLUMNS)
  plain = flat >= _FLAT and entropy < _PLAIN_ENTROPY
  if text >= _MUCH_TEXT:
    return "document" if plain else "poster"
  if text >= _SOME_TEXT:
    return "diagram" if plain else "poster"
  return "illustration" if plain else "photo"


def category_of(label: str) -> str:
  """The category that a label such as 'slide_en' names, or ''."""
  for word in re.findall("[a-z]+", label.lower()):
    word = _SYNONYMS.get(word, word)
    if word in CATEGORIES:
      return word
  return ""


def read_category(answer: str) -> str:
  """The category in a captioner's answer to `prompts.classify`, or ''."""
  start, stop = answer.find("{"), answer.rfind("}")
  try:
    value = json.loads(answer[start : stop + 1])["category"]
  except (ValueError, KeyError, TypeError):
    value = answer
  return category_of(str(value))


def measure(rgb: Image.Image) -> dict[str, float]:
  """The COLUMNS of an image."""
  luma = rgb.convert("L")
  luma_HW = np.asarray(luma)
  return {
    "text_share": text_share(luma),
    "flat_share": pixels.flat_share(luma_HW),
    "entropy": luma.entropy(),
  }


def text_share(luma: Image.Image) -> float:
  """Share of an image that looks like lines of text.

  Strokes are strong steps of grey close together. Closing them along a line
  leaves one blob per line, which is wide, full, and dense in edges. This
  finds horizontal lines; vertical ones by turning the image. Faint text on a
  textured ground is missed.

  Args:
    luma: mode 'L'.

  Returns:
    0 to 1, the larger of both directions.
  """
  scale = min(1.0, _SIDE / max(luma.size))
  size = [max(1, round(side * scale)) for side in luma.size]
  luma_HW = np.asarray(luma.resize(size, Image.Resampling.BOX))
  flat = pixels.flat_share(luma_HW) >= _FLAT
  step = _STEP_FLAT if flat else _STEP_TEXTURED
  turned_WH = np.ascontiguousarray(luma_HW.T)
  return max(_lines(luma_HW, step), _lines(turned_WH, step))


def _lines(luma_HW: np.ndarray, step: int) -> float:
  kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
  steps_HW = cv2.morphologyEx(luma_HW, cv2.MORPH_GRADIENT, kernel)
  edges_HW = (steps_HW >= step).astype(np.uint8)
  along = cv2.getStructuringElement(cv2.MORPH_RECT, (13, 1))
  closed_HW = cv2.morphologyEx(edges_HW, cv2.MORPH_CLOSE, along)
  # Frames and long edges are lines of one or two pixels, not of glyphs.
  thick = cv2.getStructuringElement(cv2.MORPH_RECT, (1, 4))
  closed_HW = cv2.morphologyEx(closed_HW, cv2.MORPH_OPEN, thick)
  count, _, boxes, _ = cv2.connectedComponentsWithStats(closed_HW)
  found = 0
  for i in range(1, count):
    _, _, width, height, area = boxes[i]
    if not _MIN_GLYPH <= height <= _MAX_GLYPH:
      continue
    if width < _MIN_LINE_ASPECT * height or area < _MIN_FILL * width * height:
      continue
    found += int(width * height)
  return min(1.0, found / luma_HW.size)
