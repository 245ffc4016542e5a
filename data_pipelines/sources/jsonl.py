# SPDX-License-Identifier: Apache-2.0
"""JSON lines that name image files, relative to the file of lines.

One object per line: `file_name` (or `image`), a caption in `text`, `caption`,
`prompt` or `instruction`, and for an edit `references`, a list of files.
`kind`, `url`, `license`, `source`, `key` and `language` are kept.
"""

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from data_pipelines.pairing import named_files
from data_pipelines.sources.items import (
  Entry,
  Item,
  Limits,
  Part,
  Unusable,
  caption_of,
  digest,
  kept_fields,
  printable,
  read_file,
  state,
)

# Of a line; deeply nested brackets end in a RecursionError.
_NO_FILES = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def plan(path: pathlib.Path, prefix: str, size: int) -> list[Part]:
  """Lists the lines and looks at their files; `size` lines are a part."""
  parts: list[Part] = []
  with path.open("rb") as file:
    while lines := list(itertools.islice(file, size)):
      start = size * len(parts)
      files = [_state(path, line) for line in lines]
      text = hashlib.sha256(b"".join(lines)).hexdigest()
      parts.append(
        Part(
          "jsonl", os.fspath(path), prefix, start, start + len(lines),
          digest(text, files),
        )
      )  # fmt: skip
  return parts


def _state(path: pathlib.Path, line: bytes) -> list[list[int]]:
  """State of the files that a line names."""
  try:
    return [state(file) for file in _files(path, json.loads(line))]
  except _NO_FILES:
    return []


def _files(path: pathlib.Path, fields: dict[str, Any]) -> list[pathlib.Path]:
  name = fields.get("file_name") or fields["image"]
  return named_files(path.parent, name, fields.get("references"))


def read(part: Part, limits: Limits) -> Iterator[Entry]:
  """The entries of a part; empty lines are none."""
  path = pathlib.Path(part.path)
  with path.open("rb") as file:
    lines = itertools.islice(file, part.start, part.stop)
    for number, line in enumerate(lines, start=part.start + 1):
      if line.strip():
        where = f"{printable(path.name)}:{number}"
        yield Entry(
          f"{part.prefix}:{number}",
          where,
          lambda line=line, where=where: _load(path, line, where, limits),
        )


def _load(path: pathlib.Path, line: bytes, where: str, limits: Limits) -> Item:
  try:
    fields = json.loads(line)
    target, *others = _files(path, fields)
  except _NO_FILES as e:
    raise Unusable(f"line without a usable file_name ({e})") from e
  caption, missing = caption_of(fields)
  return Item(
    caption=caption,
    kind=str(fields.get("kind") or "user"),
    target=read_file(target, limits),
    references=tuple(read_file(other, limits) for other in others),
    provenance={"where": where, **kept_fields(fields)},
    missing=missing,
  )
