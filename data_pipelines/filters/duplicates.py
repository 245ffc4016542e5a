# SPDX-License-Identifier: Apache-2.0
"""The deduplication filters: of every group of duplicates one row stays.

Only targets are compared: edits may start from the same image. A
text-to-image sample duplicates another that shows the same target; an edit
must share the instruction too, because several edits of one photo are alike
almost everywhere. The two tasks are never compared with each other. With the
option `same_caption` text-to-image samples must share the caption as well, so
that an image may have several. A caption that is missing is like no other.

Shapes: N rows, K pairs.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.errors import InputError
from data_pipelines.filters import dedup, pixels, rules

_THUMB_BYTES = 3 * pixels.THUMB_SIDE**2

OPTIONAL = {"same_caption"}
OPTIONS = {
  "exact_duplicate": OPTIONAL,
  "perceptual_duplicate": OPTIONAL | {"max_phash", "max_dhash", "max_colour"},
  "embedding_duplicate": OPTIONAL | {"min_cosine"},
}


def rank_rows(table: pa.Table, healthy_N: np.ndarray, seed: int) -> np.ndarray:
  """[N] order in which rows are preferred among duplicates, best first = 0.

  Rows that no other filter drops come first, so that a group is not lost with
  a representative that fails later; then more pixels, more bytes, and last a
  hash of the id, which no input order can change.
  """
  pixels_N = np.nan_to_num(rules.numbers(table, "pixels"), nan=-1)
  bytes_N = np.nan_to_num(rules.numbers(table, "bytes"), nan=-1)
  order_N = np.lexsort(
    (hash_order(table, seed), -bytes_N, -pixels_N, ~healthy_N)
  )
  rank_N = np.empty(len(order_N), np.int64)
  rank_N[order_N] = np.arange(len(order_N))
  return rank_N


def hash_order(table: pa.Table, seed: int) -> np.ndarray:
  """[N] uint64 that depend on id and seed alone: a fair, stable shuffle."""
  digests = (
    hashlib.sha256(f"{seed}/{id}".encode()).digest()[:8]
    for id in table["id"].to_pylist()
  )
  return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def exact(
  table: pa.Table,
  alive_N: np.ndarray,
  rank_N: np.ndarray,
  options: Mapping[str, Any],
) -> rules.Verdict:
  """Targets with the same bytes."""
  rows = _rows(table, alive_N, "sha256")
  label = dedup.groups_of_equals(
    _scope(table, options)[rows], rules.codes(table, "sha256")[rows]
  )
  zeros = np.zeros(len(rows))
  return _verdict(table, rows, label, rank_N, lambda i, j: zeros[: len(i)], 0.0)


def perceptual(
  table: pa.Table,
  alive_N: np.ndarray,
  rank_N: np.ndarray,
  options: Mapping[str, Any],
) -> rules.Verdict:
  """Targets that look alike, after resizing or recompression for instance.

  Options: `max_phash` and `max_dhash`, bits of 64; `max_colour`, mean
  difference of 8 x 8 cells at equal brightness and contrast.
  """
  rows = _rows(table, alive_N, "phash")
  chosen = table.take(rows)
  phash_N, dhash_N, thumb_NC = fingerprints(chosen)
  scope_N = _scope(table, options)[rows]
  # Copies with equal fingerprints count once: they would meet in all pairs.
  same_N = dedup.groups_of_equals(
    scope_N, phash_N, dhash_N, rules.codes(chosen, "thumb")
  )
  _, first = np.unique(same_N, return_index=True)
  pairs_K2 = dedup.perceptual_pairs(
    phash_N[first],
    dhash_N[first],
    thumb_NC[first],
    options["max_phash"],
    options["max_dhash"],
    options["max_colour"],
  )
  scopes_K2 = scope_N[first][pairs_K2]
  pairs_K2 = pairs_K2[scopes_K2[:, 0] == scopes_K2[:, 1]]
  label_N = dedup.components(len(first), pairs_K2)[same_N]

  def distance(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    return np.bitwise_count(phash_N[i] ^ phash_N[j]).astype(float)

  return _verdict(table, rows, label_N, rank_N, distance, options["max_phash"])


def embedding(
  table: pa.Table,
  alive_N: np.ndarray,
  rank_N: np.ndarray,
  options: Mapping[str, Any],
) -> rules.Verdict:
  """Targets whose embeddings, of the `embedding` score, point the same way.

  Options: `min_cosine`.

  Raises:
    InputError: the embeddings differ in length.
  """
  rows = _rows(table, alive_N, "embedding")
  embedding_ND = vectors(table, rows)
  pairs_K2 = dedup.embedding_pairs(embedding_ND, options["min_cosine"])
  scope_N = _scope(table, options)[rows]
  scopes_K2 = scope_N[pairs_K2]
  pairs_K2 = pairs_K2[scopes_K2[:, 0] == scopes_K2[:, 1]]
  label_N = dedup.components(len(rows), pairs_K2)
  norm_N = np.linalg.norm(embedding_ND, axis=1)

  def cosine(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    dot = (embedding_ND[i] * embedding_ND[j]).sum(axis=1)
    return dot / np.maximum(norm_N[i] * norm_N[j], 1e-12)

  return _verdict(table, rows, label_N, rank_N, cosine, options["min_cosine"])


def vectors(table: pa.Table, rows: np.ndarray) -> np.ndarray:
  """[N, D] float32 embeddings of some rows, none of them null.

  Raises:
    InputError: they differ in length.
  """
  column = table["embedding"].take(rows).combine_chunks()
  sizes = pc.unique(pc.list_value_length(column)).to_pylist()
  if len(sizes) > 1:
    raise InputError(
      "Column 'embedding' holds vectors of different lengths; compute the "
      "score again with one model."
    )
  # Scores are stored in half precision, in which cosines would be rounded.
  flat = rules.to_numpy(column.flatten()).astype(np.float32)
  return flat.reshape(len(rows), sizes[0] if sizes else 1)


def fingerprints(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`phash` and `dhash` [N] uint64 and `thumb` [N, 192] uint8, none null."""
  thumbs = table["thumb"].to_pylist()
  return (
    rules.to_numpy(table["phash"]).astype(np.uint64),
    rules.to_numpy(table["dhash"]).astype(np.uint64),
    np.frombuffer(b"".join(thumbs), np.uint8).reshape(-1, _THUMB_BYTES),
  )


