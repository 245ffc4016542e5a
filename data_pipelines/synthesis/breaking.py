# SPDX-License-Identifier: Apache-2.0
"""Where a line of text may end, by language."""

import functools
from collections.abc import Callable, Sequence

# The standard library's `re` knows no grapheme clusters.
import regex

from data_pipelines.synthesis import words
from data_pipelines.synthesis.languages import Language

# What must not begin a line, and what must not end one (JIS X 4051, GB/T
# 15834; small kana included).
_NOT_FIRST = frozenset(
  "、。，．：；？！）】」』〉》〕｝〗’”…‥・·ー々〻～%％‰℃"
  "ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ,.:;?!)]}"
)
_NOT_LAST = frozenset("（【「『〈《〔｛〖‘“￥$＄([{")
# Latin words and numbers inside of Chinese and Japanese stay whole.
_IDEOGRAPHIC = regex.compile(r"[\p{Latin}\p{Nd}'’.,%-]+(?<![.,])|\X")
# Vowels before their consonant belong to it, those after it as well.
_THAI_CLUSTER = r"[เแโใไ]*\X[ะาำๅๆฯ]*"
_THAI_GOES_ON = r"(?![\p{M}ะาำๅๆฯ])"


def atoms(text: str, language: Language) -> list[str]:
  """Pieces of a line that must not be cut; together they are the text.

  A blank belongs to the piece before it.
  """
  if language.spaces:
    return regex.findall(r"\s*\S+\s*", text)
  if language.script == "Thai":
    return [
      piece
      for part in regex.findall(r"\s*\S+\s*", text)
      for piece in _thai(language).findall(part)
    ]
  pieces: list[str] = []
  for piece in _IDEOGRAPHIC.findall(text):
    follows = piece.isspace() or piece[0] in _NOT_FIRST
    if pieces and (follows or pieces[-1].rstrip()[-1:] in _NOT_LAST):
      pieces[-1] += piece
    else:
      pieces.append(piece)
  return pieces


@functools.cache
def _thai(language: Language) -> regex.Pattern:
  """The longest known word, else one cluster.

  A dictionary as PyThaiNLP's would know more words than the text has.
  """
  known = sorted(words.vocabulary(language), key=len, reverse=True)
  either = "|".join(map(regex.escape, known))
  return regex.compile(
    rf"(?:(?:{either}){_THAI_GOES_ON}|{_THAI_CLUSTER})\s*|\s+"
  )


def break_lines(
  text: str, language: Language, advance: Callable[[str], float], room: float,
  too_long: Callable[[str], bool] = lambda line: False,
) -> tuple[list[str], bool]:  # fmt: skip
  """Breaks text into lines that are as full as they can be.

  Args:
    text: paragraphs, separated by newlines; empty lines are kept.
    language: of the text.
    advance: length of a piece of a line.
    room: length that a line may have.
    too_long: whether a line that fits by the sum of its pieces does not.

  Returns:
    The lines, and whether they are the whole text: False as soon as a piece
    is longer than a line.
  """
  lines = []
  for paragraph in text.split("\n"):
    rest = atoms(paragraph, language)
    if not rest:
      lines.append("")
    while rest:
      count = _fitting(rest, advance, room)
      while count and too_long("".join(rest[:count]).strip()):
        count -= 1
      if not count:
        return lines, False
      lines.append("".join(rest[:count]).strip())
      rest = rest[count:]
  return lines, True


def _fitting(pieces: Sequence[str], advance, room: float) -> int:
  """How many of the pieces go on one line, without the blank at its end."""
  length = 0.0
  for count, piece in enumerate(pieces):
    if length + advance(piece.rstrip()) > room:
      return count
    length += advance(piece)
  return len(pieces)
