# SPDX-License-Identifier: Apache-2.0
"""The sidecar of a shard: sizes of its records, without their pixels."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from data_pipelines.codec import Record
from data_pipelines.errors import InputError


@dataclasses.dataclass(frozen=True)
class Index:
  """Sizes of N records, so that bucketing never reads pixels.

  Attributes:
    task: [N] str.
    references: [N] number of references.
    width: [N] target width, pixels.
    height: [N] target height, pixels.
    reference_width: [sum(references)] widths, record after record.
    reference_height: [sum(references)] heights, record after record.
  """

  task: np.ndarray
  references: np.ndarray
  width: np.ndarray
  height: np.ndarray
  reference_width: np.ndarray
  reference_height: np.ndarray

  @functools.cached_property
  def _offsets(self) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(self.references)])

  def __len__(self) -> int:
    return len(self.task)

  def reference_sizes(self, i: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of each reference of record `i`."""
    span = slice(self._offsets[i], self._offsets[i + 1])
    widths = self.reference_width[span].tolist()
    return tuple(zip(widths, self.reference_height[span].tolist()))


_INDEX_FIELDS = tuple(field.name for field in dataclasses.fields(Index))


class IndexColumns:
  """The index of one shard while its records are written."""

  def __init__(self):
    self._columns: dict[str, list] = {name: [] for name in _INDEX_FIELDS}

  def add(self, record: Record) -> None:
    """Appends the sizes of one record."""
    columns = self._columns
    columns["task"].append(record.task)
    columns["references"].append(len(record.references))
    columns["width"].append(record.target.width)
    columns["height"].append(record.target.height)
    columns["reference_width"].extend(r.width for r in record.references)
    columns["reference_height"].extend(r.height for r in record.references)

  def save(self, path: pathlib.Path) -> None:
    """Writes the sidecar under exactly this name."""
    arrays = {
      name: np.asarray(column, dtype="U4" if name == "task" else np.int32)
      for name, column in self._columns.items()
    }
    with path.open("wb") as file:  # given a name, numpy appends a suffix
      np.savez(file, **arrays)


def read_index(shards: Sequence[pathlib.Path]) -> Index:
  """Joins the sidecars of shards.

  Raises:
    InputError: a sidecar is missing or damaged.
  """
  columns: dict[str, list] = {name: [] for name in _INDEX_FIELDS}
  for shard in shards:
    path = shard.with_suffix(".npz")
    try:
      with np.load(path) as arrays:
        for name in _INDEX_FIELDS:
          columns[name].append(arrays[name])
    except (OSError, KeyError, ValueError) as error:
      raise InputError(
        f"Sidecar {path} is missing or damaged ({error}); rebuild the dataset."
      ) from error
  return Index(**{k: np.concatenate(v) for k, v in columns.items()})
