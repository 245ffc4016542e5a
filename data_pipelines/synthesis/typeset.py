# SPDX-License-Identifier: Apache-2.0
"""A block of text as pixels, with the box of the ink of every line.

Pillow with raqm shapes it (HarfBuzz) and orders it (bidirectional). Lines are
in reading order: from top to bottom, columns from right to left.
"""

import dataclasses
import functools
import math

from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from data_pipelines.errors import InputError
from data_pipelines.synthesis import shaping
from data_pipelines.synthesis.breaking import break_lines
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import Language

ALIGNMENTS = ("start", "center", "end")
Ink = tuple[int, int, int]
# Share of the free room that is left (above) of a line, by (alignment, rtl).
_START = {
  ("start", False): 0.0, ("center", False): 0.5, ("end", False): 1.0,
  ("start", True): 1.0, ("center", True): 0.5, ("end", True): 0.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Line:
  """One line as drawn.

  Attributes:
    text: in logical order.
    box: (left, top, right, bottom) of its ink, in pixels of the block; holds
      all of it.
  """

  text: str
  box: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Block:
  """Text on nothing.

  Attributes:
    image: RGBA; transparent but for the ink.
    lines: in reading order.
    complete: whether all of the text is there.
  """

  image: Image.Image
  lines: tuple[Line, ...]
  complete: bool

  @property
  def box(self) -> tuple[int, int, int, int]:
    """Around the ink of all lines."""
    boxes = [line.box for line in self.lines] or [(0, 0, 0, 0)]
    left, top, right, bottom = zip(*boxes)
    return min(left), min(top), max(right), max(bottom)


@functools.lru_cache(maxsize=256)
def font_of(face: Face, pixels: int) -> ImageFont.FreeTypeFont:
  """The face at so many pixels per em, shaped by raqm.

  Raises:
    InputError: the font is unreadable, or Pillow was built without raqm.
  """
  if not features.check_feature("raqm"):
    raise InputError(
      "Pillow was built without raqm and would draw Arabic and Hindi wrongly; "
      "install Pillow's own wheel, which has it (on Linux with fribidi)."
    )
  try:
    return ImageFont.truetype(
      face.path, pixels, face.index, layout_engine=ImageFont.Layout.RAQM
    )
  except OSError as error:
    raise InputError(
      f"Font {face.path} cannot be read ({error}); give a TrueType or OpenType "
      "file with outlines."
    ) from error


def block(
  text: str, face: Face, language: Language, pixels: int, ink: Ink,
  width: int, height: int, align: str = "start", leading: float = 1.3,
) -> Block:  # fmt: skip
  """Sets text into a box.

  Args:
    text: paragraphs, separated by newlines, that the face can draw (see
      `coverage.unrenderable`).
    face: of the font.
    language: decides direction, regional forms and where lines break.
    pixels: per em.
    ink: colour.
    width: of the box and of the image.
    height: of the box and of the image.
    align: one of `ALIGNMENTS`; 'start' is the right for Arabic and the top of
      a column.
    leading: from one line to the next, in em; more where ink would touch.

  Raises:
    InputError: see `font_of`.
  """
  lines, complete = _lines(text, face, language, pixels, width, height)
  canvas = Image.new("L", (width, height))
  place = _place_column if language.direction == "ttb" else _place_row
  placed: list[Line] = []
  end, gap = None, 1.0
  for line in lines:
    if not line:  # half a line apart
      gap = 1.5
      continue
    strip, ink_box, length = _strip(line, face, language, pixels)
    start = _START[align, language.direction == "rtl"]
    end, spot = place(
      end, ink_box, length, (width, height), start, gap * leading * pixels
    )
    if spot is None:
      complete = False
      break
    # Where letters of two lines come close, none erases the other.
    canvas.paste(ImageChops.lighter(canvas.crop(spot), strip), spot)
    placed.append(Line(line, spot))
    gap = 1.0
  image = Image.new("RGBA", (width, height), (*ink, 0))
  image.putalpha(canvas)
  return Block(image, tuple(placed), complete and bool(placed))


def fitting(
  text: str, face: Face, language: Language, sizes: tuple[int, int],
  width: int, height: int, leading: float = 1.3,
) -> int | None:  # fmt: skip
  """The largest size at which a block has room for all of a text.

  Letters are measured and not drawn, so a block of that size may still turn
  out incomplete, by a pixel.

  Args:
    text: see `block`.
    face: see `block`.
    language: see `block`.
    sizes: smallest and largest pixels per em.
    width: see `block`.
    height: see `block`.
    leading: see `block`.

  Returns:
    Pixels per em, or None if even the smallest does not fit.
  """
  smallest, largest = sizes
  extent = width if language.direction == "ttb" else height

  def fits(pixels: int) -> bool:
    lines, complete = _estimated_lines(
      text, face, language, pixels, width, height
    )
    cross = _cross(face, language, pixels)
    pitch = max(leading * pixels, cross)
    return complete and (len(lines) - 1) * pitch + cross <= extent

  if smallest > largest or not fits(smallest):
    return None
  while smallest < largest:
    middle = (smallest + largest + 1) // 2
    if fits(middle):
      smallest = middle
    else:
      largest = middle - 1
  return smallest


def _estimated_lines(text, face, language: Language, pixels, width, height):
  """The lines by what their pieces measure."""
  return break_lines(
    text, language, lambda piece: shaping.advance(piece, face, language),
    _room(language, width, height) / pixels,
  )  # fmt: skip


def _lines(text, face, language: Language, pixels, width, height):
  """The lines as they will be drawn: at small sizes hinting widens letters."""
  room = _room(language, width, height)
  return break_lines(
    text, language, lambda piece: shaping.advance(piece, face, language),
    room / pixels,
    lambda line: _length(line, face, language, pixels) > room,
  )  # fmt: skip


def _room(language: Language, width: int, height: int) -> int:
  return height if language.direction == "ttb" else width


def _length(line: str, face, language: Language, pixels: int) -> float:
  return font_of(face, pixels).getlength(
    line, direction=language.direction, language=language.tag
  )


def _cross(face, language: Language, pixels: int) -> float:
  """Room that one line takes across its direction, about."""
  if language.direction == "ttb":
    return pixels
  ascent, descent = font_of(face, pixels).getmetrics()
  return 0.85 * (ascent + descent)


def _strip(line: str, face: Face, language: Language, pixels: int):
  """A line alone.

  Returns:
    Its ink as a picture, the box of that from the line's origin, which is the
    left end of the baseline or the middle of a column's top, and the length.
  """
  font = font_of(face, pixels)
  length = _length(line, face, language, pixels)
  if language.direction == "ttb":
    size, anchor = (3 * pixels, math.ceil(length) + 2 * pixels), "mt"
    origin = 3 * pixels // 2, pixels
  else:
    ascent, descent = font.getmetrics()
    tall = ascent + descent + 2 * pixels
    size, anchor = (math.ceil(length) + 2 * pixels, tall), "ls"
    origin = pixels, ascent + pixels
  strip = Image.new("L", size)
  ImageDraw.Draw(strip).text(
    origin, line, fill=255, font=font, anchor=anchor,
    direction=language.direction, language=language.tag,
  )  # fmt: skip
  box = strip.getbbox()
  if box is None or 0 in box[:2] or box[2] == size[0] or box[3] == size[1]:
    return None, None, length  # more than an em beyond: some ink is cut off
  return strip.crop(box), _moved(box, -origin[0], -origin[1]), length


def _moved(box, x: int, y: int) -> tuple[int, int, int, int]:
  return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def _along(start: float, ink_low: int, ink_high: int, length: float, room: int):
  """Where a line starts along its direction; its ink stays in the room."""
  at = round(start * (room - length))
  return min(max(at, -ink_low), room - ink_high)


def _place_row(end, ink_box, length, room, start: float, pitch: float):
  """The place of the next line: (its end, box of its ink or None).

  An end is (baseline, lowest ink).
  """
  if ink_box is None:
    return end, None
  left, top, right, _ = ink_box
  width, height = room
  y = -top if end is None else max(round(end[0] + pitch), end[1] + 1 - top)
  x = _along(start, left, right, length, width)
  spot = _moved(ink_box, x, y)
  if spot[0] < 0 or spot[3] > height:
    return end, None
  return (y, spot[3]), spot


def _place_column(end, ink_box, length, room, start: float, pitch: float):
  """As `_place_row`, with an end of (middle of the column, leftmost ink)."""
  if ink_box is None:
    return end, None
  _, top, right, bottom = ink_box
  width, height = room
  x = width - right
  if end is not None:
    x = min(round(end[0] - pitch), end[1] - 1 - right)
  y = _along(start, top, bottom, length, height)
  spot = _moved(ink_box, x, y)
  if spot[0] < 0 or spot[1] < 0:
    return end, None
  return (x, spot[0]), spot
