# SPDX-License-Identifier: Apache-2.0
"""Which caption belongs to which image file of a folder.

Captions come from `metadata.jsonl` files, else from a `.txt` beside each
image; see `data_pipelines.imagefolder`. No image is read here.
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

from data_pipelines import images


@dataclasses.dataclass(frozen=True)
class Item:
  """One record to be, before its files are read.

  Attributes:
    name: path of the target image, relative to the input folder.
    target: the image file.
    references: image files an edit starts from.
    caption: the text; '' where `missing` says why there is none.
    kind: label for statistics.
    where: file and line that the caption came from.
    id: `name`, made unique.
    missing: why there is no caption.
  """

  name: str
  target: pathlib.Path
  references: tuple[pathlib.Path, ...]
  caption: str
  kind: str
  where: str
  id: str = ""
  missing: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
  """One thing that was left out."""

  id: str
  reason: str
  where: str


def pair(folder: pathlib.Path) -> tuple[list[Item], list[Problem]]:
  """Pairs images with captions, without reading any image.

  Args:
    folder: searched recursively; names starting with a dot are ignored.

  Returns:
    Items in a stable order, images without a caption among them, and what
    can be no item even with one.
  """
  files = [
    path
    for path in sorted(folder.rglob("*"))
    if path.is_file()
    and not any(p.startswith(".") for p in path.relative_to(folder).parts)
  ]
  items: list[Item] = []
  problems: list[Problem] = []
  claimed: set[pathlib.Path] = set()  # images that metadata speaks of
  for path in files:
    if path.name == "metadata.jsonl":
      _read_metadata(path, folder, items, problems, claimed)
  stems = set()
  for path in files:
    if path.suffix.lower() not in images.SUFFIXES:
      continue
    stems.add(path.with_suffix(""))
    if path not in claimed:
      _read_sidecar(path, folder, items, problems)
  for path in files:
    if path.suffix.lower() == ".txt" and path.with_suffix("") not in stems:
      name = path.relative_to(folder).as_posix()
      problems.append(Problem(name, "caption without image", name))
  return _with_unique_ids(items), problems


def named_files(
  folder: pathlib.Path, target: str, references: Sequence[str] | str | None
) -> list[pathlib.Path]:
  """Files that a line of metadata names, the target first.

  Args:
    folder: that the names are relative to.
    target: a name.
    references: names, or a lone one.

  Raises:
    TypeError: something is no name.
  """
  # A string is iterable too.
  lone = isinstance(references, str)
  names = (target, *([references] if lone else references or ()))
  return [pathlib.Path(os.path.normpath(folder / name)) for name in names]


def _read_metadata(
  path: pathlib.Path,
  folder: pathlib.Path,
  items: list[Item],
  problems: list[Problem],
  claimed: set[pathlib.Path],
) -> None:
  where = path.relative_to(folder).as_posix()
  for number, line in enumerate(path.read_bytes().splitlines(), start=1):
    place = f"{where}:{number}"
    if not line.strip():
      continue
    try:
      fields = json.loads(line)
      target, *others = named_files(
        path.parent, fields["file_name"], fields.get("references")
      )
    except (
      ValueError, KeyError, TypeError, AttributeError,
      RecursionError,  # of deeply nested brackets
    ) as error:  # fmt: skip
      reason = f"metadata line without a usable file_name ({error})"
      problems.append(Problem(place, reason, place))
      continue
    # Claimed even when unusable: its problem is reported here, once.
    claimed.update([target, *others])
    identity = os.path.relpath(target, folder).replace(os.sep, "/")
    lost = [p for p in (target, *others) if not p.is_file()]
    if lost:
      reason = f"caption without image (no file {lost[0].name})"
      problems.append(Problem(identity, reason, place))
      continue
    text = fields.get("text")
    text = text.strip() if isinstance(text, str) else ""
    missing = ""
    if not text:
      missing = "empty caption" if "text" in fields else "no `text` in metadata"
    kind = str(fields.get("kind") or "user")
    items.append(
      Item(
        identity, target, tuple(others), text, kind, place, missing=missing
      )
    )  # fmt: skip


def _read_sidecar(
  path: pathlib.Path,
  folder: pathlib.Path,
  items: list[Item],
  problems: list[Problem],
) -> None:
  name = path.relative_to(folder).as_posix()
  missing = "empty caption"
  try:
    # utf-8-sig drops the byte-order mark of Windows editors.
    caption = path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
  except FileNotFoundError:
    caption, missing = "", "image without caption"
  except UnicodeDecodeError:
    problems.append(Problem(name, "caption is not UTF-8", name))
    return
  items.append(
    Item(
      name, path, (), caption, "user", name,
      missing="" if caption else missing,
    )
  )  # fmt: skip


def _with_unique_ids(items: list[Item]) -> list[Item]:
  """Several captions of one image become name, name#2, name#3."""
  seen: collections.Counter[str] = collections.Counter()
  unique = []
  for item in items:
    seen[item.name] += 1
    count = seen[item.name]
    name = item.name if count == 1 else f"{item.name}#{count}"
    unique.append(dataclasses.replace(item, id=name))
  return unique
