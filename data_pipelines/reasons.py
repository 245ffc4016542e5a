# SPDX-License-Identifier: Apache-2.0
"""Reasons why something is left out: 'category (details)'.

Categories are counted and asked for again (`--retry`); details are about one
item.
"""

import collections
from collections.abc import Iterable

# A rate of fewer items says nothing; ours.
_FEWEST = 20


def category(reason: str) -> str:
  """What a reason has in common with others."""
  return reason.partition(" (")[0]


def details(reason: str) -> str:
  """What a reason says about its item."""
  return reason.partition(" (")[2].rstrip(")")


def matches(reason: str, wanted: str) -> bool:
  """Whether a reason is of the category asked for, or 'all' are."""
  return bool(reason) and wanted in ("all", category(reason))


def tally(reasons: Iterable[str]) -> collections.Counter:
  """How often each category occurs."""
  return collections.Counter(map(category, reasons))


def is_excessive(bad: int, total: int, limit: float) -> bool:
  """Whether so much is left out that something else must be wrong.

  Args:
    bad: items that are left out.
    total: of all items; of a few, any share may be bad.
    limit: largest share that is accepted.
  """
  return total >= _FEWEST and bad > limit * total
