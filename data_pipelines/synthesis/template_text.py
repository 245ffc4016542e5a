# SPDX-License-Identifier: Apache-2.0
"""Pieces of text that typst never breaks, and the ink of each of them.

A piece is a word, or one character where lines may break anywhere. typst tells
where a piece ends; HarfBuzz, with which typst's shaper agrees, tells how far
its ink reaches from there. Lengths are in em, x to the right, y downwards from
the baseline.
"""

import dataclasses
import functools
import unicodedata

import regex
from fontTools.pens.boundsPen import BoundsPen

from data_pipelines.synthesis import breaking, shaping
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import Language

# Words of other scripts and numbers stay together, the rest stands alone.
_CHARACTERS = regex.compile(r"[A-Za-z0-9]+(?:[.,][0-9]+)*|\X")
# A number runs from left to right within right-to-left text; separators belong
# to it only between figures (UAX 9, rules W4 and W7).
_NUMBER = regex.compile(r"(\d+(?:[.,:/٫٬]\d+)*|[A-Za-z]+)")


@dataclasses.dataclass(frozen=True)
class Piece:
  """What typst sets without a break.

  Attributes:
    text: without spaces.
    gap: whether a space stands before it.
    rtl: its direction.
  """

  text: str
  gap: bool
  rtl: bool


@dataclasses.dataclass(frozen=True)
class Ink:
  """Extent of a piece from its left end on the baseline.

  Attributes:
    advance: how far the next piece is.
    box: left, top, right, bottom; None: nothing is drawn.
  """

  advance: float
  box: tuple[float, float, float, float] | None


def pieces(text: str, language: Language) -> tuple[Piece, ...] | None:
  """A text in pieces; None: its directions are too mixed to follow.

  Args:
    text: in Unicode NFC; any white space is a space.
    language: decides where lines may break.
  """
  found = []
  for word in text.split():
    parts = _parts(word, language)
    if parts is None:
      return None
    for i, part in enumerate(parts):
      rtl = language.direction == "rtl" and not _NUMBER.fullmatch(part)
      found.append(Piece(part, bool(found) and i == 0, rtl))
  return tuple(found)


def _parts(word: str, language: Language) -> list[str] | None:
  classes = {unicodedata.bidirectional(c) for c in word}
  if language.direction == "rtl":
    parts = [part for part in _NUMBER.split(word) if part]
    # Signs beside figures turn with what stands before the number, and
    # brackets around Latin letters with what follows.
    if classes & {"ES", "ET"} or ("L" in classes and len(parts) > 1):
      return None
    return parts
  if classes & {"R", "AL", "AN"}:
    return None
  if language.spaces:
    return [word]
  if language.script == "Thai":
    return breaking.atoms(word, language)
  return _CHARACTERS.findall(word)


@functools.lru_cache(maxsize=65536)
def _outline(face: Face, glyph: int) -> tuple[float, ...] | None:
  """Exact bounds in units of the font; HarfBuzz's hold control points too."""
  pen = BoundsPen(None)
  shaping.opened(face).draw_glyph_with_pen(glyph, pen)
  return pen.bounds


@functools.lru_cache(maxsize=65536)
def ink(text: str, rtl: bool, face: Face, language: Language) -> Ink:
  """The ink of a piece.

  Args:
    text: of the piece.
    rtl: its direction.
    face: that draws it.
    language: chooses regional forms.
  """
  upem = shaping.opened(face).face.upem
  buffer = shaping.shaped(text, face, "rtl" if rtl else "ltr", language.tag)
  x, spans = 0, []
  for info, place in zip(buffer.glyph_infos, buffer.glyph_positions):
    bounds = _outline(face, info.codepoint)
    if bounds:
      left, right = (x + place.x_offset + v for v in bounds[::2])
      bottom, top = (place.y_offset + v for v in bounds[1::2])
      spans.append((left, -top, right, -bottom))
    x += place.x_advance
  if not spans:
    return Ink(x / upem, None)
  lefts, tops, rights, bottoms = zip(*spans)
  box = (min(lefts), min(tops), max(rights), max(bottoms))
  return Ink(x / upem, tuple(v / upem for v in box))