def _rows(table: pa.Table, alive_N: np.ndarray, column: str) -> np.ndarray:
  """Numbers of the rows that take part."""
  return np.flatnonzero(alive_N & rules.to_numpy(pc.is_valid(table[column])))


def _scope(table: pa.Table, options: Mapping[str, Any]) -> np.ndarray:
  """[N] int; only rows of one scope can be duplicates of each other."""
  caption_N = rules.codes(table, "caption")
  edit_N = rules.numbers(table, "references") > 0
  plain_N = -caption_N - 2 if options.get("same_caption") else -1
  scope_N = np.where(edit_N, caption_N + 1, plain_N)
  # Captions that nobody has made yet are not known to be the same.
  waits_N = rules.uncaptioned(table)
  waits_N &= edit_N | bool(options.get("same_caption"))
  own_N = len(scope_N) + 2 + np.arange(len(scope_N))
  return np.where(waits_N, own_N, scope_N)


def _verdict(
  table: pa.Table, rows, label, rank_N, measure, threshold: float
) -> rules.Verdict:
  """Drops all but the best row of each group.

  Args:
    table: N rows.
    rows: numbers of the rows that took part.
    label: group of each of them.
    rank_N: preference of all rows.
    measure: (i, j) -> values between members of `rows`.
    threshold: what the filter compared them with.
  """
  best = dedup.best_of_each(label, rank_N[rows])
  loser = np.flatnonzero(best != np.arange(len(rows)))
  drop_N, value_N, threshold_N = rules.empty(table.num_rows)
  dropped, kept = rows[loser], rows[best[loser]]
  drop_N[dropped] = True
  value_N[dropped] = measure(loser, best[loser])
  threshold_N[dropped] = threshold
  twin = dict(zip(dropped.tolist(), kept.tolist()))
  ids = table["id"].take(kept).to_pylist()
  detail = {i: f"as {id}" for i, id in zip(twin, ids)}
  return rules.Verdict(drop_N, value_N, threshold_N, detail, twin)
