# SPDX-License-Identifier: Apache-2.0
"""Random fingerprints with near duplicates, and the plain search for them."""

import itertools

import numpy as np


def fingerprints(count, seed=0, flips=12):
  """Random hashes, most of them a few bits from another, and near colours."""
  rng = np.random.default_rng(seed)
  phash = rng.integers(0, 2**64, count, np.uint64)
  dhash = rng.integers(0, 2**64, count, np.uint64)
  thumb = rng.integers(0, 256, (count, 192)).astype(np.uint8)
  for i in range(count // 3, count):
    j = rng.integers(0, i)
    for hashes in (phash, dhash):
      bits = rng.choice(64, rng.integers(0, flips), replace=False)
      hashes[i] = hashes[j] ^ np.uint64(sum(1 << int(b) for b in bits))
    change = rng.integers(-4, 5, 192) * rng.integers(0, 2)
    change += rng.integers(-50, 51) * rng.integers(0, 2)
    thumb[i] = (thumb[j].astype(int) + change).clip(0, 255)
  return phash, dhash, thumb


def colour_distance(first, second):
  """Mean difference after both have mean 0 and, if they can, spread 48."""

  def even(thumb):
    values = thumb.astype(float) - np.mean(thumb)
    return values * 48 / max(np.sqrt(np.mean(values**2)), 16)

  return np.mean(np.abs(even(first) - even(second)))


def brute_force(phash, dhash, thumb, max_phash, max_dhash, max_colour):
  return [
    [i, j]
    for i, j in itertools.combinations(range(len(phash)), 2)
    if int(phash[i] ^ phash[j]).bit_count() <= max_phash
    and int(dhash[i] ^ dhash[j]).bit_count() <= max_dhash
    and abs(thumb[i].mean() - thumb[j].mean()) <= 40
    and colour_distance(thumb[i], thumb[j]) <= max_colour
  ]
