# SPDX-License-Identifier: Apache-2.0
"""A feature cache: what frozen models make of a dataset, read in its place.

    manifest.json                        as of a dataset; `features` says what
                                         models and buckets made it
    part-00000-of-00002.array_record     rows, see `codec`
    part-00000-of-00002.npz              the index of that shard of the
                                         dataset, and where its rows are
    shared.array_record                  conditions that many rows share
    preview/                             a small dataset, for sample grids

One row is one record in one program (a record that serves several resolutions
has several). Records keep the numbers that they have in the dataset, so a
loader draws the same batches from either folder; a record that was damaged
stays damaged and is replaced by the same neighbour.

Shapes: T true encoder tokens after the system turn, C their width, N target
latents, n latents of one reference, Z latent channels; M records, R sets of
buckets.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source

from data_pipelines.errors import InputError
from data_pipelines.features.codec import (
  REMEDY,
  FeatureRow,
  SharedRow,
  States,
  decode_row,
  decode_shared,
)
from data_pipelines.loader.buckets import Bucket, Program
from data_pipelines.records import check_shard, read_index, read_manifest

VERSION = 1
SHARED_FILE = "shared.array_record"
# Rows of `shared.array_record` kept in memory; ours.
_SHARED_IN_MEMORY = 64


def pack_program(program: Program) -> list:
  """A program as plain JSON."""
  return [program.task, list(program.target), [list(b) for b in program[2]]]


class FeatureDataset:
  """Random access to the rows of a cache; safe from many threads.

  Attributes:
    path: the folder.
    about: what made the cache, `features` of its manifest.
    manifest: the shards of the dataset that it stands for: a loader's
      fingerprint is that of the dataset.
    index: of the dataset.
  """

  def __init__(self, path: str):
    """Opens the folder; reads no features.

    Raises:
      InputError: it is incomplete, damaged or of another version.
    """
    self.path = pathlib.Path(path)
    manifest = read_manifest(path)
    self.about = manifest["features"]
    if self.about["version"] != VERSION:
      raise InputError(
        f"Feature cache {path} has version {self.about['version']}, this code "
        f"reads {VERSION}; {REMEDY}"
      )
    check_shard(self.path / SHARED_FILE, self.about["shared"])
    self.manifest = self.about["source"]
    shards = [self.path / s["path"] for s in manifest["shards"]]
    counts = [s["records"] for s in manifest["shards"]]
    self.index = read_index(shards)
    self._programs = {
      Program(task, Bucket(*target), tuple(Bucket(*r) for r in references)): n
      for n, (task, target, references) in enumerate(self.about["programs"])
    }
    self._rows_RM, self._programs_RM = _read_places(shards, counts)
    self._source = _open([p for p, n in zip(shards, counts) if n])
    self._shared_source = _open([self.path / SHARED_FILE])
    self._shared = functools.lru_cache(_SHARED_IN_MEMORY)(self._read_shared)

  def __len__(self) -> int:
    return len(self.index)

  def sample(self, i: int, program: Program) -> dict[str, Any]:
    """Record `i` in one of its programs.

    Returns:
      dict of `id`, `caption`, `kind`, `task`, `size` and `reference_sizes`
      ((height, width) in pixels), `latents` [N, Z] and `condition`:
      `(without caption, with white references) -> (states [T, C], latents of
      each reference [n, Z])`.

    Raises:
      InputError: the row is damaged.
      LookupError: there is none for this program.
    """
    number = self._programs.get(program, -1)
    found = np.flatnonzero(self._programs_RM[:, i] == number)
    if number < 0 or not len(found):
      shapes = (program.target, *program.references)
      # No InputError: a loader would take it for a damaged row.
      raise LookupError(
        f"Feature cache {self.path} has no features of record {i} in the "
        f"shapes {program.task} {' '.join(map(str, shapes))}; {REMEDY}"
      )
    where = f"Row {i} of {self.path}"
    row = decode_row(
      _read(self._source, int(self._rows_RM[found[0], i]), where)
    )
    return {
      "id": row.id,
      "caption": row.caption,
      "kind": row.kind,
      "task": row.task,
      "size": tuple(program.target),
      "reference_sizes": tuple(map(tuple, program.references)),
      "latents": row.latents,
      "condition": functools.partial(self._condition, row),
    }

  def _condition(
    self, row: FeatureRow, empty: bool, white: bool
  ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    white = white and bool(row.references)
    references = self._shared(row.shared).references if white else None
    if empty and (white or not row.references):
      states = self._shared(row.shared).states
    else:
      name = "white" if white else "empty" if empty else "full"
      states = self._joined(row, row.states[name])
    return states, row.references if references is None else references

  def _joined(self, row: FeatureRow, states: States) -> np.ndarray:
    if not states.skip:
      return states.rows
    if states.base == "shared":
      base = self._shared(row.shared).states
    else:
      base = self._joined(row, row.states[states.base])
    return np.concatenate([base[: states.skip], states.rows])

  def _read_shared(self, number: int) -> SharedRow:
    where = f"Row {number} of {self.path / SHARED_FILE}"
    return decode_shared(_read(self._shared_source, number, where))

  def close(self) -> None:
    """Closes the files; the cache may be used again afterwards."""
    for source in (self._source, self._shared_source):
      source.__exit__(None, None, None)


def read_shared(folder: pathlib.Path) -> list[SharedRow]:
  """All shared rows of a cache, or of one that is being made."""
  path = folder / SHARED_FILE
  with _open([path]) as source:
    return [
      decode_shared(_read(source, i, f"Row {i} of {path}"))
      for i in range(len(source))
    ]


def _open(paths: Sequence[pathlib.Path]):
  return array_record_data_source.ArrayRecordDataSource(
    [str(path) for path in paths]
  )


def _read(source, i: int, where: str) -> bytes:
  try:
    return source[i]
  except RuntimeError as error:  # what ArrayRecord raises for bad checksums
    raise InputError(f"{where} is damaged on disk; {REMEDY}") from error


def _read_places(shards, counts) -> tuple[np.ndarray, np.ndarray]:
  """Row numbers through all shards and program numbers, both [R, M]."""
  rows, programs, first = [], [], 0
  for shard, count in zip(shards, counts):
    path = shard.with_suffix(".npz")
    try:
      with np.load(path) as arrays:
        rows.append(arrays["rows"] + first)
        programs.append(arrays["programs"])
    except (OSError, KeyError, ValueError) as error:
      raise InputError(
        f"Sidecar {path} is missing or damaged ({error}); {REMEDY}"
      ) from error
    first += count
  return np.concatenate(rows, axis=1), np.concatenate(programs, axis=1)
