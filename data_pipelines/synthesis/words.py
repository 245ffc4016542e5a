# SPDX-License-Identifier: Apache-2.0
"""Random text without meaning: words, headings, sentences, paragraphs.

Text without meaning lets no reader guess what it cannot see. Everything is in
Unicode NFC.
"""

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np

from data_pipelines.synthesis.languages import Language
from data_pipelines.synthesis.vocabulary import CHINESE_CHARACTERS, WORDS

# More than a condition encoder of 1 K tokens takes would be cut off.
MOST_TOKENS = 1000

# Between clauses, and at the end of a sentence.
_COMMA = {"ar": "،", "zh": "，", "zh-vertical": "，", "ja": "、", "th": " "}
_STOP = {"hi": "।", "zh": "。", "zh-vertical": "。", "ja": "。", "th": ""}
_PARTICLES = ("は", "が", "を", "に", "の", "と", "で", "も", "から", "まで")
# Fonts of these scripts often lack the others; columns take no Arabic digits.
_DIGITS = {
  "ar": "٠١٢٣٤٥٦٧٨٩",
  "hi": "०१२३४५६७८९",
  "th": "๐๑๒๓๔๕๖๗๘๙",
  "zh-vertical": "一二三四五六七八九十百千",
}


@functools.cache
def vocabulary(language: Language) -> tuple[str, ...]:
  """The words that sentences are made of."""
  return tuple(
    unicodedata.normalize("NFC", word) for word in WORDS[language.code]
  )


@functools.cache
def characters(language: Language) -> str:
  """Every character that text may have, to choose a font by."""
  text = "".join(vocabulary(language)) + comma(language) + stop(language)
  text += _digits(language)
  if language.script == "Latn":
    text += text.upper()
  if language.script == "Hans":
    text += CHINESE_CHARACTERS
  if language.code == "ja":
    text += "".join(_PARTICLES)
  return "".join(sorted(set(text) - {" "}))


def comma(language: Language) -> str:
  """What stands between two clauses."""
  return _COMMA.get(language.code, ",")


def stop(language: Language) -> str:
  """What ends a sentence; Thai has nothing."""
  return _STOP.get(language.code, ".")


def number(rng: np.random.Generator, language: Language) -> str:
  """A number, in the script's own digits where it has some."""
  drawn = rng.choice(list(_digits(language)), int(rng.integers(1, 5)))
  return "".join(str(digit) for digit in drawn)


def _digits(language: Language) -> str:
  return _DIGITS.get(language.code, "0123456789")


def heading(rng: np.random.Generator, language: Language) -> str:
  """A few words without a full stop."""
  drawn = _words(rng, language, int(rng.integers(2, 5)))
  if language.script == "Latn":
    drawn = [word.capitalize() for word in drawn]
  return (" " if language.spaces else "").join(drawn)


def sentence(rng: np.random.Generator, language: Language) -> str:
  """One sentence; now and then it holds a number."""
  if language.spaces:
    return _spaced_sentence(rng, language)
  clauses = [_clause(rng, language) for _ in range(int(rng.integers(1, 4)))]
  if rng.random() < 0.3:
    clauses.append(number(rng, language))
  return comma(language).join(clauses) + stop(language)


def _spaced_sentence(rng, language: Language) -> str:
  count = int(rng.integers(4, 14))
  drawn = _words(rng, language, count)
  if rng.random() < 0.3:
    drawn[int(rng.integers(1, count))] = number(rng, language)
  if rng.random() < 0.3:
    drawn[count // 2] += comma(language)
  drawn[0] = drawn[0].capitalize()
  return " ".join(drawn) + stop(language)


def _clause(rng, language: Language) -> str:
  """Words without spaces; of Chinese ones every fourth is rare or no word."""
  if language.script == "Hans" and rng.random() < 0.25:
    some = rng.choice(list(CHINESE_CHARACTERS), int(rng.integers(3, 12)))
    return "".join(str(c) for c in some)
  drawn = _words(rng, language, int(rng.integers(2, 6)))
  if language.code == "ja":
    drawn = [word + str(rng.choice(_PARTICLES)) for word in drawn]
  return "".join(drawn)


def _words(rng, language: Language, count: int) -> list[str]:
  return [str(word) for word in rng.choice(vocabulary(language), count)]


def paragraph(rng: np.random.Generator, language: Language, tokens: int) -> str:
  """Sentences of about so many tokens in all, at least one."""
  between = "" if language.script in ("Hans", "Jpan") else " "
  text = sentence(rng, language)
  while True:
    longer = text + between + sentence(rng, language)
    if tokens_of(longer, language) > tokens:
      return text
    text = longer


def tokens_of(text: str, language: Language) -> int:
  """About how many tokens Qwen's vocabulary makes of a text.

  A rule of thumb of ours: 1.3 tokens a word of English, and by character 0.7
  (Chinese), 0.8 (Japanese), 1 (Korean, Thai, Arabic) or 1.4 (Hindi).
  """
  if language.script == "Latn":
    return round(1.3 * len(text.split()))
  each = {"Hans": 0.7, "Jpan": 0.8, "Deva": 1.4}.get(language.script, 1.0)
  return round(each * sum(not c.isspace() for c in text))


def pick(
  rng: np.random.Generator, language: Language, texts: Sequence[str],
  tokens: int = 40,
) -> str:  # fmt: skip
  """One of the user's texts; if there are none, a paragraph of random words."""
  if texts:
    return str(texts[int(rng.integers(len(texts)))])
  return paragraph(rng, language, tokens)
