# SPDX-License-Identifier: Apache-2.0
"""Draws a page of small text: document, slide or text over a picture.

Glyphs are 5 to 20 px per em, as in the synthetic text of the VAE report
(arXiv 2605.13565); everything else here is ours.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data_pipelines.shapes.fonts import font_at
from data_pipelines.synthesis import words
from data_pipelines.synthesis.languages import LANGUAGES

KINDS = ("document", "slide", "overlay")
SMALLEST, LARGEST = 5, 20
Ink = tuple[int, int, int]


@dataclasses.dataclass
class Page:
  """A canvas that is written from the top, and what was written.

  Attributes:
    image: the canvas.
    lines: of text, as drawn.
  """

  image: Image.Image
  lines: list[str] = dataclasses.field(default_factory=list)


def draw(
  kind: str, language: str, size: tuple[int, int], fonts: tuple[str, ...],
  rng: np.random.Generator,
) -> tuple[np.ndarray, str]:  # fmt: skip
  """One page.

  Args:
    kind: one of `KINDS`.
    language: 'en' or 'zh'.
    size: (width, height).
    fonts: paths to choose from.
    rng: decides everything else.

  Returns:
    uint8 RGB `[H, W, 3]` and its text, a line per line.
  """
  make = {"document": _document, "slide": _slide, "overlay": _overlay}[kind]
  font = str(rng.choice(fonts))
  page = make(size, language, font, rng)
  return np.array(page.image), "\n".join(page.lines)


def wrap(
  text: str, font: ImageFont.FreeTypeFont, width: float, language: str
) -> list[str]:
  """Breaks text into lines at most `width` px wide; a long word is left out."""
  pieces = list(text) if language == "zh" else text.split(" ")
  between = "" if language == "zh" else " "
  lines, line = [], ""
  for piece in pieces:
    longer = f"{line}{between}{piece}" if line else piece
    if font.getlength(longer) <= width:
      line = longer
      continue
    if line:
      lines.append(line)
    line = piece if font.getlength(piece) <= width else ""
  return [*lines, line] if line else lines


def _write(
  page: Page, text: str, font: ImageFont.FreeTypeFont, ink: Ink,
  box: tuple[float, float, float, float], language: str, leading: float = 1.25,
) -> float:  # fmt: skip
  """Writes text from the top of a box, as far as it goes; the next y."""
  left, y, right, bottom = box
  pen = ImageDraw.Draw(page.image)
  for line in wrap(text, font, right - left, language):
    if y + font.size > bottom:
      break
    pen.text((left, y), line, font=font, fill=ink)
    page.lines.append(line)
    y += round(font.size * leading)
  return y


def _sentence(rng, language: str) -> str:
  return words.sentence(rng, LANGUAGES[language])


def _heading(rng, language: str) -> str:
  return words.heading(rng, LANGUAGES[language])


def _pixels(rng, low: int = SMALLEST, high: int = LARGEST) -> int:
  return int(rng.integers(low, high + 1))


def _dark(rng) -> Ink:
  return tuple(int(v) for v in rng.integers(0, 90, 3))


def _light(rng) -> Ink:
  return tuple(int(v) for v in rng.integers(215, 256, 3))


def _fill(
  page: Page, box, font_path: str, pixels: int, ink: Ink, language, rng
) -> None:
  """Paragraphs until the box is full."""
  left, y, right, bottom = box
  font = font_at(font_path, pixels)
  while y + pixels <= bottom:
    count = int(rng.integers(2, 5))
    between = "" if language == "zh" else " "
    text = between.join(_sentence(rng, language) for _ in range(count))
    end = _write(page, text, font, ink, (left, y, right, bottom), language)
    y = max(end, y + pixels) + pixels // 2


def _document(size, language, font, rng) -> Page:
  """Dark on light: a heading and one or two columns."""
  width, height = size
  page = Page(Image.new("RGB", size, _light(rng)))
  margin, pixels = max(4, width // 24), _pixels(rng, high=14)
  ink = _dark(rng)
  top = _write(
    page, _heading(rng, language), font_at(font, min(LARGEST, 2 * pixels)),
    ink, (margin, margin, width - margin, height - margin), language,
  )  # fmt: skip
  columns = int(rng.integers(1, 3)) if width >= 20 * pixels else 1
  step = (width - margin) / columns
  for i in range(columns):
    left = margin + i * step
    box = (left, top + pixels // 2, left + step - margin, height - margin)
    _fill(page, box, font, pixels, ink, language, rng)
  return page


def _slide(size, language, font, rng) -> Page:
  """A coloured title bar, and points in larger letters."""
  width, height = size
  dark = bool(rng.integers(2))
  paper, ink = (_dark(rng), _light(rng)) if dark else (_light(rng), _dark(rng))
  page = Page(Image.new("RGB", size, paper))
  pixels, margin = _pixels(rng, 8), max(4, width // 16)
  bar = 2 * LARGEST
  colour = tuple(int(v) for v in rng.integers(40, 200, 3))
  ImageDraw.Draw(page.image).rectangle((0, 0, width, bar), fill=colour)
  title = font_at(font, LARGEST)
  white, box = (255, 255, 255), (margin, LARGEST // 2, width - margin, bar)
  _write(page, _heading(rng, language), title, white, box, language)
  y = bar + pixels
  while y + pixels <= height - margin:
    pen = ImageDraw.Draw(page.image)
    side = max(2, pixels // 3)
    pen.ellipse((margin, y + side, margin + side, y + 2 * side), fill=colour)
    text = _sentence(rng, language)
    box = (margin + pixels, y, width - margin, height - margin)
    end = _write(page, text, font_at(font, pixels), ink, box, language)
    y = max(end, y + pixels) + pixels // 2
  return page


def _overlay(size, language, font, rng) -> Page:
  """Text straight on a picture of soft colours, in one or more blocks."""
  width, height = size
  coarse = rng.integers(0, 256, (int(rng.integers(2, 8)),) * 2 + (3,), np.uint8)
  picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
  picture = picture.filter(ImageFilter.GaussianBlur(1))
  page = Page(picture)
  margin, y = max(4, width // 24), max(4, height // 24)
  while y < height - margin - SMALLEST:
    pixels = _pixels(rng)
    end = min(height - margin, y + pixels * float(rng.uniform(3, 8)))
    window = (margin, int(y), width - margin, max(int(end), int(y) + 1))
    # Whichever of the two stands out from what is behind the block.
    bright = np.asarray(picture.crop(window)).mean() > 127
    ink = _dark(rng) if bright else _light(rng)
    _fill(page, window, font, pixels, ink, language, rng)
    y = end + pixels
  return page
