# SPDX-License-Identifier: Apache-2.0
"""The *decide* verb: who stays, from the columns of all shards.

Filters run in the order of the config, each on what the earlier ones left.
Some look at single rows (`rules`), some at all rows together: duplicates,
evaluation data, the distribution.

Shapes: N rows.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.errors import InputError
from data_pipelines.filters import (
  decontaminate,
  distribution,
  duplicates,
  metrics,
  rules,
)

_DUPLICATES = {
  "exact_duplicate": duplicates.exact,
  "perceptual_duplicate": duplicates.perceptual,
  "embedding_duplicate": duplicates.embedding,
}
# Filters that need other rows or other files than the one judged.
_OPTIONS = {
  **duplicates.OPTIONS,
  "distribution": distribution.OPTIONS,
  "decontaminate": decontaminate.OPTIONS,
}
_OPTIONAL = {
  **dict.fromkeys(duplicates.OPTIONS, duplicates.OPTIONAL),
  "distribution": distribution.OPTIONS,
  "decontaminate": decontaminate.OPTIONAL,
}

Filters = Mapping[str, Mapping[str, Any]]


def check(filters: Filters, order: Sequence[str]) -> None:
  """Raises InputError, before expensive work, unless `decide` could run.

  Args:
    filters: name -> options.
    order: names, first to last.
  """
  if len(set(order)) != len(order):
    raise InputError(
      f"The filter order {tuple(order)} names a filter twice; remove one."
    )
  for name in order:
    if name not in filters:
      raise InputError(
        f"Filter {name!r} stands in the order but has no options; add "
        f"config.filters.{name}, {{}} if it needs none."
      )
    options = filters[name]
    if name in _OPTIONS:
      known = _OPTIONS[name]
      unknown = sorted(set(options) - known)
      needed = known - _OPTIONAL.get(name, set())
      missing = sorted(n for n in needed if options.get(n) is None)
      if unknown or missing:
        raise InputError(
          f"Filter {name!r} takes the options {sorted(known)}; unknown "
          f"{unknown}, missing {missing}."
        )
    elif name != "broken":
      rules.parse(name, options)
  if "distribution" in order:
    distribution.check(filters["distribution"])


def score_columns(filters: Filters, order: Sequence[str]) -> set[str]:
  """Columns that the filters read and *measure* does not write."""
  return _needed(filters, order) - metrics.METRICS.keys()


def _needed(filters: Filters, order: Sequence[str]) -> set[str]:
  needed = set()
  for name in order:
    if name == "embedding_duplicate":
      needed.add("embedding")
    elif name == "distribution":
      column = filters[name].get("column") or "kind"
      needed.add("embedding" if column == distribution.CLUSTER else column)
    elif name not in _OPTIONS and name != "broken":
      needed.update(b.column for b in rules.parse(name, filters[name]))
  return needed


def decide(
  table: pa.Table, filters: Filters, order: Sequence[str], seed: int
) -> pa.Table:
  """Judges every row; see `decide_timed`."""
  return decide_timed(table, filters, order, seed)[0]


def decide_timed(
  table: pa.Table, filters: Filters, order: Sequence[str], seed: int
) -> tuple[pa.Table, dict[str, float]]:
  """Judges every row.

  Args:
    table: `id`, the columns of metrics.METRICS and of the scores in use, and
      `error`, null unless an image could not be read; one row per record of
      all shards.
    filters: name -> options.
    order: names of the filters to apply.
    seed: of the hash that breaks ties and draws samples.

  Returns:
    A table with the rows of `table` in order: `id`, `shard` (if `table` has
    it), `kept`, `filter` (the first that dropped the row, else ''), `value`,
    `threshold`, `detail`, `duplicate_of` (an id), and for every filter of
    single rows `drops.NAME`, whatever the others said. The schema metadata
    'filters' holds the options in use as JSON. And the seconds of each filter.

  Raises:
    InputError: see `check`; a column is missing or, for a readable record,
      empty.
  """
  check(filters, order)
  _check_columns(table, filters, order)
  seconds, single = {}, {}
  for name in order:
    if name not in _OPTIONS:
      start = time.monotonic()
      if name == "broken":
        single[name] = rules.broken(table)
      else:
        bounds = rules.parse(name, filters[name])
        single[name] = rules.apply(table, bounds)
      seconds[name] = time.monotonic() - start
  healthy_N = ~np.any(
    [v.drop_N for v in single.values()] or [np.zeros(table.num_rows, bool)],
    axis=0,
  )
  rank_N = duplicates.rank_rows(table, healthy_N, seed)
  result = _Result(table.num_rows)
  for name in order:
    if name in single:
      verdict = single[name]
    else:
      start = time.monotonic()
      verdict = _judge_together(
        name, table, ~result.drop_N, rank_N, filters[name], seed
      )
      seconds[name] = time.monotonic() - start
    result.add(name, verdict)
  return result.table(table, single, filters, order), seconds


def _judge_together(name, table, alive_N, rank_N, options, seed):
  if name in _DUPLICATES:
    return _DUPLICATES[name](table, alive_N, rank_N, options)
  if name == "distribution":
    return distribution.judge(table, alive_N, options, seed)
  return decontaminate.judge(table, alive_N, options)


def _check_columns(table, filters, order) -> None:
  needed = _needed(filters, order)
  missing = sorted(needed - set(table.column_names))
  if missing:
    raise InputError(
      f"The filters {tuple(order)} need the columns {missing}, which no "
      "metric or score provides; run that score or take the filter out of "
      "config.filter_order."
    )
  healthy = ~rules.broken(table).drop_N
  for column in sorted(needed - metrics.METRICS.keys()):
    empty = healthy & rules.to_numpy(pc.is_null(table[column]))
    if empty.any():
      first = table["id"][int(np.flatnonzero(empty)[0])].as_py()
      raise InputError(
        f"Score column {column!r} is empty for {int(empty.sum())} readable "
        f"records, {first!r} for one; run that score again."
      )


class _Result:
  """The columns of the verdict table while the filters take turns."""

  def __init__(self, count: int):
    self.drop_N, self._value_N, self._threshold_N = rules.empty(count)
    self._filter_N = np.full(count, "", object)
    self._detail: dict[int, str] = {}
    self._twin: dict[int, int] = {}

  def add(self, name: str, verdict: rules.Verdict) -> None:
    """Applies a filter to the rows that are still there."""
    new_N = verdict.drop_N & ~self.drop_N
    self._filter_N[new_N] = name
    self._value_N[new_N] = verdict.value_N[new_N]
    self._threshold_N[new_N] = verdict.threshold_N[new_N]
    for i in np.flatnonzero(new_N).tolist():
      self._detail[i] = verdict.detail.get(i, "")
      if i in verdict.twin:
        self._twin[i] = verdict.twin[i]
    self.drop_N |= new_N

  def table(self, source, single, filters, order) -> pa.Table:
    """The verdicts beside the ids of `source`."""
    ids = source["id"]
    rows = range(source.num_rows)
    columns = {"id": ids}
    if "shard" in source.column_names:
      columns["shard"] = source["shard"]
    columns |= {
      "kept": pa.array(~self.drop_N),
      "filter": pa.array(self._filter_N, pa.string()),
      "value": pa.array(self._value_N, from_pandas=True),
      "threshold": pa.array(self._threshold_N, from_pandas=True),
      "detail": pa.array([self._detail.get(i, "") for i in rows]),
      "duplicate_of": ids.take(
        pa.array([self._twin.get(i) for i in rows], pa.int64())
      ),
    }
    columns |= {f"drops.{n}": pa.array(v.drop_N) for n, v in single.items()}
    used = {name: filters[name] for name in order}
    # `default`: config dicts of ml_collections are mappings, not dicts.
    text = json.dumps(used, default=dict)
    return pa.table(columns).replace_schema_metadata({"filters": text})
