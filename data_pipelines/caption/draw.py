# SPDX-License-Identifier: Apache-2.0
"""Weighted draws that depend on a key alone.

A draw for one record is the same in every process and order, and stays the
same when other records are added.
"""

import hashlib
import math
from collections.abc import Mapping


def uniform(*key: str | int) -> float:
  """A number in (0, 1) from a hash of the key."""
  text = "\0".join(str(part) for part in key)
  digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
  return (int.from_bytes(digest[:8], "big") + 0.5) / 2**64


def draw(
  weights: Mapping[str, float], count: int, *key: str | int
) -> list[str]:
  """Draws names without replacement, with chances by weight.

  The names with the smallest exponential variates -log(u) / weight
  (Efraimidis and Spirakis, 2006). Unlike an inverted cumulative sum it keeps
  a draw when a name that was not drawn is taken away.

  Args:
    weights: by name; names of weight 0 are never drawn.
    count: how many, or fewer if there are not so many.
    key: what the draw is for.

  Returns:
    Names in the order in which they were drawn.
  """
  variates = {
    name: -math.log(uniform(*key, name)) / weight
    for name, weight in weights.items()
    if weight > 0
  }
  return sorted(variates, key=variates.__getitem__)[:count]
