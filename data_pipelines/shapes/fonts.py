# SPDX-License-Identifier: Apache-2.0
"""Fonts by size, and the refusal of text that a font cannot draw."""

import functools
import os
import unicodedata

import matplotlib
from fontTools import ttLib
from PIL import ImageFont

from data_pipelines.errors import InputError

# Control, surrogate, private-use and unassigned: never drawable on purpose,
# even where a font happens to map them.
_REFUSED_CATEGORIES = ("Cc", "Cs", "Co", "Cn")


@functools.lru_cache(maxsize=1)
def default_font() -> str:
  """Path of DejaVu Sans Bold, which every matplotlib wheel carries."""
  return os.path.join(
    matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf"
  )


@functools.lru_cache(maxsize=512)
def font_at(font_path: str, pixels: int) -> ImageFont.FreeTypeFont:
  """Returns the font at `pixels` per em; opening one costs about 0.1 ms."""
  try:
    return ImageFont.truetype(font_path, pixels)
  except OSError as error:
    raise InputError(
      f"Font {font_path!r} cannot be read; give the path of a TrueType or "
      "OpenType file."
    ) from error


@functools.lru_cache(maxsize=8)
def cap_height(font_path: str) -> float:
  """Height of a capital 'H' as a fraction of the em."""
  return -font_at(font_path, 1000).getbbox("H", anchor="ls")[1] / 1000


@functools.lru_cache(maxsize=8)
def _code_points(font_path: str) -> frozenset[int]:
  try:
    with ttLib.TTFont(font_path, lazy=True) as font:
      return frozenset(font.getBestCmap() or ())
  except (OSError, ttLib.TTLibError) as error:
    raise InputError(
      f"Font {font_path!r} cannot be read; give the path of a TrueType or "
      "OpenType file."
    ) from error


def require_drawable(text: str, font_path: str) -> str:
  """Returns `text` in NFC, or refuses it.

  A font silently draws a box for a character that it lacks, and such an image
  would teach a model that the box is the character.

  Args:
    text: what is to be drawn, on one line.
    font_path: the font that will draw it.

  Raises:
    InputError: naming every character that the font cannot draw.
  """
  text = unicodedata.normalize("NFC", text)
  known = _code_points(font_path)
  bad = [c for c in dict.fromkeys(text) if not _drawable(c, known)]
  if bad:
    raise InputError(
      f"Font {os.path.basename(font_path)} cannot draw "
      f"{', '.join(map(_name, bad))} in {text!r}; remove the characters or "
      "choose a font that has them."
    )
  return text


def _drawable(char: str, known: frozenset[int]) -> bool:
  return (
    unicodedata.category(char) not in _REFUSED_CATEGORIES
    and char != "\N{REPLACEMENT CHARACTER}"
    and ord(char) in known
  )


def _name(char: str) -> str:
  name = unicodedata.name(char, "control or unassigned character")
  return f"U+{ord(char):04X} ({name})"
