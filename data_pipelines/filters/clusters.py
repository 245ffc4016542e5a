# SPDX-License-Identifier: Apache-2.0
"""Groups of similar targets, from their embeddings.

Shapes: N rows, D dimensions, K clusters.
"""

import numpy as np

# Centres are found on so many rows, and in so many rounds, at most; ours.
_SAMPLE, _ROUNDS = 50_000, 25
_BLOCK = 8192


def cluster(unit_ND: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Spherical k-means, started as k-means++.

  By hand: SciPy's k-means moves its centres off the sphere, and no library
  that we depend on has the spherical kind.

  Args:
    unit_ND: float32 vectors of length 1, in an order that does not depend on
      that of the input.
    count: K; fewer where there are fewer rows.
    seed: of the start.

  Returns:
    [N] number of the cluster of each row; 0 has the most rows.
  """
  count = min(count, len(unit_ND))
  if not count:
    return np.zeros(0, np.int64)
  sample_ND = unit_ND[:_SAMPLE]
  centre_KD = _start(sample_ND, count, np.random.default_rng(seed))
  label_N = np.full(len(sample_ND), -1)
  for _ in range(_ROUNDS):
    new_N = _nearest(sample_ND, centre_KD)
    if (new_N == label_N).all():
      break
    label_N = new_N
    sums_KD = np.zeros_like(centre_KD)
    np.add.at(sums_KD, label_N, sample_ND)
    length_K1 = np.linalg.norm(sums_KD, axis=1, keepdims=True)
    # A cluster that has lost its last row keeps its centre.
    moved_K1 = length_K1 > 1e-6
    centre_KD = np.where(moved_K1, sums_KD / np.maximum(length_K1, 1e-6),
                         centre_KD)  # fmt: skip
  label_N = _nearest(unit_ND, centre_KD)
  sizes_K = np.bincount(label_N, minlength=count)
  place_K = np.empty(count, np.int64)
  place_K[np.argsort(-sizes_K, kind="stable")] = np.arange(count)
  return place_K[label_N]


def _start(
  unit_ND: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
  """[K, D] rows, each drawn by its distance to those drawn before."""
  chosen = [int(rng.integers(len(unit_ND)))]
  far_N = np.full(len(unit_ND), np.inf)
  while len(chosen) < count:
    far_N = np.minimum(far_N, 1 - unit_ND @ unit_ND[chosen[-1]])
    weight_N = np.maximum(far_N, 0.0).astype(np.float64)
    total = weight_N.sum()
    if total <= 1e-6:  # only copies are left
      break
    chosen.append(int(rng.choice(len(unit_ND), p=weight_N / total)))
  return unit_ND[chosen].copy()


def _nearest(unit_ND: np.ndarray, centre_KD: np.ndarray) -> np.ndarray:
  return np.concatenate([
    (unit_ND[start : start + _BLOCK] @ centre_KD.T).argmax(axis=1)
    for start in range(0, len(unit_ND), _BLOCK)
  ])  # fmt: skip
