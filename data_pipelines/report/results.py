# SPDX-License-Identifier: Apache-2.0
"""Everything that a stage has written, read back for its page.

Shapes: N records.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from array_record.python import array_record_module

from data_pipelines import codec
from data_pipelines.engine import deciding, ingest, materialise, score, shards
from data_pipelines.errors import InputError


@dataclasses.dataclass(frozen=True)
class Results:
  """A stage after *decide*.

  Attributes:
    out: folder of the stage.
    table: N rows: metrics, scores, and the columns of the verdicts.
    filters: options by filter.
    order: the filters in use.
    manifest: of the stage; {} before *materialise* is done.
    left_out: rows of the items that never became records, as *ingest* wrote
      them, and of records that could not be resized.
    buckets: rows of *materialise*.
    log: verb -> what its last run noted.
  """

  out: pathlib.Path
  table: pa.Table
  filters: Mapping[str, Mapping[str, Any]]
  order: tuple[str, ...]
  manifest: Mapping[str, Any]
  left_out: list[dict[str, Any]]
  buckets: list[dict[str, Any]]
  log: Mapping[str, Mapping[str, Any]]

  def reached(self, name: str) -> np.ndarray:
    """[N] rows that no earlier filter had dropped."""
    before = ("", *self.order[self.order.index(name) :])
    return _isin(self.table["filter"], before)

  def dropped(self, name: str) -> np.ndarray:
    """[N] rows that the filter dropped."""
    return _isin(self.table["filter"], (name,))

  def passed(self) -> np.ndarray:
    """[N] rows that every filter let pass."""
    return _isin(self.table["filter"], ("",))

  def kept(self) -> np.ndarray:
    """[N] rows that are in the dataset, or would be before *materialise*."""
    lost = (row["id"] for row in self.buckets if row["status"] != "kept")
    return self.passed() & ~_isin(self.table["id"], lost)

  def sample(self, mask_N: np.ndarray, count: int) -> list[int]:
    """Up to `count` rows of a mask: those with the smallest hash of the id.

    The same in every run, and hardly another when records are added.
    """
    rows = np.flatnonzero(mask_N)
    return rows[np.argsort(self.hash_rank[rows])][:count].tolist()

  @functools.cached_property
  def hash_rank(self) -> np.ndarray:
    """[N] place of each row in the order of the hashes of the ids."""
    ids = self.table["id"].to_pylist()
    digests = [hashlib.sha256(id.encode()).digest() for id in ids]
    rank_N = np.empty(len(ids), np.int64)
    rank_N[sorted(range(len(ids)), key=digests.__getitem__)] = range(len(ids))
    return rank_N

  def records(self, rows: Iterable[int]) -> dict[int, codec.Record]:
    """The records of some rows, as they were ingested."""
    wanted: dict[int, dict[str, int]] = {}
    for row in set(rows):
      shard = self.table["shard"][row].as_py()
      wanted.setdefault(shard, {})[self.table["id"][row].as_py()] = row
    found = {}
    for shard, ids in wanted.items():
      found |= _read(self.out / ingest.FOLDER, shards.name(shard), ids)
    return found


def load(out: pathlib.Path) -> Results:
  """Reads a stage.

  Args:
    out: its folder.

  Raises:
    InputError: *decide* has not run.
  """
  verdicts_path = out / deciding.FOLDER / f"{deciding.STEM}.parquet"
  if not verdicts_path.is_file():
    raise InputError(
      f"{out} holds no verdicts; run `python -m data_pipelines.run` with the "
      "verb decide first."
    )
  verdicts = pq.read_table(verdicts_path)
  stems = sorted(p.stem for p in (out / ingest.FOLDER).glob("part-*.parquet"))
  names = sorted(p.name for p in (out / score.FOLDER).glob("*") if p.is_dir())
  table = deciding.load(out, len(stems), names)
  position = pc.index_in(table["id"], verdicts["id"].combine_chunks())
  for name in verdicts.column_names:
    if name not in table.column_names:
      table = table.append_column(name, verdicts[name].take(position))
  filters = json.loads(verdicts.schema.metadata[b"filters"])
  made = [
    row
    for path in sorted((out / materialise.FOLDER).glob("part-*.parquet"))
    for row in pq.read_table(path).to_pylist()
  ]
  left_out = [
    row
    for stem in stems
    for row in pq.read_table(
      out / ingest.FOLDER / f"{stem}.parquet",
      filters=[("status", "==", "quarantined")],
    ).to_pylist()
  ]
  left_out += [
    {"id": row["id"], "reason": row["reason"], "where": materialise.FOLDER}
    for row in made
    if row["status"] == "quarantined"
  ]
  return Results(
    out=out,
    table=table,
    filters=filters,
    order=tuple(filters),
    manifest=_read_json(out / "manifest.json"),
    left_out=left_out,
    buckets=made,
    log=_read_log(out / "log.jsonl"),
  )


def _isin(column: pa.ChunkedArray, words: Iterable[str]) -> np.ndarray:
  found = pc.is_in(column, pa.array(list(words), pa.string()))
  return np.array(found.to_numpy())


def _read(
  folder: pathlib.Path, stem: str, ids: Mapping[str, int]
) -> dict[int, codec.Record]:
  rows = pq.read_table(
    folder / f"{stem}.parquet",
    columns=["id", "position"],
    filters=[("position", ">=", 0)],
  ).to_pylist()
  places = {r["position"]: r["id"] for r in rows if r["id"] in ids}
  path = folder / f"{stem}.array_record"
  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    data = reader.read(list(places))
  except RuntimeError as error:
    raise InputError(
      f"Shard {path} is damaged ({error}); run the verb ingest again."
    ) from error
  finally:
    reader.close()
  return {ids[id]: codec.decode(d) for id, d in zip(places.values(), data)}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _read_log(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """The last line of every verb."""
  if not path.is_file():
    return {}
  lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
  return {line["verb"]: line for line in lines}
