# SPDX-License-Identifier: Apache-2.0
"""What every kind of input is turned into, and how one is left out.

A reader of a kind has two functions. `plan(path, prefix, size)` cuts the
input into parts, one per shard, reading as little as it can; it runs once.
`read(part, limits)` yields the entries of a part in a fixed order and runs in
a worker; only `entry.load()` may read images.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

CAPTION_FIELDS = ("text", "caption", "prompt", "instruction", "TEXT")
# Copied from an input's own metadata to the provenance of a record.
KEPT_FIELDS = ("url", "license", "source", "key", "language")
_KEPT_CHARACTERS = 2048
TEXT_FIELDS = (*CAPTION_FIELDS, *KEPT_FIELDS, "kind")


class Unusable(Exception):
  """Why one item is left out: 'category (details)'."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What an item may be at most; more is left out, not cut.

  Attributes:
    image_bytes: size of one encoded image.
    pixels: of one image; Pillow itself refuses more than 178,956,970.
    references: of one edit.
    caption_bytes: of one caption, in UTF-8.
    seconds: wall time of the work on one item.
    uncaptioned: whether an item may come without a caption, to be given one
      by `data_pipelines.captioner`.
  """

  image_bytes: int = 64 << 20
  pixels: int = 64_000_000
  references: int = 16
  caption_bytes: int = 1 << 20
  seconds: float = 30.0
  uncaptioned: bool = False


@dataclasses.dataclass(frozen=True)
class Item:
  """One input, its images still encoded and unchecked.

  Attributes:
    caption: the text as found; '' where `missing` says why there is none.
    kind: label for statistics.
    target: bytes of the image to learn.
    references: bytes of the images that an edit starts from, in order.
    provenance: where it came from; plain JSON values.
    missing: why there is no caption.
  """

  caption: str
  kind: str
  target: bytes
  references: tuple[bytes, ...]
  provenance: dict[str, Any]
  missing: str = "empty caption"


@dataclasses.dataclass(frozen=True)
class Entry:
  """One input before it is read.

  Attributes:
    id: of the record to be.
    where: a pointer for people: file and line, or archive and member.
    load: reads the item; raises Unusable, or OSError for an unreadable file.
  """

  id: str
  where: str
  load: Callable[[], Item]


@dataclasses.dataclass(frozen=True)
class Part:
  """What becomes one shard.

  Attributes:
    kind: of the input, a key of `plan.READERS`.
    path: file or folder.
    prefix: start of every id.
    start: first line, row group or entry.
    stop: after the last one.
    digest: changes when the part's input changes.
    entries: listed beforehand, where planning had to list them anyway; plain
      JSON values.
  """

  kind: str
  path: str
  prefix: str
  start: int
  stop: int
  digest: str
  entries: tuple[dict[str, Any], ...] = ()


def digest(*values: Any) -> str:
  """SHA-256 of plain JSON values."""
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode("utf-8")).hexdigest()


def state(path: str | os.PathLike) -> list[int]:
  """Size and time of change of a file, without reading it."""
  try:
    found = os.stat(path)
  except OSError:
    return []
  return [found.st_size, found.st_mtime_ns]


def printable(name: str) -> str:
  """A file name as valid Unicode; bytes that are no UTF-8 become \\xNN."""
  raw = name.encode("utf-8", "surrogateescape")
  return raw.decode("utf-8", "backslashreplace")


def read_file(path: str | os.PathLike, limits: Limits) -> bytes:
  """The bytes of an image file.

  Raises:
    Unusable: the file is larger than the limit, or its name cannot be one.
    OSError: it cannot be read.
  """
  path = pathlib.Path(path)
  try:
    check_bytes(path.stat().st_size, limits)
    return path.read_bytes()
  except ValueError as error:  # a null byte in the name
    raise Unusable(f"unreadable file ({error})") from error


def check_bytes(size: int, limits: Limits) -> None:
  """Raises Unusable for an image file of so many bytes."""
  if size > limits.image_bytes:
    raise Unusable(
      f"image over {limits.image_bytes} bytes ({size}; limits.image_bytes)"
    )


def lost(id: str, where: str, reason: str) -> Entry:
  """The entry of what damage has taken; reading it says so."""

  def load() -> Item:
    raise Unusable(printable(reason))

  return Entry(id, where, load)


def caption_of(fields: dict[str, Any]) -> tuple[str, str]:
  """The caption in a row of metadata, and why there is none if it is ''."""
  for name in CAPTION_FIELDS:
    value = fields.get(name)
    if isinstance(value, str):
      return value, "empty caption"
  return "", "no caption"


def kept_fields(fields: dict[str, Any]) -> dict[str, Any]:
  """The part of a row of metadata that goes into the provenance."""
  kept = {}
  for name in KEPT_FIELDS:
    value = fields.get(name)
    if isinstance(value, str):
      value = printable(value[:_KEPT_CHARACTERS])
    if isinstance(value, (str, int, float)):
      kept[name] = value
  return kept
