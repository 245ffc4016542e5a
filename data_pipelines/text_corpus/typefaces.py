# SPDX-License-Identifier: Apache-2.0
"""Which fonts small text is drawn with: matplotlib's, or the system's."""

import functools
import os

from data_pipelines.errors import InputError
from data_pipelines.synthesis import fonts, words
from data_pipelines.synthesis.languages import LANGUAGES

_LATIN = (
  "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf",
  "DejaVuSerif.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSansMono.ttf",
  "cmr10.ttf",
)  # fmt: skip


@functools.lru_cache(maxsize=8)
def fonts_of(language: str, given: str = "") -> tuple[str, ...]:
  """Paths of fonts that can draw a language.

  Args:
    language: 'en' or 'zh'.
    given: of a font to use for it; empty: matplotlib's own for English, all
      that the system has for Chinese.

  Raises:
    InputError: the font that was given cannot draw the language, or there is
      none.
  """
  wanted = words.characters(LANGUAGES[language])
  if given:
    if not fonts.covers(given, wanted):
      raise InputError(
        f"Font {given} is unreadable or lacks characters of language "
        f"{language!r}; give another one."
      )
    return (given,)
  if language == "en":
    return tuple(str(fonts.bundled_folder() / name) for name in _LATIN)
  # Of a collection Pillow draws with the first face, so that one counts.
  found = [
    path
    for path in fonts.system_fonts()
    if os.path.getsize(path) > 1_000_000 and fonts.covers(path, wanted)
  ]
  if not found:
    raise InputError(
      "No installed font draws Chinese; install one (Noto Sans CJK, say), pass "
      "--font_zh=PATH, or leave the language out with --languages=en."
    )
  return tuple(found)
