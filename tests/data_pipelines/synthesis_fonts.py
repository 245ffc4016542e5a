# SPDX-License-Identifier: Apache-2.0
"""Fonts for the tests of synthesis: what is installed, and one made here."""

import pytest
from fontTools import fontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from data_pipelines.errors import InputError
from data_pipelines.synthesis.fonts import Face, faces_of
from data_pipelines.synthesis.languages import LANGUAGES


def faces(code: str) -> tuple[Face, ...]:
  """Faces of a language, or a skip that names the package."""
  language = LANGUAGES[code]
  try:
    return faces_of(language)
  except InputError:
    return pytest.skip(f"needs the Debian package {language.package}")


def made_face(path: str) -> Face:
  """A font with every trap.

  A variation, a blank letter, a character without a glyph, and one that loses
  its glyph beside another.
  """
  pen = TTGlyphPen(None)
  for x, y in ((100, 0), (100, 700), (800, 700), (800, 0)):
    (pen.lineTo if x + y > 100 else pen.moveTo)((x, y))
  pen.closePath()
  box, blank = pen.glyph(), TTGlyphPen(None).glyph()
  glyphs = {
    ".notdef": box, "space": blank, "a": box, "b": box, "form": box,
    "variant": box,
  }  # fmt: skip
  characters = {
    " ": "space", "a": "a", "b": "b", "葛": "form", "\u3164": "space",
    "z": ".notdef",
  }  # fmt: skip
  builder = fontBuilder.FontBuilder(1000, isTTF=True)
  builder.setupGlyphOrder(list(glyphs))
  builder.setupCharacterMap(
    {ord(c): name for c, name in characters.items()},
    uvs=[(ord("葛"), 0xE0100, "variant")],
  )
  builder.setupGlyf(glyphs)
  builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (900, 100)))
  builder.setupHorizontalHeader(ascent=800, descent=-200)
  builder.setupNameTable({"familyName": "Made", "styleName": "Regular"})
  builder.setupOS2()
  builder.setupPost()
  builder.addOpenTypeFeatures(
    "languagesystem DFLT dflt; feature liga { sub a b by .notdef; } liga;"
  )
  builder.save(path)
  return Face(path)
