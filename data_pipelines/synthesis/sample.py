# SPDX-License-Identifier: Apache-2.0
"""What a strategy hands back: an image with its exact text, or a refusal."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import Language

Box = tuple[float, float, float, float]
NO_ROOM = "text has no room"
Polygon = Sequence[Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Sample:
  """One image and everything that is known about its text.

  Attributes:
    image: RGB or RGBA.
    text: every line in reading order, joined by newlines.
    caption: asks for the image; quotes the text.
    kind: label for statistics, 'text-<strategy>-<language>'.
    layout: see `layout_of`; plain JSON.
  """

  image: Image.Image
  text: str
  caption: str
  kind: str
  layout: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A sample that must not be drawn.

  Attributes:
    reason: a short phrase, the same for every sample of its sort, to count by.
  """

  reason: str


@dataclasses.dataclass(frozen=True)
class TextBlock:
  """Lines that belong together.

  Attributes:
    role: 'title', 'body', 'cell', 'label', ...
    lines: (text, polygon) of every line as drawn, in reading order; a polygon
      has 4 corners (x, y), from the start of the line's top edge clockwise.
    text: before it was broken into lines; empty: `joined` of them.
  """

  role: str
  lines: tuple[tuple[str, Polygon], ...]
  text: str = ""


def polygon_of(box: Box) -> list[list[float]]:
  """The corners of (left, top, right, bottom)."""
  left, top, right, bottom = box
  return [[left, top], [right, top], [right, bottom], [left, bottom]]


def joined(lines: Iterable[str], language: Language) -> str:
  """Broken lines as one text again."""
  return (" " if language.spaces else "").join(lines)


def layout_of(
  strategy: str, language: Language, size: tuple[int, int],
  faces: Iterable[Face], blocks: Sequence[TextBlock], background: str,
) -> dict[str, Any]:  # fmt: skip
  """The record of what was drawn where, as plain JSON.

  Args:
    strategy: 'pure', 'composed' or 'template'.
    language: of the text.
    size: (width, height) of the image.
    faces: that drew the text.
    blocks: in reading order.
    background: in a few words.

  Returns:
    `{"strategy", "language", "size": [w, h], "fonts": [{"file", "index",
    "sha256"}], "lines": [{"text", "polygon", "block"}], "blocks": [{"role",
    "text", "lines": [numbers of lines]}], "background"}`, pixels to 0.1.
  """
  lines, groups = [], []
  for number, block in enumerate(blocks):
    start = len(lines)
    for text, polygon in block.lines:
      corners = [[round(float(v), 1) for v in corner] for corner in polygon]
      lines.append({"text": text, "polygon": corners, "block": number})
    text = block.text or joined((text for text, _ in block.lines), language)
    numbers = list(range(start, len(lines)))
    groups.append({"role": block.role, "text": text, "lines": numbers})
  fonts = {
    (face.path, face.index): {
      "file": face.file, "index": face.index, "sha256": face.sha256,
    }
    for face in faces
  }  # fmt: skip
  return {
    "strategy": strategy,
    "language": language.code,
    "size": [int(v) for v in size],
    "fonts": list(fonts.values()),
    "lines": lines,
    "blocks": groups,
    "background": background,
  }


def text_of(layout: dict[str, Any]) -> str:
  """Every line in reading order, joined by newlines."""
  return "\n".join(line["text"] for line in layout["lines"])
