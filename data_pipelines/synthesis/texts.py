# SPDX-License-Identifier: Apache-2.0
"""The user's own texts, to draw in place of random words."""

import json
import os
from collections.abc import Sequence

from data_pipelines.errors import InputError
from data_pipelines.synthesis.coverage import normal
from data_pipelines.synthesis.languages import LANGUAGES


def read_texts(
  path: str | os.PathLike, languages: Sequence[str]
) -> dict[str, tuple[str, ...]]:
  """Reads texts by language, in Unicode NFC.

  Args:
    path: of a file with one text a line, all of one language; or of a .jsonl
      file with `text` (which may hold newlines) and `language`.
    languages: codes that texts are wanted for.

  Returns:
    The texts of every language that is wanted; Chinese ones serve both ways of
    writing it.

  Raises:
    InputError: the file is unreadable, or has no text for a language.
  """
  path = os.fspath(path)
  try:
    with open(path, encoding="utf-8") as file:
      lines = file.read().split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f"Texts {path} cannot be read ({error}); give a UTF-8 file."
    ) from error
  numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
  if path.endswith(".jsonl"):
    pairs = [_pair(path, i, line) for i, line in numbered]
  elif len({code.split("-")[0] for code in languages}) == 1:
    pairs = [(languages[0].split("-")[0], line) for _, line in numbered]
  else:
    raise InputError(
      f"Texts {path} do not say which of {', '.join(languages)} they are in; "
      "give a .jsonl file with text and language, or one language in "
      "--languages."
    )
  found: dict[str, list[str]] = {}
  for code, text in pairs:
    found.setdefault(code, []).append(normal(text))
  return {code: _of(found, code, path) for code in languages}


def _of(found: dict[str, list[str]], code: str, path: str) -> tuple[str, ...]:
  texts = found.get(code, []) or found.get(code.split("-")[0], [])
  if not texts:
    raise InputError(
      f"Texts {path} hold none in language {code!r}; add some, or leave the "
      "language out of --languages."
    )
  return tuple(texts)


def _pair(path: str, number: int, line: str) -> tuple[str, str]:
  try:
    row = json.loads(line)
    text, code = row["text"], row["language"]
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{path}:{number} is no JSON object with text and language; correct the "
      "line."
    ) from error
  if not isinstance(text, str) or not text.strip() or code not in LANGUAGES:
    raise InputError(
      f"{path}:{number} needs a text and a language of {', '.join(LANGUAGES)}; "
      "correct the line."
    )
  return code, text
