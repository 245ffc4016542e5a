# SPDX-License-Identifier: Apache-2.0
"""The distribution filter of the last stage: quotas of categories.

Shapes: N rows.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.errors import InputError
from data_pipelines.filters import clusters, dedup, duplicates, rules

OPTIONS = {"column", "max_count", "shares", "clusters"}
# As `column`: groups of similar images, found among the embeddings.
CLUSTER = "cluster"


def check(options: Mapping[str, Any]) -> None:
  """Raises InputError unless counts, shares and clusters make sense."""
  shares, count = options.get("shares"), options.get("max_count")
  if shares is not None and (
    not shares or min(shares.values()) <= 0 or sum(shares.values()) > 1 + 1e-9
  ):
    raise InputError(
      f"The shares {dict(shares)} of filter 'distribution' must be positive "
      "and sum to at most 1; correct them in the config."
    )
  if count is not None and (not isinstance(count, int) or count < 1):
    raise InputError(
      f"max_count of filter 'distribution' is {count!r}; give a whole number "
      "of at least 1, or None."
    )
  number, column = options.get("clusters"), options.get("column")
  if column == CLUSTER and shares is not None:
    raise InputError(
      "Filter 'distribution' cannot have shares of clusters, which have no "
      "names; give max_count."
    )
  if (number is not None) != (column == CLUSTER) or (
    number is not None and (not isinstance(number, int) or number < 2)
  ):
    raise InputError(
      f"Filter 'distribution' has clusters = {number!r} and column = "
      f"{column!r}; give a whole number of at least 2 with column="
      f"{CLUSTER!r}, and None with any other."
    )


def judge(
  table: pa.Table,
  alive_N: np.ndarray,
  options: Mapping[str, Any],
  seed: int,
) -> rules.Verdict:
  """Drops what exceeds the quota of its category.

  Which rows of a category stay is decided by a hash of their ids, so they are
  a fair sample, the same in every run, and hardly change when rows are added.

  Args:
    table: N rows.
    alive_N: the rows to choose from.
    options: `column` with the category, or 'cluster' for `clusters` groups of
      similar images by their `embedding`; `max_count` rows of any category;
      `shares`, category -> share of the result. The result is as large as
      the scarcest named category allows; categories that are not named share
      what remains of 1, and go if nothing does.
    seed: of the hash.
  """
  column = options.get("column") or "kind"
  rows = np.flatnonzero(alive_N)
  hashes = duplicates.hash_order(table, seed)[rows]
  rows = rows[np.argsort(hashes, kind="stable")]
  if column == CLUSTER:
    values = _clusters(table, rows, options["clusters"], seed)
  else:
    values = [str(v) for v in table[column].take(rows).to_pylist()]
  names = np.array(values, dtype=object)
  quotas = find_quotas(
    {str(n): int((names == n).sum()) for n in set(names)}, options
  )
  drop_N, value_N, threshold_N = rules.empty(table.num_rows)
  detail = {}
  for name, quota in quotas.items():
    members = rows[names == name]
    value_N[members] = np.arange(1, len(members) + 1)
    threshold_N[members] = quota
    drop_N[members[quota:]] = True
    detail.update(
      (i, f"{column} {name}: quota {quota}") for i in members[quota:].tolist()
    )
  return rules.Verdict(drop_N, value_N, threshold_N, detail)


def _clusters(
  table: pa.Table, rows: np.ndarray, count: int, seed: int
) -> list[str]:
  """Names of the clusters of rows, which are in the order of their hashes."""
  vector_ND = duplicates.vectors(table, rows)
  found_N = clusters.cluster(dedup.unit(vector_ND), count, seed)
  return [str(n + 1) for n in found_N]


def find_quotas(
  counts: Mapping[str, int], options: Mapping[str, Any]
) -> dict[str, int]:
  """Category -> number of rows that stay.

  Args:
    counts: category -> rows at hand.
    options: see `judge`.

  Raises:
    InputError: a category with a share has no rows.
  """
  cap = options.get("max_count") or max(counts.values(), default=0)
  capped = {name: min(count, cap) for name, count in counts.items()}
  shares = options.get("shares")
  if not shares:
    return capped
  others = {name: n for name, n in capped.items() if name not in shares}
  rest = max(0.0, 1 - sum(shares.values()))
  absent = sorted(set(shares) - set(capped))
  if absent:
    raise InputError(
      f"Filter 'distribution' has shares for {absent}, of which no record is "
      "left; remove them from the shares or loosen earlier filters."
    )
  sizes = [capped[name] / share for name, share in shares.items()]
  # Without others the named shares are taken relative to their sum.
  if rest > 1e-9 and others:
    sizes.append(sum(others.values()) / rest)
  size = min(sizes)
  quotas = {
    name: min(math.floor(size * share + 1e-9), capped[name])
    for name, share in shares.items()
  }
  allowed = size * rest / max(sum(others.values()), 1)
  quotas.update({n: math.floor(c * allowed + 1e-9) for n, c in others.items()})
  return quotas
