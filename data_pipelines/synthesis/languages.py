# SPDX-License-Identifier: Apache-2.0
"""The languages that text is drawn in, and how each of them is set."""

import dataclasses

from data_pipelines.errors import InputError


@dataclasses.dataclass(frozen=True)
class Language:
  """How one language is written.

  Attributes:
    code: its name in options and in samples.
    name: in English, for captions.
    script: ISO 15924 tag, for HarfBuzz.
    tag: BCP 47 tag, for HarfBuzz: chooses regional forms of a font.
    direction: 'ltr', 'rtl' or 'ttb' (columns from right to left).
    spaces: whether spaces stand between words.
    smallest: pixels per em below which its letters cannot be told apart;
      ours.
    faces: names of font files without suffix, the preferred first; Debian's
      and matplotlib's.
    collection: end of the family name of the face in a collection (.ttc).
    package: of Debian, with such fonts.
  """

  code: str
  name: str
  script: str
  tag: str
  direction: str
  spaces: bool
  smallest: int
  faces: tuple[str, ...]
  collection: str = ""
  package: str = "fonts-noto-core"


def _cjk(code, name, script, tag, collection, direction="ltr"):
  return Language(
    code, name, script, tag, direction, code == "ko", 7,
    (
      "NotoSansCJK-Regular", "NotoSansCJK-Bold",
      "NotoSerifCJK-Regular", "NotoSerifCJK-Bold",
    ),
    collection, "fonts-noto-cjk",
  )  # fmt: skip


_ALL = (
  Language(
    "en", "English", "Latn", "en", "ltr", True, 5,
    (
      "NotoSans-Regular", "NotoSans-Bold", "NotoSans-Italic",
      "NotoSerif-Regular", "NotoSerif-Bold", "NotoSerif-Italic",
      "NotoSansMono-Regular", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif",
      "DejaVuSansMono",
    ),
  ),
  _cjk("zh", "Chinese", "Hans", "zh-Hans", "CJK SC"),
  Language(
    "ar", "Arabic", "Arab", "ar", "rtl", True, 8,
    (
      "NotoNaskhArabic-Regular", "NotoNaskhArabic-Bold",
      "NotoSansArabic-Regular", "NotoSansArabic-Bold",
      "DejaVuSans", "DejaVuSans-Bold",
    ),
  ),
  Language(
    "hi", "Hindi", "Deva", "hi", "ltr", True, 8,
    (
      "NotoSansDevanagari-Regular", "NotoSansDevanagari-Bold",
      "NotoSerifDevanagari-Regular", "NotoSerifDevanagari-Bold",
    ),
  ),
  _cjk("ja", "Japanese", "Jpan", "ja", "CJK JP"),
  _cjk("ko", "Korean", "Kore", "ko", "CJK KR"),
  Language(
    "th", "Thai", "Thai", "th", "ltr", False, 8,
    (
      "NotoLoopedThai-Regular", "NotoSansThai-Regular", "NotoSansThai-Bold",
      "NotoSerifThai-Regular", "NotoSerifThai-Bold",
    ),
  ),
  _cjk("zh-vertical", "Chinese", "Hans", "zh-Hans", "CJK SC", "ttb"),
)  # fmt: skip
LANGUAGES = {language.code: language for language in _ALL}


def language_of(code: str) -> Language:
  """The language of a code.

  Raises:
    InputError: it is not one of `LANGUAGES`.
  """
  if code not in LANGUAGES:
    raise InputError(
      f"Language {code!r} is unknown; choose from {', '.join(LANGUAGES)}."
    )
  return LANGUAGES[code]
