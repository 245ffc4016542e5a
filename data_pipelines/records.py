# SPDX-License-Identifier: Apache-2.0
"""The on-disk contract: records, dataset folders, their writer and reader.

A dataset is a folder:

    manifest.json                        shards, counts, checksums, source
    part-00000-of-00002.array_record     msgpack records, images still encoded
    part-00000-of-00002.npz              sizes of every record of that shard
    quarantine.jsonl                     what was left out, and why

The folder appears by one rename, so it is either complete or absent.
"""

import atexit
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

from array_record.python import array_record_data_source, array_record_module

from data_pipelines.codec import SCHEMA_VERSION, TASKS, Record, decode, encode
from data_pipelines.errors import InputError
from data_pipelines.images import EncodedImage, decode_image, encode_png
from data_pipelines.shard_file import Index, IndexColumns, read_index

__all__ = [
  "SCHEMA_VERSION",
  "TASKS",
  "Dataset",
  "DatasetWriter",
  "EncodedImage",
  "Index",
  "Record",
  "check_shard",
  "decode",
  "decode_image",
  "encode",
  "encode_png",
  "load_manifest",
  "open_dataset",
  "read_image_manifest",
  "read_index",
  "read_manifest",
]


class _Shard:
  """An ArrayRecord file being written, with its sidecar."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.records = 0
    # group_size:1 makes random reads cheap (Grain asks for it).
    self._writer = array_record_module.ArrayRecordWriter(
      str(path), "group_size:1"
    )
    self._columns = IndexColumns()

  def add(self, record: Record) -> None:
    data = encode(record)
    try:
      self._writer.write(data)
    except RuntimeError as error:
      raise InputError(
        f"Writing {self.path} failed ({error}); check the free space."
      ) from error
    self._columns.add(record)
    self.records += 1

  def close(self) -> None:
    self._writer.close()

  def write_index(self) -> None:
    self._columns.save(self.path.with_suffix(".npz"))

  def describe(self) -> dict[str, Any]:
    with self.path.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": self.path.name, "records": self.records, "sha256": digest}


class DatasetWriter:
  """Writes a dataset folder; complete after the `with` block, else absent.

  Records go round robin over the shards, so the bytes on disk depend only on
  the order of `add` calls.
  """

  def __init__(
    self,
    out_dir: str | os.PathLike,
    shards: int = 1,
    source: dict[str, Any] | None = None,
  ):
    """Prepares a writer; nothing is created before the `with` block.

    Args:
      out_dir: the folder to create.
      shards: number of ArrayRecord files.
      source: how the dataset was made; plain JSON, copied to the manifest.

    Raises:
      InputError: `out_dir` exists, or `shards` is below 1.
    """
    self._out = pathlib.Path(out_dir)
    if os.path.lexists(self._out):
      raise InputError(
        f"Output {self._out} already exists; choose another or delete it."
      )
    if shards < 1:
      raise InputError(f"A dataset needs at least 1 shard, not {shards}.")
    self._temporary = self._out.with_name(f"{self._out.name}.tmp-{os.getpid()}")
    self._shard_count = shards
    self._source = source or {}
    self._shards: list[_Shard] = []
    self._counts: dict[str, dict[str, int]] = {"by_task": {}, "by_kind": {}}
    self._records = 0
    self._quarantined = 0

  def __enter__(self) -> "DatasetWriter":
    # Ctrl-C may strike between creating the folder and entering the block.
    atexit.register(self._remove_temporary)
    try:
      # A leftover of that name belongs to a dead process with our pid.
      self._remove_temporary()
      self._temporary.mkdir(parents=True)
      self._quarantine = open(
        self._temporary / "quarantine.jsonl", "w", encoding="utf-8"
      )
    except OSError as error:
      raise InputError(
        f"Cannot write to {self._temporary.parent} ({error.strerror}); choose "
        "a folder that you may write to."
      ) from error
    for i in range(self._shard_count):
      name = f"part-{i:05d}-of-{self._shard_count:05d}.array_record"
      self._shards.append(_Shard(self._temporary / name))
    return self

  def add(self, record: Record) -> None:
    """Appends one record."""
    self._shards[self._records % self._shard_count].add(record)
    self._records += 1
    for counts, key in (("by_task", record.task), ("by_kind", record.kind)):
      self._counts[counts][key] = self._counts[counts].get(key, 0) + 1

  def quarantine(self, id: str, reason: str, where: str) -> None:
    """Notes one example that was left out.

    Args:
      id: the example.
      reason: why, in words for the user.
      where: the file, line or step at fault.
    """
    line = {"id": id, "reason": reason, "where": where}
    self._quarantine.write(json.dumps(line, ensure_ascii=False) + "\n")
    self._quarantined += 1

  def __exit__(self, exc_type, exc_value, traceback) -> None:
    try:
      self._quarantine.close()
      if exc_type is None:
        self._commit()
    except (OSError, RuntimeError) as error:  # ArrayRecord: RuntimeError
      raise InputError(
        f"Writing {self._out} failed ({error}), so no dataset was created; "
        "check the free space and try again."
      ) from error
    finally:
      for shard in self._shards:
        with contextlib.suppress(RuntimeError):
          shard.close()  # again after a commit: does nothing
      self._remove_temporary()
      atexit.unregister(self._remove_temporary)

  def _remove_temporary(self) -> None:
    # After a commit the name is gone and this does nothing.
    shutil.rmtree(self._temporary, ignore_errors=True)

  def _commit(self) -> None:
    if not self._records:
      raise InputError(
        f"No record was written to {self._out} ({self._quarantined} were "
        "quarantined), so no dataset was created; check the input."
      )
    for shard in self._shards:
      shard.close()
      shard.write_index()
    manifest = {
      "schema_version": SCHEMA_VERSION,
      "source": self._source,
      "shards": [shard.describe() for shard in self._shards],
      "records": self._records,
      "quarantined": self._quarantined,
      **self._counts,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (self._temporary / "manifest.json").write_text(text, encoding="utf-8")
    if os.path.lexists(self._out):  # appeared while we wrote
      raise InputError(f"Output {self._out} already exists; choose another.")
    os.rename(self._temporary, self._out)


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
  """Reads the manifest of a dataset folder and checks the shards against it.

  Raises:
    InputError: see `load_manifest`; or a shard is missing or has another
      record count.
  """
  manifest = load_manifest(path)
  for shard in manifest["shards"]:
    check_shard(pathlib.Path(path) / shard["path"], shard["records"])
  return manifest


def read_image_manifest(path: str | os.PathLike) -> dict[str, Any]:
  """`read_manifest` of a dataset with images.

  Raises:
    InputError: see `read_manifest`; or the folder is a feature cache.
  """
  manifest = read_manifest(path)
  if "features" in manifest:
    raise InputError(
      f"{path} is a feature cache and holds no images; give the dataset that "
      "it was made of."
    )
  return manifest


def load_manifest(path: str | os.PathLike) -> dict[str, Any]:
  """Reads the manifest of a dataset folder; opens no shard.

  Raises:
    InputError: the folder is missing, no dataset, empty, or of another schema
      version.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise InputError(f"Dataset folder {folder} does not exist; check the path.")
  try:
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    version, records, _ = (
      manifest[name] for name in ("schema_version", "records", "shards")
    )
  except FileNotFoundError as error:
    raise InputError(
      f"{folder} is not a dataset (no manifest.json); create one with "
      "`python -m data_pipelines.imagefolder`."
    ) from error
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"The manifest.json of {folder} is unreadable ({error}); rebuild the "
      "dataset."
    ) from error
  if version != SCHEMA_VERSION:
    raise InputError(
      f"Dataset {folder} has schema version {version}, this code reads "
      f"{SCHEMA_VERSION}; rebuild the dataset."
    )
  if not records:
    raise InputError(f"Dataset {folder} holds no records; rebuild it.")
  return manifest


