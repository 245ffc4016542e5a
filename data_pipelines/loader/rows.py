# SPDX-License-Identifier: Apache-2.0
"""Two index maps, as Grain sources: shuffled passes, and a host's rows."""

import functools
from typing import Any

import grain
import numpy as np

# Grain's endless length is sys.maxsize, which overflows where `mix` computes
# with it in floating point; this many steps or passes are endless enough.
_ENDLESS = 2**40


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
    return _ENDLESS * self._count

  def __getitem__(self, i: int) -> int:
    number, position = divmod(i, self._count)
    return int(self._order(number)[position])


class HostRows:
  """This host's contiguous rows of every global batch.

  Grain's own slice [host::hosts] would interleave the hosts; contiguous rows
  make the global array equal for every number of hosts, row by row.
  """

  def __init__(
    self,
    rows: grain.MapDataset,
    batch_size: int,
    host_index: int,
    host_count: int,
  ):
    self._rows = rows
    self._batch_size = batch_size
    self._local = batch_size // host_count
    self._first = self._local * host_index

  def __len__(self) -> int:
    return _ENDLESS * self._local

  def __getitem__(self, i: int) -> Any:
    step, row = divmod(i, self._local)
    return self._rows[step * self._batch_size + self._first + row]
