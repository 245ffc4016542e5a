# SPDX-License-Identifier: Apache-2.0
"""A folder of captioned images, paired as `data_pipelines.pairing` does."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

from data_pipelines import images, pairing
from data_pipelines.sources.items import (
  Entry,
  Item,
  Limits,
  Part,
  Unusable,
  digest,
  printable,
  read_file,
  state,
)


def plan(path: pathlib.Path, prefix: str, size: int) -> list[Part]:
  """Lists the folder; captions are read here, images are not."""
  items, problems = pairing.pair(path)
  entries = [
    {
      "id": f"{prefix}/{printable(item.id)}",
      "where": printable(item.where),
      "target": os.fspath(item.target),
      "references": [os.fspath(file) for file in item.references],
      "caption": item.caption,
      "missing": printable(item.missing),
      "kind": item.kind,
    }
    for item in items
  ]
  entries += [
    {
      "id": f"{prefix}/{printable(problem.id)}",
      "where": printable(problem.where),
      "reason": printable(problem.reason),
    }
    for problem in _with_broken_links(path, problems)
  ]
  # An item that is repaired keeps its place among the others.
  entries.sort(key=lambda entry: (entry["id"], entry["where"]))
  parts = []
  for start in range(0, len(entries), size):
    chunk = tuple(entries[start : start + size])
    files = [
      state(file)
      for entry in chunk
      if "target" in entry
      for file in (entry["target"], *entry["references"])
    ]
    parts.append(
      Part(
        "folder", os.fspath(path), prefix, start, start + len(chunk),
        digest(chunk, files), chunk,
      )
    )  # fmt: skip
  return parts


def _with_broken_links(
  folder: pathlib.Path, problems: list[pairing.Problem]
) -> list[pairing.Problem]:
  """Adds images that are links to nothing or to themselves.

  They are no files, so the import folder rules do not see them, only the
  captions beside them.
  """
  known = {problem.id for problem in problems}
  broken = []
  for root, folders, files in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith(".")]
    for name in files:
      file = pathlib.Path(root, name)
      hidden = name.startswith(".")
      if hidden or file.suffix.lower() not in images.SUFFIXES:
        continue
      if file.is_symlink() and not file.exists():
        broken.append(file.relative_to(folder))
  found = [
    pairing.Problem(file.as_posix(), "broken link", file.as_posix())
    for file in broken
    if file.as_posix() not in known
  ]
  beside = {file.with_suffix(".txt").as_posix() for file in broken}
  return found + [p for p in problems if p.id not in beside]


def read(part: Part, limits: Limits) -> Iterator[Entry]:
  """The entries of a part."""
  for entry in part.entries:
    yield Entry(entry["id"], entry["where"], lambda e=entry: _load(e, limits))


def _load(entry: dict[str, Any], limits: Limits) -> Item:
  if "reason" in entry:
    raise Unusable(entry["reason"])
  return Item(
    caption=entry["caption"],
    kind=entry["kind"],
    target=read_file(entry["target"], limits),
    references=tuple(read_file(f, limits) for f in entry["references"]),
    provenance={"where": entry["where"]},
    missing=entry["missing"],
  )
