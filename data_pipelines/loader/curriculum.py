# SPDX-License-Identifier: Apache-2.0
"""Which resolution a step belongs to, as a pure function of the step."""

import bisect
import functools
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from data_pipelines.loader.config import Phase
from data_pipelines.loader.rows import ENDLESS

# Shares hold in every window of so many steps, counted from a phase's start;
# the order within a window is random.
WINDOW = 100
# Shares are rounded to millionths, so that counts are exact integers.
_PARTS = 1_000_000


class Curriculum(grain.transforms.DatasetSelectionMap):
  """Step -> (resolution, how many of its batches came before).

  Written by hand because Grain's `mix` has one mixture for ever: chaining
  mixtures would let every resolution begin anew at each phase, while here its
  passes over the data go on where the phase before left them.
  """

  def __init__(
    self, schedule: Sequence[Phase], names: Sequence[str], seed: int
  ):
    """Counts the batches of all phases.

    Args:
      schedule: checked phases.
      names: the resolutions, in the order in which they are numbered.
      seed: of the order within windows.
    """
    self._seed = seed
    self._starts = [phase.start for phase in schedule]
    self._ends = [*self._starts[1:], ENDLESS]
    self._parts = [_parts(phase.shares, names) for phase in schedule]
    self._done = [np.zeros(len(names), np.int64)]
    for parts, start, end in zip(self._parts, self._starts, self._starts[1:]):
      self._done.append(self._done[-1] + _counts(end - start, parts))
    # Prefetching threads straddle at most a window boundary or two.
    self._window = functools.lru_cache(maxsize=4)(self._order)

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, step: int) -> tuple[int, int]:
    phase = bisect.bisect_right(self._starts, step) - 1
    window, position = divmod(step - self._starts[phase], WINDOW)
    which, ordinal = self._window(phase, window)[position]
    return int(which), int(ordinal)

  def _order(self, phase: int, window: int) -> np.ndarray:
    """[steps of the window, 2]: what `__getitem__` returns for each."""
    first = window * WINDOW
    last = min(first + WINDOW, self._ends[phase] - self._starts[phase])
    before, after = (
      self._done[phase] + _counts(n, self._parts[phase]) for n in (first, last)
    )
    # RandomState: its streams never change between numpy versions.
    step = self._starts[phase] + first
    state = np.random.RandomState((self._seed + step) % 2**32)
    which = np.repeat(np.arange(len(before)), after - before)
    which = state.permutation(which)
    ordinal = np.empty_like(which)
    for i, count in enumerate(before.tolist()):
      own = which == i
      ordinal[own] = count + np.arange(own.sum())
    return np.stack([which, ordinal], axis=1)


def _parts(shares: Mapping[str, float], names: Sequence[str]) -> list[int]:
  """Shares in millionths, in the order of `names`; no positive one is lost."""
  total = sum(shares.values())
  scaled = [_PARTS * shares.get(name, 0) / total for name in names]
  return [max(1, round(part)) if part else 0 for part in scaled]


def _counts(steps: int, parts: Sequence[int]) -> np.ndarray:
  """How many of a phase's first `steps` steps each resolution gets.

  The first gets its share, rounded; the others share the rest in the same
  way. So every count grows by 0 or 1 per step and they sum to `steps`.
  """
  counts, rest = [], sum(parts)
  for part in parts:
    count = (2 * steps * part + rest) // (2 * rest) if rest else 0
    counts.append(count)
    steps, rest = steps - count, rest - part
  return np.array(counts, np.int64)


def leading(schedule: Sequence[Phase], step: int) -> str:
  """The resolution with the largest share at a step; of equals the last."""
  starts = [phase.start for phase in schedule]
  shares = schedule[bisect.bisect_right(starts, step) - 1].shares
  return max(reversed(shares), key=shares.__getitem__)


def schedule_report(schedule: Sequence[Phase]) -> str:
  """A line per phase for a log, with the shares of the steps."""
  lines = []
  for phase in schedule:
    total = sum(phase.shares.values())
    shares = ", ".join(
      f"{name} {share / total:.2%}"
      for name, share in phase.shares.items()
      if share
    )
    lines.append(f"from step {phase.start:>9,}: {shares}")
  return "\n".join(lines)
