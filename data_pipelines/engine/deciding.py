# SPDX-License-Identifier: Apache-2.0
"""The fourth verb: who stays, from the metrics and scores of all shards.

    decide/verdicts.parquet  one row per input record, see
                             `data_pipelines.filters.decide`

Pixels are not touched, so a changed threshold costs seconds.
"""

import pathlib
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.engine import ingest, measure, score, shards
from data_pipelines.engine.config import StageConfig
from data_pipelines.errors import InputError
from data_pipelines.filters import decide

FOLDER = "decide"
STEM = "verdicts"
CODE = ("data_pipelines.filters", "data_pipelines.engine.deciding")


def run(
  out: pathlib.Path, count: int, fingerprint: str, config: StageConfig
) -> dict[str, float]:
  """Writes the verdicts.

  Args:
    out: folder of the stage.
    count: number of shards.
    fingerprint: see `shards`.
    config: of the stage.

  Returns:
    Seconds of each filter.

  Raises:
    InputError: a record's id occurs twice, a column is missing, or writing
      failed.
  """
  table = load(out, count, tuple(config.score))
  _check_ids(table, out)
  verdicts, seconds = decide.decide_timed(
    table, config.filters, config.filter_order, config.seed
  )
  with shards.write(out / FOLDER, STEM, fingerprint) as shard:
    shard.table(verdicts)
    dropped = pc.value_counts(verdicts["filter"]).to_pylist()
    found = {row["values"]: row["counts"] for row in dropped}
    shard.counts = {
      "kept": found.pop("", 0),
      # In order of the config, filters that dropped nothing included.
      "dropped": [[n, found.get(n, 0)] for n in config.filter_order],
    }
  return seconds


def load(out: pathlib.Path, count: int, scores: Sequence[str]) -> pa.Table:
  """Metrics and scores of the input records of all shards.

  Args:
    out: folder of the stage.
    count: number of shards.
    scores: names of the scores to join.

  Returns:
    `id`, `shard`, the columns of *measure* and of the scores.

  Raises:
    InputError: a shard is incomplete, or two scores share a column.
  """
  tables = [_load_shard(out, i, scores) for i in range(count)]
  return pa.concat_tables(tables, promote_options="permissive")


def _load_shard(
  out: pathlib.Path, index: int, scores: Sequence[str]
) -> pa.Table:
  stem = shards.name(index)
  table = pq.read_table(out / measure.FOLDER / f"{stem}.parquet")
  for name in scores:
    found = pq.read_table(out / score.FOLDER / name / f"{stem}.parquet")
    if not found["id"].equals(table["id"]):
      found = found.take(pc.index_in(table["id"], found["id"].combine_chunks()))
    for column in found.column_names:
      if column == "id":
        continue
      if column in table.column_names:
        raise InputError(
          f"Column {column!r} of score {name!r} exists already; rename it or "
          "take one of the two scores out of config.score."
        )
      table = table.append_column(column, found[column])
  rows = ingest.record_rows(out, stem)
  table = table.append_column(
    "shard", pa.array([index] * len(table), pa.int32())
  )
  return table.filter(pc.equal(rows["status"], "ok"))


def _check_ids(table: pa.Table, out: pathlib.Path) -> None:
  counts = pc.value_counts(table["id"])
  twice = counts.filter(pc.greater(counts.field("counts"), 1))
  if not len(twice):
    return
  id = twice[0]["values"].as_py()
  rows = table.filter(pc.equal(table["id"], id))
  first, second = rows["shard"].to_pylist()[:2]
  raise InputError(
    f"Record {id!r} is both in shard {first} and in shard {second} of {out}; "
    "give each dataset as input only once."
  )


def kept_bits(out: pathlib.Path, count: int) -> list[str]:
  """For every shard '1' or '0' per record of its file, in order.

  Raises:
    InputError: the verdicts are not complete.
  """
  shards.sha256_of(out / FOLDER, STEM, ".parquet")
  table = pq.read_table(
    out / FOLDER / f"{STEM}.parquet", columns=["id", "kept"]
  )
  kept = set(table["id"].filter(table["kept"]).to_pylist())
  return [
    "".join("1" if id in kept else "0" for id in _ids(out, i))
    for i in range(count)
  ]


def _ids(out: pathlib.Path, index: int) -> Iterable[str]:
  """Ids of the records of a shard, '' for those that are no input."""
  rows = ingest.record_rows(out, shards.name(index)).to_pylist()
  return [row["id"] if row["status"] == "ok" else "" for row in rows]
