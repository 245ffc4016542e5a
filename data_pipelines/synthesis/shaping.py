# SPDX-License-Identifier: Apache-2.0
"""HarfBuzz on a face, without drawing: opening it, and the length of text.

Pillow opens the font anew for every line that it measures, which takes longer
than the line; here it stays open and words are measured once.
"""

import functools

import uharfbuzz as hb

from data_pipelines.errors import InputError
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import Language


@functools.lru_cache(maxsize=64)
def opened(face: Face) -> hb.Font:
  """The face for HarfBuzz.

  Raises:
    InputError: the font is unreadable.
  """
  try:
    font = hb.Font(hb.Face(hb.Blob.from_file_path(face.path), face.index))
  except (OSError, hb.HarfBuzzError) as error:
    raise InputError(
      f"Font {face.path} cannot be read; give a TrueType or OpenType file."
    ) from error
  if not font.face.glyph_count:
    raise InputError(
      f"Font {face.path} has no glyphs; give a TrueType or OpenType file."
    )
  return font


def shaped(text: str, face: Face, direction: str, tag: str) -> hb.Buffer:
  """Glyphs of a text and their places, in units of the font.

  Args:
    text: in one direction.
    face: that draws it.
    direction: 'ltr', 'rtl' or 'ttb'.
    tag: of its language, which chooses regional forms.
  """
  buffer = hb.Buffer()
  buffer.add_str(text)
  buffer.guess_segment_properties()
  buffer.direction = direction
  buffer.language = tag
  hb.shape(opened(face), buffer)
  return buffer


@functools.lru_cache(maxsize=100_000)
def advance(text: str, face: Face, language: Language) -> float:
  """Length of a piece of text along its direction, in em, not hinted."""
  buffer = shaped(text, face, language.direction, language.tag)
  positions, upem = buffer.glyph_positions, opened(face).face.upem
  # Columns run towards negative y.
  if language.direction == "ttb":
    return -sum(p.y_advance for p in positions) / upem
  return sum(p.x_advance for p in positions) / upem
