# SPDX-License-Identifier: Apache-2.0
"""Rows of several datasets in fixed shares, within every batch."""

from collections.abc import Sequence

import numpy as np

from data_pipelines.loader.config import Phase
from data_pipelines.loader.curriculum import Curriculum
from data_pipelines.loader.programs import Part
from data_pipelines.loader.rows import ENDLESS, Passes


class Mixture:
  """Endless positions in a program's members, each part in its own passes.

  A part's count among the first rows is its share of them, rounded, at every
  multiple of the schedule's window; within a window the order is random.
  """

  def __init__(self, parts: Sequence[Part], seeds: Sequence[int], seed: int):
    """Prepares the orders; nothing is drawn here.

    Args:
      parts: consecutive parts of the members; some may be empty.
      seeds: of the passes, one per part.
      seed: of the order of parts.
    """
    self._firsts = np.cumsum([0] + [part.records for part in parts]).tolist()
    self._passes = [
      Passes(part.records, own) for part, own in zip(parts, seeds, strict=True)
    ]
    names = [str(i) for i in range(len(parts))]
    shares = {name: part.share for name, part in zip(names, parts)}
    self._turns = Curriculum((Phase(0, shares),), names, seed)

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, i: int) -> int:
    which, ordinal = self._turns[i]
    return self._firsts[which] + self._passes[which][ordinal]
