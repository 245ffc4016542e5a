# SPDX-License-Identifier: Apache-2.0
"""Tar files of samples, as webdataset writes and reads them.

Members that share a name up to its first dot are a sample: an image (`jpg`,
`jpeg`, `png`, `webp`, alone or after `target.`), a caption (`txt`, `caption`
or `text`) and `json` metadata, which may hold the caption instead. Images
with any other word before the suffix (`source.png`, `ref0.jpg`) are the
references of an edit, in alphabetical order.

Read with tarfile: the webdataset library imports torch, and it ends silently
at the first damaged header.
"""

import functools
import gzip
import json
import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from data_pipelines import images
from data_pipelines.sources.items import (
  Entry,
  Item,
  Limits,
  Part,
  Unusable,
  caption_of,
  check_bytes,
  digest,
  kept_fields,
  lost,
  printable,
  state,
)

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_CAPTIONS = ("txt", "caption", "text")
_DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)
_BLOCK = 512
_TO_THE_END = 2**62


def plan(path: pathlib.Path, prefix: str, size: int) -> list[Part]:
  """Cuts a tar into parts of `size` samples, by its headers.

  A compressed tar is one part whatever `size` says: it would have to be
  unpacked up to every cut. So is what lies behind damage.
  """
  cuts: list[dict[str, Any]] = [{"offset": 0, "seen": {}}]
  if path.suffix not in (".gz", ".tgz"):
    cuts += _cuts(path, size)
  identity = digest(state(path))
  ends = [size * (i + 1) for i in range(len(cuts) - 1)] + [_TO_THE_END]
  return [
    Part(
      "tar", os.fspath(path), prefix, size * i, end, digest(identity, cut),
      (cut,),
    )
    for i, (cut, end) in enumerate(zip(cuts, ends))
  ]  # fmt: skip


def _cuts(path: pathlib.Path, size: int) -> list[dict[str, Any]]:
  """Where parts after the first begin.

  Returns:
    `offset`, bytes; `seen`, how often keys of the part occur before it, which
    makes them unique.
  """
  cuts: list[dict[str, Any]] = []
  seen: dict[str, int] = {}
  count = 0
  here: set[str] = set()  # keys of the part
  try:
    with path.open("rb") as file:
      for first, key, _, member in _headers(file):
        if not first:
          continue
        if count and count % size == 0:
          cuts.append({"offset": member.offset, "seen": {}})
          here = set()
        if cuts and key in seen and key not in here:
          cuts[-1]["seen"][key] = seen[key]
        here.add(key)
        seen[key] = seen.get(key, 0) + 1
        count += 1
  except _DAMAGED:
    pass  # the part that reads it says so
  return cuts


def read(part: Part, limits: Limits) -> Iterator[Entry]:
  """The samples of a part, and one entry for what is lost to damage."""
  path = pathlib.Path(part.path)
  name = printable(path.name)
  (cut,) = part.entries
  seen: dict[str, int] = dict(cut["seen"])
  left = part.stop - part.start
  group: dict[str, bytes | Unusable] = {}
  key = last = None
  error = None
  try:
    for first, member_key, extension, content in _members(
      path, cut["offset"], limits
    ):
      if first and group:
        yield _entry(part, name, key, group, seen)
        group = {}
        left -= 1
        if not left:
          return
      last = key = member_key
      group[extension] = content
  except _DAMAGED as damage:
    error = damage
  if group:
    yield _entry(part, name, key, group, seen)
  if error is not None:
    after = f"after {last}" if last else "from the start"
    reason = f"damaged tar ({error}; everything {after} is lost)"
    rest = "#rest" if part.stop == _TO_THE_END else f"#rest{part.start}"
    yield lost(f"{part.prefix}{rest}", name, reason)


def _members(
  path: pathlib.Path, offset: int, limits: Limits
) -> Iterator[tuple[bool, str, str, bytes | Unusable]]:
  """As `_headers`, with the content of every member."""
  with _open(path) as file:
    file.seek(offset)
    for first, key, extension, member in _headers(file):
      yield first, key, extension, _content(file, member, limits)


