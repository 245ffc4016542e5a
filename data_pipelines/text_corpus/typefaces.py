# SPDX-License-Identifier: Apache-2.0
"""Which fonts can draw a language: matplotlib's, or one of the system's."""

import functools
import os
import pathlib

import matplotlib
from fontTools import ttLib
from matplotlib import font_manager

from data_pipelines.errors import InputError
from data_pipelines.text_corpus import words

# Every matplotlib wheel carries them.
_LATIN = (
  "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf",
  "DejaVuSerif.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSansMono.ttf",
  "cmr10.ttf",
)  # fmt: skip


def covers(path: str, text: str) -> bool:
  """Whether a font has a glyph for every character; False if unreadable.

  Of a collection (.ttc) the first face counts, for Pillow draws with it.
  """
  try:
    with ttLib.TTFont(path, lazy=True, fontNumber=0) as font:
      return set(map(ord, text)) <= set(font.getBestCmap() or ())
  except (OSError, ttLib.TTLibError, KeyError, AssertionError):
    return False


@functools.lru_cache(maxsize=8)
def fonts_of(language: str, given: str = "") -> tuple[str, ...]:
  """Paths of fonts that can draw a language.

  Args:
    language: one of `words.LANGUAGES`.
    given: of a font to use for it; empty: matplotlib's own for English, all
      that the system has for Chinese.

  Raises:
    InputError: the font that was given cannot draw the language, or there is
      none.
  """
  wanted = words.characters(language)
  if given:
    if not covers(given, wanted):
      raise InputError(
        f"Font {given} is unreadable or lacks characters of language "
        f"{language!r}; give another one."
      )
    return (given,)
  if language == "en":
    folder = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
    return tuple(str(folder / name) for name in _LATIN)
  found = sorted(
    path
    for path in font_manager.findSystemFonts()
    if os.path.getsize(path) > 1_000_000 and covers(path, wanted)
  )
  if not found:
    raise InputError(
      "No installed font draws Chinese; install one (Noto Sans CJK, say), pass "
      "--font_zh=PATH, or leave the language out with --languages=en."
    )
  return tuple(found)
