# SPDX-License-Identifier: Apache-2.0
"""Filters that look at one row at a time, written as data.

The options of such a filter are bounds on columns: `min_COLUMN`,
`max_COLUMN`, `allow_COLUMN` (a list of words). `task` limits them to one of
the two: an instruction, for one, does not describe its result. The name of a
filter is only a label, so a new score needs a column and a line of config, and
no code.

A metric that does not apply to a record (the JPEG quality of a PNG) is null
and passes every bound. What speaks of a caption does not apply to a record
that has none yet.

Shapes: N rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.codec import TASKS
from data_pipelines.errors import InputError

_SIDES = ("min", "max", "allow")
_OF_CAPTIONS = (
  "characters", "tokens", "invalid_characters", "language", "clip_alignment",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What one filter says about every row.

  Attributes:
    drop_N: bool.
    value_N: float64, the metric behind the verdict; NaN if none.
    threshold_N: float64, what it was compared with; NaN if none.
    detail: dropped row -> a few words for a person.
    twin: dropped row -> the row that it duplicates.
  """

  drop_N: np.ndarray
  value_N: np.ndarray
  threshold_N: np.ndarray
  detail: dict[int, str]
  twin: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Bound:
  """One option of a filter.

  Attributes:
    column: the column that it bounds.
    side: 'min', 'max' or 'allow'.
    limit: a number; for 'allow' a tuple of words.
    task: the only task that it applies to; '' for all.
  """

  column: str
  side: str
  limit: Any
  task: str = ""


def parse(name: str, options: Mapping[str, Any]) -> tuple[Bound, ...]:
  """The bounds of a filter; options that are None are off.

  Args:
    name: of the filter, for the message.
    options: of the config.

  Raises:
    InputError: an option is no bound, or its limit has the wrong type.
  """
  bounds = []
  task = options.get("task") or ""
  if task not in ("", *TASKS):
    raise InputError(
      f"Filter {name!r} is for task {task!r}; use one of {TASKS}, or None."
    )
  for option, limit in options.items():
    if option == "task":
      continue
    side, _, column = option.partition("_")
    if side not in _SIDES or not column:
      raise InputError(
        f"Filter {name!r} has an option {option!r}; write min_, max_ or "
        "allow_ and the name of a column."
      )
    if limit is None:
      continue
    if side == "allow":
      fits = isinstance(limit, Sequence) and not isinstance(limit, str)
      limit = tuple(limit) if fits else limit
    else:
      fits = isinstance(limit, (int, float)) and limit == limit
    if not fits:
      wanted = "a list of words" if side == "allow" else "a number"
      raise InputError(
        f"Option {option!r} of filter {name!r} is {limit!r}; give {wanted}, "
        "or None to switch it off."
      )
    bounds.append(Bound(column, side, limit, task))
  return tuple(bounds)


def apply(table: pa.Table, bounds: Sequence[Bound]) -> Verdict:
  """Rows that violate a bound; the first one violated gives the value.

  Args:
    table: holds every column that the bounds name.
    bounds: of one filter.
  """
  drop_N, value_N, threshold_N = empty(table.num_rows)
  detail: dict[int, str] = {}
  for bound in bounds:
    if bound.side == "allow":
      column = table[bound.column].cast(pa.string())
      values = pa.array(bound.limit, pa.string())
      bad = pc.fill_null(pc.invert(pc.is_in(column, values)), False)
      # `is_in` calls a null absent; a null passes.
      bad_N = to_numpy(pc.and_(bad, pc.is_valid(column)))
    else:
      column_N = numbers(table, bound.column)
      low = bound.side == "min"
      bad_N = column_N < bound.limit if low else column_N > bound.limit
    bad_N &= judged(table, bound)
    new_N = bad_N & ~drop_N
    if bound.side == "allow":
      for i in np.flatnonzero(new_N).tolist():
        detail[i] = f"{bound.column} {column[i].as_py()}"
    else:
      sign = "<" if low else ">"
      for i in np.flatnonzero(new_N).tolist():
        found = f"{bound.column} {number_text(column_N[i])}"
        detail[i] = f"{found} {sign} {number_text(bound.limit)}"
      value_N[new_N] = column_N[new_N]
      threshold_N[new_N] = bound.limit
    drop_N |= bad_N
  return Verdict(drop_N, value_N, threshold_N, detail)


def judged(table: pa.Table, bound: Bound) -> np.ndarray:
  """[N] bool: rows that a bound is for."""
  judged_N = np.ones(table.num_rows, bool)
  if bound.task:
    judged_N &= to_numpy(pc.equal(table["task"], bound.task))
  if bound.column in _OF_CAPTIONS and "caption" in table.column_names:
    judged_N &= ~uncaptioned(table)
  return judged_N


def uncaptioned(table: pa.Table) -> np.ndarray:
  """[N] bool: rows of which nobody has made the caption yet."""
  return to_numpy(pc.equal(table["caption"].fill_null("?"), ""))


def broken(table: pa.Table) -> Verdict:
  """Rows whose `error` says that an image could not be read."""
  drop_N, value_N, threshold_N = empty(table.num_rows)
  if "error" not in table.column_names:
    return Verdict(drop_N, value_N, threshold_N, {})
  drop_N = to_numpy(pc.is_valid(table["error"]))
  detail = {
    i: table["error"][i].as_py() for i in np.flatnonzero(drop_N).tolist()
  }
  return Verdict(drop_N, value_N, threshold_N, detail)


def empty(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Drop, value and threshold arrays of a verdict that drops nothing."""
  return (
    np.zeros(count, bool),
    np.full(count, np.nan),
    np.full(count, np.nan),
  )


def numbers(table: pa.Table, column: str) -> np.ndarray:
  """[N] float64 of a numeric or bool column, NaN where null.

  Raises:
    InputError: the column holds something else.
  """
  values = table[column]
  kind = values.type
  if pa.types.is_boolean(kind):
    values = values.cast(pa.uint8())
  elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
    raise InputError(
      f"Column {column!r} holds {kind}, which no min_ or max_ can bound; use "
      f"allow_{column} or another column."
    )
  return to_numpy(pc.fill_null(values.cast(pa.float64()), np.nan))


def number_text(value: float) -> str:
  """A number for people: whole ones in full, others with four digits."""
  whole = float(value).is_integer() and abs(value) < 1e12
  return f"{int(value):,}" if whole else f"{value:.4g}"


def to_numpy(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
  """A writable copy of a column without nulls."""
  if isinstance(values, pa.ChunkedArray):
    values = values.combine_chunks()
  return np.array(values.to_numpy(zero_copy_only=False))


def codes(table: pa.Table, column: str) -> np.ndarray:
  """[N] int64, equal where the column is equal; -1 where it is null."""
  values = table[column].combine_chunks().dictionary_encode()
  return to_numpy(pc.fill_null(values.indices, -1)).astype(np.int64)