def _headers(
  file: IO[bytes],
) -> Iterator[tuple[bool, str, str, tarfile.TarInfo]]:
  """Members of samples, from the file's position on.

  Yields:
    Whether it is the first of its sample, key, extension, header.
  """
  last, extensions = None, set()
  with tarfile.open(fileobj=file, mode="r:") as tar:
    for member in tar:
      base = os.path.basename(member.name)
      stem, dot, extension = base.partition(".")
      if member.isdir() or not dot or not stem or stem.startswith("__"):
        continue
      key = printable(os.path.join(os.path.dirname(member.name), stem))
      extension = extension.lower()
      # The same extension again starts another sample of that name.
      first = key != last or extension in extensions
      if first:
        last, extensions = key, set()
      extensions.add(extension)
      yield first, key, extension, member
      tar.members.clear()  # tarfile keeps the header of every member
    # tarfile takes a damaged header for the end; the end is a block of zeros.
    file.seek(tar.offset)
    block = file.read(_BLOCK)
    if block.strip(b"\0") or 0 < len(block) < _BLOCK:
      raise tarfile.ReadError("damaged header")


def _open(path: pathlib.Path) -> IO[bytes]:
  return gzip.open(path) if path.suffix in (".gz", ".tgz") else path.open("rb")


def _content(
  file: IO[bytes], member: tarfile.TarInfo, limits: Limits
) -> bytes | Unusable:
  if not member.isreg():
    return Unusable("tar member is not a file")
  try:
    check_bytes(member.size, limits)
  except Unusable as error:
    return error
  if member.issparse():
    return Unusable("tar member is a sparse file")
  file.seek(member.offset_data)
  data = file.read(member.size)
  if len(data) < member.size:
    raise tarfile.ReadError("unexpected end of data")
  return data


def _entry(
  part: Part,
  name: str,
  key: str,
  group: dict[str, bytes | Unusable],
  seen: dict[str, int],
) -> Entry:
  seen[key] = seen.get(key, 0) + 1
  unique = key if seen[key] == 1 else f"{key}#{seen[key]}"
  where = f"{name}/{unique}"
  load = functools.partial(_load, group, where)
  return Entry(f"{part.prefix}/{unique}", where, load)


def _load(group: dict[str, bytes | Unusable], where: str) -> Item:
  targets, references = [], []
  for extension in sorted(group):
    word, _, suffix = extension.rpartition(".")
    if f".{suffix}" in images.SUFFIXES:
      wanted = targets if word in ("", "target") else references
      wanted.append(_bytes(group, extension))
  if len(targets) != 1:
    raise Unusable("no image" if not targets else "several target images")
  fields = _metadata(group)
  caption, missing = _caption(group, fields)
  return Item(
    caption=caption,
    kind=str(fields.get("kind") or "user"),
    target=targets[0],
    references=tuple(references),
    provenance={"where": where, **kept_fields(fields)},
    missing=missing,
  )


def _bytes(group: dict[str, bytes | Unusable], extension: str) -> bytes:
  content = group[extension]
  if isinstance(content, Unusable):
    raise content
  return content


def _metadata(group: dict[str, bytes | Unusable]) -> dict[str, Any]:
  if "json" not in group:
    return {}
  try:
    fields = json.loads(_bytes(group, "json"))
  except (ValueError, RecursionError) as error:
    raise Unusable("metadata is not JSON") from error
  return fields if isinstance(fields, dict) else {}


def _caption(
  group: dict[str, bytes | Unusable], fields: dict[str, Any]
) -> tuple[str, str]:
  for extension in _CAPTIONS:
    if extension in group:
      try:
        text = _bytes(group, extension).decode("utf-8-sig")
        return text, "empty caption"
      except UnicodeDecodeError as error:
        raise Unusable("caption is not UTF-8") from error
  return caption_of(fields)
