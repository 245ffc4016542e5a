# SPDX-License-Identifier: Apache-2.0
"""The pictures and cut-outs of the user, listed before they are read.

A folder of images needs no captions; a `.txt` beside an image, or a line of
`metadata.jsonl` with `file_name`, may give `text`, and `name` and `name_zh`
for what a cut-out shows. A mask of an object is NAME_mask.png beside NAME.*,
the field `mask` of that line, or the column `mask` of a Parquet table: white
where the object is, of the size of the image. Datasets, and stages of
`data_pipelines.run`, give the targets of their records.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_pipelines import records
from data_pipelines.edit_pairs.pair import OBJECT, Name
from data_pipelines.engine import decoding
from data_pipelines.errors import InputError
from data_pipelines.images import SUFFIXES
from data_pipelines.sources import datasets, tables
from data_pipelines.sources.items import (
  Limits,
  Unusable,
  caption_of,
  kept_fields,
  printable,
  read_file,
)

_MASK = "_mask"
_FEW_WORDS = 3  # a caption as short as that is a name
METADATA = "metadata.jsonl"


@dataclasses.dataclass(frozen=True)
class Source:
  """One picture before it is read.

  Attributes:
    kind: 'file', 'record' or 'row'.
    path: of the file, the dataset or the table.
    number: of the record or row.
    id: for the provenance.
    fields: what a folder says of it, else empty: read with the pixels.
    mask: path of the mask of a file, '' if none.
  """

  kind: str
  path: str
  number: int
  id: str
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)
  mask: str = ""


@dataclasses.dataclass(frozen=True)
class Loaded:
  """One picture as it was found.

  Attributes:
    encoded: its bytes.
    mask: bytes of its mask, or None.
    caption: '' if none.
    name: of the object in it.
    kept: fields of its metadata for the provenance.
  """

  encoded: records.EncodedImage
  mask: bytes | None
  caption: str
  name: Name
  kept: dict[str, Any]


def find(inputs: Sequence[str]) -> list[Source]:
  """Lists inputs; nothing is decoded.

  Args:
    inputs: folders of images, dataset folders, stages, Parquet files.

  Raises:
    InputError: an input is missing, of no known kind, or has no image.
  """
  found: list[Source] = []
  for name in inputs:
    path = pathlib.Path(os.path.normpath(name))
    if datasets.is_stage(path):
      datasets.read_stage(path)  # refuses one that is not complete
      path = path / "data"
    if (path / "manifest.json").is_file():
      count = records.read_image_manifest(path)["records"]
      listed = [
        Source("record", str(path), i, f"{printable(path.name)}:{i}")
        for i in range(count)
      ]
    elif path.is_dir():
      listed = list(_folder(path))
    elif path.suffix.lower() == ".parquet" and path.is_file():
      listed = _table(path)
    else:
      raise InputError(
        f"Input {path} is no folder, dataset or Parquet file; check --input."
      )
    if not listed:
      raise InputError(f"Input {path} holds no image; check --input.")
    found += listed
  return found


def _folder(folder: pathlib.Path) -> Iterator[Source]:
  files = [
    path
    for path in sorted(folder.rglob("*"))
    if not any(p.startswith(".") for p in path.relative_to(folder).parts)
  ]
  fields: dict[pathlib.Path, dict[str, Any]] = {}
  for path in files:
    if path.name == METADATA:
      fields |= _metadata(path)
  named = {
    pathlib.Path(os.path.normpath(path.parent / line["mask"]))
    for path, line in fields.items()
    if isinstance(line.get("mask"), str)
  }
  for path in files:
    is_mask = path in named or path.stem.endswith(_MASK)
    if path.suffix.lower() not in SUFFIXES or is_mask:
      continue
    line = fields.get(path, {})
    beside = path.with_name(f"{path.stem}{_MASK}.png")
    mask = path.parent / line["mask"] if line.get("mask") else beside
    if not line and (text := path.with_suffix(".txt")).is_file():
      line = {"text": text.read_text("utf-8-sig", "replace").strip()}
    yield Source(
      "file", os.fspath(path), 0,
      printable(f"{folder.name}/{path.relative_to(folder).as_posix()}"),
      line, os.fspath(mask) if line.get("mask") or mask.is_file() else "",
    )  # fmt: skip


def _metadata(path: pathlib.Path) -> dict[pathlib.Path, dict[str, Any]]:
  """Lines by the image that they speak of; those of no use are none."""
  found = {}
  for line in path.read_bytes().splitlines():
    try:
      fields = json.loads(line)
      found[
        pathlib.Path(os.path.normpath(path.parent / fields["file_name"]))
      ] = fields
    except (ValueError, KeyError, TypeError, RecursionError):
      continue
  return found


def _table(path: pathlib.Path) -> list[Source]:
  if not tables.has_images(path):
    raise InputError(
      f"{path} has no column of images among {list(tables.IMAGES)}; rename "
      "the column that holds the encoded images."
    )
  try:
    count = pq.read_metadata(path).num_rows
  except (OSError, pa.ArrowException) as error:
    raise InputError(
      f"{path} is damaged ({str(error).splitlines()[0]}); copy it again."
    ) from error
  name = printable(path.name)
  return [Source("row", str(path), i, f"{name}:{i}") for i in range(count)]


def load(source: Source, limits: Limits) -> Loaded:
  """Reads the bytes of a picture and its header.

  Raises:
    Unusable: it is missing, damaged, no image or over a limit.
  """
  data, mask, fields = _READ[source.kind](source, limits)
  caption, _ = caption_of(fields)
  return Loaded(
    encoded=decoding.probe(data, limits),
    mask=mask,
    caption=caption.strip(),
    name=name_of(fields, caption),
    kept=kept_fields(fields),
  )


def name_of(fields: dict[str, Any], caption: str) -> Name:
  """What the object in a picture is called, by its fields or a short caption.

  A name in one script says nothing in the other: there it is 'object'.
  """
  given = fields.get("name")
  if not isinstance(given, str) or not given.strip():
    given = caption if len(caption.split()) <= _FEW_WORDS else ""
  given = given.strip().rstrip(".。")
  for article in ("a ", "an ", "the "):
    given = given.removeprefix(article).removeprefix(article.capitalize())
  if not given or len(given) > 40:
    return OBJECT
  chinese = fields.get("name_zh")
  if isinstance(chinese, str) and chinese.strip():
    return Name(given, chinese.strip())
  return Name(given, OBJECT.zh) if given.isascii() else Name(OBJECT.en, given)


def _read_file(source: Source, limits: Limits):
  try:
    data = read_file(source.path, limits)
    mask = read_file(source.mask, limits) if source.mask else None
  except OSError as error:
    raise Unusable(f"unreadable file ({error.strerror})") from error
  return data, mask, source.fields


def _read_record(source: Source, limits: Limits):
  try:
    record = _dataset(source.path)[source.number]
  except InputError as error:
    raise Unusable(f"damaged record ({error})") from error
  # An instruction does not describe its result.
  caption = record.caption if record.task == "t2i" else ""
  return record.target.data, None, {**record.provenance, "text": caption}


@functools.lru_cache(maxsize=8)
def _dataset(path: str) -> records.Dataset:
  return records.open_dataset(path)


def _read_row(source: Source, limits: Limits):
  group, first = 0, 0
  file = _parquet(source.path)
  while source.number >= first + file.metadata.row_group(group).num_rows:
    first += file.metadata.row_group(group).num_rows
    group += 1
  try:
    row = _group(source.path, group).slice(source.number - first, 1)
  except (OSError, pa.ArrowException) as error:
    text = str(error).splitlines()[0]
    raise Unusable(f"damaged Parquet file ({text})") from error
  fields = row.to_pylist()[0]
  name = tables.image_column(file.schema_arrow, pathlib.Path(source.path))
  item = tables.load_row(fields, name, source.id, limits)
  mask = fields.get("mask")
  mask = mask.get("bytes") if isinstance(mask, dict) else mask
  return item.target, mask if isinstance(mask, bytes) else None, fields


@functools.lru_cache(maxsize=8)
def _parquet(path: str) -> pq.ParquetFile:
  return pq.ParquetFile(path)


@functools.lru_cache(maxsize=2)
def _group(path: str, group: int) -> pa.Table:
  return _parquet(path).read_row_group(group)


_READ = {"file": _read_file, "record": _read_record, "row": _read_row}


def region_of(loaded: Loaded, image: Image.Image, limits: Limits):
  """The mask of the object in a decoded picture, mode 'L'.

  Raises:
    Unusable: there is none, it is damaged, empty or of another size.
  """
  if loaded.mask is not None:
    encoded = decoding.probe(loaded.mask, limits)
    mask = decoding.decode(encoded, limits).convert("L")
    if mask.size != image.size:
      raise Unusable(f"mask of another size ({mask.size}, not {image.size})")
  elif image.mode == "RGBA":
    mask = image.getchannel("A")
  else:
    raise Unusable("no cut-out (neither alpha nor mask)")
  low, high = np.asarray(mask).min(), np.asarray(mask).max()
  if high < 128 or low > 127:
    raise Unusable("no cut-out (all or nothing is transparent)")
  return mask
