# SPDX-License-Identifier: Apache-2.0
"""Index maps, as Grain sources: shuffled passes, a host's batches."""

import functools
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

# Grain's endless length is sys.maxsize, which overflows where `mix` computes
# with it in floating point; this many steps or passes are endless enough.
ENDLESS = 2**40


class Passes:
  """Endless passes over `range(count)`, each complete, each in its own order.

  Stands in for Grain's `shuffle().repeat()`, whose cost per index grows as
  the range shrinks (measured: 2 ms for 10 records, 7 ms for 2), which small
  buckets and small user datasets would pay for every row.
  """

  def __init__(self, count: int, seed: int):
    self._count = count
    self._seed = seed
    # Prefetching threads straddle at most a pass boundary or two.
    self._order = functools.lru_cache(maxsize=4)(self._permutation)

  def _permutation(self, number: int) -> np.ndarray:
    # RandomState: its streams never change between numpy versions.
    state = np.random.RandomState((self._seed + number) % 2**32)
    return state.permutation(self._count)

  def __len__(self) -> int:
    return ENDLESS * self._count

  def __getitem__(self, i: int) -> int:
    number, position = divmod(i, self._count)
    return int(self._order(number)[position])


class Numbered:
  """Every index with a number in front: `(number, i)`."""

  def __init__(self, number: int):
    self._number = number

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, i: int) -> tuple[int, int]:
    return self._number, i


class HostBatches:
  """This host's contiguous rows of every global batch, stacked.

  Grain's own slice [host::hosts] would interleave the hosts; contiguous rows
  make the global array equal for every number of hosts, row by row. Grain's
  threads take whole batches, one each: with the batches of a pod that would
  be gigabytes per thread. So `map_rows` brings threads of its own, and a few
  batches in flight are enough.
  """

  def __init__(
    self,
    rows: grain.MapDataset,
    batch_size: int,
    host_index: int,
    host_count: int,
    map_rows: Callable = map,
  ):
    self._rows = rows
    self._batch_size = batch_size
    self._local = batch_size // host_count
    self._first = self._local * host_index
    self._map_rows = map_rows

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, step: int) -> Any:
    first = step * self._batch_size + self._first
    numbers = range(first, first + self._local)
    rows = list(self._map_rows(self._rows.__getitem__, numbers))
    return grain.MapDataset.source(rows).batch(self._local)[0]
