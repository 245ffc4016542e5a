# SPDX-License-Identifier: Apache-2.0
"""Finds duplicate rows from fingerprints; pixels are never needed.

Shapes: N rows, K pairs, D dimensions of an embedding, B blocks of rows.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import scipy.sparse
from scipy.sparse import csgraph

_BANDS, _BAND_BITS = 4, 16
# Copies may be this much lighter or darker, of 255; ours.
_MAX_LIGHT = 40.0
# Contrast that colours are brought to, and the least that is amplified.
_CONTRAST, _MIN_CONTRAST = 48.0, 16.0
# Pairs expanded at a time: bounds memory to some hundred MB.
_MAX_PAIRS = 2_000_000
_EMBEDDING_BLOCK = 2048


def groups_of_equals(*keys: np.ndarray) -> np.ndarray:
  """[N] labels: rows whose keys are all equal share one."""
  labels_N = np.zeros(len(keys[0]), np.int64)
  for key_N in keys:
    codes_N = np.unique(key_N, return_inverse=True)[1].reshape(-1)
    labels_N = labels_N * (codes_N.max(initial=0) + 1) + codes_N
    # Renumbered, so that many keys cannot overflow.
    labels_N = np.unique(labels_N, return_inverse=True)[1].reshape(-1)
  return labels_N


def even_colours(thumb_NC: np.ndarray) -> np.ndarray:
  """[N, C] float32 of one brightness and contrast.

  Copies are often made lighter, darker or flatter; that moves all cells and
  channels alike, where another hue moves them apart.

  Args:
    thumb_NC: uint8, coarse colours.
  """
  shifted_NC = thumb_NC - thumb_NC.mean(axis=1, keepdims=True)
  contrast_N1 = shifted_NC.std(axis=1, keepdims=True)
  gain_N1 = _CONTRAST / np.maximum(contrast_N1, _MIN_CONTRAST)
  return (shifted_NC * gain_N1).astype(np.float32)


def perceptual_pairs(
  phash_N: np.ndarray,
  dhash_N: np.ndarray,
  thumb_NC: np.ndarray,
  max_phash: int,
  max_dhash: int,
  max_colour: float,
) -> np.ndarray:
  """All pairs that look alike: by two hashes, colours and brightness.

  Candidates share 16 of the 64 bits of the first hash up to max_phash // 4
  errors: of four bands one must have as few, so no pair is missed.

  Args:
    phash_N: uint64.
    dhash_N: uint64.
    thumb_NC: uint8, coarse colours.
    max_phash: largest Hamming distance of `phash_N`.
    max_dhash: largest Hamming distance of `dhash_N`.
    max_colour: largest mean absolute difference of `even_colours`.

  Returns:
    [K, 2] row numbers, the smaller first, each pair once.
  """
  found = [np.zeros((0, 2), np.int64)]
  even_NC = even_colours(thumb_NC)
  for pairs_K2 in _candidates(phash_N, thumb_NC.mean(axis=1), max_phash):
    i, j = pairs_K2.T
    near_K = np.bitwise_count(phash_N[i] ^ phash_N[j]) <= max_phash
    i, j = i[near_K], j[near_K]
    near_K = np.bitwise_count(dhash_N[i] ^ dhash_N[j]) <= max_dhash
    i, j = i[near_K], j[near_K]
    colour_K = np.abs(even_NC[i] - even_NC[j]).mean(axis=1)
    near_K = colour_K <= max_colour
    found.append(np.stack([i[near_K], j[near_K]], axis=1))
  return np.unique(np.concatenate(found), axis=0)


def _candidates(
  phash_N: np.ndarray, mean_N: np.ndarray, max_phash: int
) -> Iterator[np.ndarray]:
  """Yields [K, 2] pairs, some more than once, that share most of a band.

  Their brightness is similar too, which keeps blank images from meeting all
  others.
  """
  flips = [
    sum(1 << bit for bit in bits)
    for errors in range(max_phash // _BANDS + 1)
    for bits in itertools.combinations(range(_BAND_BITS), errors)
  ]
  for band in range(_BANDS):
    mask = np.uint64((1 << _BAND_BITS) - 1)
    key_N = (phash_N >> np.uint64(_BAND_BITS * band) & mask).astype(np.int64)
    # One sorted number for (band, mean); 1024 leaves room around 0 .. 255.
    place_N = key_N * 1024 + 256 + mean_N
    order_N = np.argsort(place_N, kind="stable")
    sorted_N = place_N[order_N]
    for flip in flips:
      # In sorted order, neighbours look in places near each other: searching
      # is several times faster than in the order of the rows.
      wanted_N = ((key_N ^ flip) * 1024 + 256 + mean_N)[order_N]
      first_N = np.searchsorted(sorted_N, wanted_N - _MAX_LIGHT, "left")
      last_N = np.searchsorted(sorted_N, wanted_N + _MAX_LIGHT, "right")
      for i, j in _expand(first_N, last_N):
        i, j = order_N[i], order_N[j]
        yield np.stack([i, j], axis=1)[i < j]


def _expand(
  first_N: np.ndarray, last_N: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (row, position) for every position in [first, last) of a row."""
  count_N = last_N - first_N
  end_N = np.cumsum(count_N)
  start = 0
  while start < len(count_N):
    done = end_N[start] - count_N[start]
    stop = max(start + 1, np.searchsorted(end_N, done + _MAX_PAIRS, "right"))
    count = count_N[start:stop]
    rows = np.repeat(np.arange(start, stop), count)
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    yield rows, np.repeat(first_N[start:stop], count) + offset
    start = stop


def unit(embedding_ND: np.ndarray) -> np.ndarray:
  """Rows of length 1, float32; a row of zeros stays."""
  norm_N1 = np.linalg.norm(embedding_ND, axis=1, keepdims=True)
  return (embedding_ND / np.maximum(norm_N1, 1e-12)).astype(np.float32)


def embedding_pairs(embedding_ND: np.ndarray, min_cosine: float) -> np.ndarray:
  """All pairs of at least this cosine, by blocked matrix products.

  Exact and quadratic: 16 s of CPU time for 50,000 rows of 512.

  Args:
    embedding_ND: float, not all zero in any row.
    min_cosine: -1 to 1.

  Returns:
    [K, 2] row numbers, the smaller first.
  """
  unit_ND = unit(embedding_ND)
  found = [np.zeros((0, 2), np.int64)]
  for start in range(0, len(unit_ND), _EMBEDDING_BLOCK):
    block_BD = unit_ND[start : start + _EMBEDDING_BLOCK]
    # Earlier rows have met this block already.
    i, j = np.nonzero(block_BD @ unit_ND[start:].T >= min_cosine)
    found.append(np.stack([i, j], axis=1)[i < j] + start)
  return np.concatenate(found)


def components(count: int, pairs_K2: np.ndarray) -> np.ndarray:
  """[count] labels: rows linked by a chain of pairs share one."""
  ones = np.ones(len(pairs_K2), bool)
  graph = scipy.sparse.coo_matrix((ones, pairs_K2.T), shape=(count, count))
  return csgraph.connected_components(graph, directed=False)[1]


def best_of_each(label_N: np.ndarray, rank_N: np.ndarray) -> np.ndarray:
  """[N] row with the lowest rank among those of the same label.

  Args:
    label_N: groups.
    rank_N: no two equal.
  """
  order_N = np.argsort(rank_N)
  _, first = np.unique(label_N[order_N], return_index=True)
  labels = label_N[order_N][first]  # sorted
  return order_N[first][np.searchsorted(labels, label_N)]
