# SPDX-License-Identifier: Apache-2.0
"""JSON lines that name image files, relative to the file of lines.

One object per line: `file_name` (or `image`), a caption in `text`, `caption`,
`prompt` or `instruction`, and for an edit `references`, a list of files.
`kind`, `url`, `license`, `source`, `key` and `language` are kept.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterator

from data_pipelines.imagefolder import named_files
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


def plan(path: pathlib.Path, prefix: str, size: int) -> list[Part]:
  """Counts the lines; `size` lines are a part."""
  with path.open("rb") as file:
    lines = sum(1 for _ in file)
  return [
    Part(
      "jsonl", os.fspath(path), prefix, start, min(start + size, lines),
      digest(start, size, state(path)),
    )
    for start in range(0, lines, size)
  ]  # fmt: skip


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
    name = fields.get("file_name") or fields["image"]
    target, *others = named_files(path.parent, name, fields.get("references"))
  # Deeply nested brackets end in a RecursionError.
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise Unusable(f"line without a usable file_name ({e})") from e
  return Item(
    caption=caption_of(fields),
    kind=str(fields.get("kind") or "user"),
    target=read_file(target, limits),
    references=tuple(read_file(other, limits) for other in others),
    provenance={"where": where, **kept_fields(fields)},
  )