def check_shard(path: pathlib.Path, expected: int) -> None:
  """Raises InputError unless the file has so many records."""
  # ArrayRecordReader reports 0 records, without an error, both for a missing
  # and for a truncated file; only the manifest reveals the damage.
  found = 0
  if path.is_file():
    reader = array_record_module.ArrayRecordReader(str(path))
    found = reader.num_records()
    with contextlib.suppress(RuntimeError):  # what a truncated file answers
      reader.close()
  if found != expected:
    raise InputError(
      f"Shard {path} holds {found} records, its manifest says {expected}; "
      "copy the file again or rebuild the dataset."
    )


class Dataset:
  """Random access to the records of a folder; safe from many threads."""

  def __init__(self, path: str | os.PathLike):
    """See `open_dataset`."""
    self.path = pathlib.Path(path)
    self.manifest = read_image_manifest(path)
    # ArrayRecordDataSource refuses files without records.
    shards = [s for s in self.manifest["shards"] if s["records"]]
    self._source = array_record_data_source.ArrayRecordDataSource(
      [str(self.path / shard["path"]) for shard in shards]
    )
    self.index = read_index([self.path / shard["path"] for shard in shards])
    if len(self.index) != len(self._source):
      raise InputError(
        f"Sidecars (.npz) in {self.path} list {len(self.index)} records, the "
        f"shards hold {len(self._source)}; rebuild the dataset."
      )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> Record:
    """Reads record `i`; raises InputError when its bytes are damaged."""
    if not 0 <= i < len(self):
      raise IndexError(i)
    try:
      return decode(self._source[i])
    except RuntimeError as error:  # what ArrayRecord raises for bad checksums
      raise InputError(
        f"Record {i} of {self.path} is damaged on disk; copy the dataset "
        "again or rebuild it."
      ) from error

  def close(self) -> None:
    """Closes the files; the dataset may be used again afterwards."""
    self._source.__exit__(None, None, None)


def open_dataset(path: str | os.PathLike) -> Dataset:
  """Opens a dataset folder: `len(d)`, `d[i] -> Record`, `d.index`.

  Raises:
    InputError: see `read_manifest`; or a sidecar is missing or damaged.
  """
  return Dataset(path)
