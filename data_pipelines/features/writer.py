# SPDX-License-Identifier: Apache-2.0
"""Writes a feature cache shard by shard, so that it can be interrupted.

Everything is written into OUT.partial, which is renamed to OUT when the last
shard is there. A shard appears by renames too, and its .json last: that file
says that the shard is finished. Several processes may write different shards.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from data_pipelines.errors import InputError
from data_pipelines.features.check import difference
from data_pipelines.features.dataset import SHARED_FILE
from data_pipelines.records import SCHEMA_VERSION, load_manifest

# States of a network are noise to a compressor: zstd would save a quarter and
# halve the reading rate. group_size:1 makes random reads cheap.
_OPTIONS = "group_size:1,uncompressed"


def partial_folder(out: str) -> pathlib.Path:
  """Where a cache is built before it is complete."""
  path = pathlib.Path(out)
  return path.with_name(path.name + ".partial")


def is_complete(out: str, about: dict[str, Any]) -> bool:
  """Whether `out` is this very cache.

  Raises:
    InputError: `out` is something else.
  """
  if not os.path.lexists(out):
    return False
  try:
    found = load_manifest(out).get("features") or {}
  except InputError:
    found = {}
  name = difference(found, about)
  if name:
    raise InputError(
      f"Output {out} already exists and is not this cache ({name} differs); "
      "choose another or delete it."
    )
  return True


def prepare(out: str, about: dict[str, Any]) -> pathlib.Path:
  """Creates the partial folder, or checks that it is of this cache.

  Raises:
    InputError: it cannot be written or was begun for another cache.
  """
  folder = partial_folder(out)
  path = folder / "features.json"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp*"):  # of a process that was killed
      if leftover.is_dir():
        shutil.rmtree(leftover)
      else:
        leftover.unlink()
    if not path.exists():
      _write_json(path, about)
    name = difference(json.loads(path.read_text(encoding="utf-8")), about)
  except (OSError, ValueError) as error:
    raise InputError(
      f"Cannot use {folder} ({error}); choose another --out or delete it."
    ) from error
  if name:
    raise InputError(
      f"{folder} was begun for another cache ({name} differs); delete it or "
      "choose another --out."
    )
  return folder


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  temporary = path.with_name(path.name + ".tmp")
  text = json.dumps(value, indent=2, ensure_ascii=False)
  temporary.write_text(text, encoding="utf-8")
  os.replace(temporary, path)


class _File:
  """An ArrayRecord file that appears by a rename, or not at all."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._temporary = path.with_name(path.name + ".tmp")
    self._writer = array_record_module.ArrayRecordWriter(
      str(self._temporary), _OPTIONS
    )
    self.rows = 0

  def add(self, data: bytes) -> None:
    try:
      self._writer.write(data)
    except RuntimeError as error:
      raise self._failed(error) from error
    self.rows += 1

  def commit(self) -> None:
    try:
      self._writer.close()
      os.replace(self._temporary, self._path)
    except (OSError, RuntimeError) as error:
      raise self._failed(error) from error

  def discard(self) -> None:
    with contextlib.suppress(RuntimeError):
      self._writer.close()
    self._temporary.unlink(missing_ok=True)

  def _failed(self, error: Exception) -> InputError:
    return InputError(
      f"Writing {self._path} failed ({error}); check the free space."
    )


def write_shared(folder: pathlib.Path, rows: Sequence[bytes]) -> None:
  """Writes `shared.array_record`."""
  file = _File(folder / SHARED_FILE)
  try:
    for row in rows:
      file.add(row)
    file.commit()
  finally:
    file.discard()


def is_finished(folder: pathlib.Path, name: str) -> bool:
  """Whether shard `name` of the cache is complete."""
  return (folder / name).with_suffix(".json").exists()


class ShardWriter:
  """Writes one shard; complete after the `with` block, else absent."""

  def __init__(
    self, folder: pathlib.Path, name: str, sidecar: pathlib.Path, sets: int
  ):
    """Prepares a writer.

    Args:
      folder: the partial folder.
      name: file name of the shard, the dataset's own.
      sidecar: index of that shard in the dataset.
      sets: number of bucket sets R.
    """
    self._path = folder / name
    with np.load(sidecar) as arrays:
      self._arrays = dict(arrays)
    shape = sets, len(self._arrays["task"])
    self._places = {
      "rows": np.full(shape, -1), "programs": np.full(shape, -1, np.int32),
    }  # fmt: skip
    self._damaged = 0

  def __enter__(self) -> "ShardWriter":
    self._file = _File(self._path)
    return self

  def add(
    self, data: bytes, i: int, of_set: int, program: int, damaged: bool
  ) -> None:
    """Appends one row.

    Args:
      data: the encoded row.
      i: number of the record within the shard.
      of_set: number of the bucket set.
      program: number of the program.
      damaged: whether the row only says that its record is damaged.
    """
    self._places["rows"][of_set, i] = self._file.rows
    self._places["programs"][of_set, i] = program
    self._file.add(data)
    self._damaged += damaged

  def __exit__(self, exc_type, exc_value, traceback) -> None:
    try:
      if exc_type is None:
        self._commit()
    except OSError as error:
      raise InputError(
        f"Writing {self._path} failed ({error}); check the free space."
      ) from error
    finally:
      self._file.discard()

  def _commit(self) -> None:
    self._file.commit()
    sidecar = self._path.with_suffix(".npz")
    temporary = sidecar.with_name(sidecar.name + ".tmp")
    with temporary.open("wb") as file:
      np.savez(file, **self._arrays, **self._places)
    os.replace(temporary, sidecar)
    with self._path.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    described = {
      "path": self._path.name,
      "records": self._file.rows,
      "sha256": digest,
      "damaged": self._damaged,
      "bytes": self._path.stat().st_size,
    }
    _write_json(self._path.with_suffix(".json"), described)


def commit(out: str, names: Sequence[str], about: dict[str, Any]) -> dict:
  """Turns the partial folder into the cache; all shards must be finished.

  Args:
    out: the folder to create.
    names: the shards, in order.
    about: what made the cache.

  Returns:
    The manifest.

  Raises:
    InputError: there is no row, or `out` appeared meanwhile.
  """
  folder = partial_folder(out)
  markers = [(folder / name).with_suffix(".json") for name in names]
  shards = [json.loads(m.read_text(encoding="utf-8")) for m in markers]
  manifest = {
    "schema_version": SCHEMA_VERSION,
    "source": {"name": "features"},
    "shards": shards,
    "records": sum(shard["records"] for shard in shards),
    "quarantined": sum(shard["damaged"] for shard in shards),
    "features": about,
  }
  _write_json(folder / "manifest.json", manifest)
  if os.path.lexists(out):
    raise InputError(f"Output {out} already exists; choose another.")
  os.rename(folder, out)
  for marker in markers:
    (pathlib.Path(out) / marker.name).unlink()
  (pathlib.Path(out) / "features.json").unlink()
  return manifest
