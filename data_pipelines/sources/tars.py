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


def plan(path: pathlib.Path, prefix: str, size: int) -> list[Part]:
  """A tar is one part whatever `size` says: it has no index."""
  return [Part("tar", os.fspath(path), prefix, 0, 1, digest(state(path)))]


def read(part: Part, limits: Limits) -> Iterator[Entry]:
  """The samples of the tar, and one entry for what is lost to damage."""
  path = pathlib.Path(part.path)
  name = printable(path.name)
  seen: dict[str, int] = {}
  group: dict[str, bytes | Unusable] = {}
  key = last = None
  error = None
  try:
    for member_key, extension, content in _members(path, limits):
      # The same extension again starts another sample of that name.
      if group and (member_key != key or extension in group):
        yield _entry(part, name, key, group, seen)
        group = {}
      last = key = member_key
      group[extension] = content
  except _DAMAGED as damage:
    error = damage
  if group:
    yield _entry(part, name, key, group, seen)
  if error is not None:
    after = f"after {last}" if last else "from the start"
    reason = f"damaged tar ({error}; everything {after} is lost)"
    yield lost(f"{part.prefix}#rest", name, reason)


def _members(
  path: pathlib.Path, limits: Limits
) -> Iterator[tuple[str, str, bytes | Unusable]]:
  """Key, extension and content of every member that belongs to a sample."""
  with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
    for member in tar:
      base = os.path.basename(member.name)
      stem, dot, extension = base.partition(".")
      if member.isdir() or not dot or not stem or stem.startswith("__"):
        continue
      key = printable(os.path.join(os.path.dirname(member.name), stem))
      yield key, extension.lower(), _content(tar, member, limits)
      tar.members.clear()  # tarfile keeps the header of every member
    # tarfile takes a damaged header for the end; the end is a block of zeros.
    file.seek(tar.offset)
    block = file.read(_BLOCK)
    if block.strip(b"\0") or 0 < len(block) < _BLOCK:
      raise tarfile.ReadError("damaged header")


def _open(path: pathlib.Path) -> IO[bytes]:
  return gzip.open(path) if path.suffix in (".gz", ".tgz") else path.open("rb")


def _content(
  tar: tarfile.TarFile, member: tarfile.TarInfo, limits: Limits
) -> bytes | Unusable:
  if not member.isreg():
    return Unusable("tar member is not a file")
  try:
    check_bytes(member.size, limits)
  except Unusable as error:
    return error
  data = tar.extractfile(member).read()
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
  return Item(
    caption=_caption(group, fields),
    kind=str(fields.get("kind") or "user"),
    target=targets[0],
    references=tuple(references),
    provenance={"where": where, **kept_fields(fields)},
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


def _caption(group: dict[str, bytes | Unusable], fields: dict[str, Any]) -> str:
  for extension in _CAPTIONS:
    if extension in group:
      try:
        return _bytes(group, extension).decode("utf-8-sig")
      except UnicodeDecodeError as error:
        raise Unusable("caption is not UTF-8") from error
  return caption_of(fields)
