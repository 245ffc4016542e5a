# SPDX-License-Identifier: Apache-2.0
"""Restoration: a damaged picture, and the untouched one as target.

The other direction damages a picture on request.
"""

import numpy as np

from data_pipelines.edit_pairs import colours, degrade
from data_pipelines.edit_pairs.pair import Pair
from data_pipelines.edit_pairs.supply import Supply


def draw(supply: Supply, rng: np.random.Generator) -> Pair:
  """One pair; see `degrade.DAMAGES` for the operations."""
  image = supply.picture().image
  names = list(degrade.DAMAGES)
  operation = names[int(rng.integers(len(names)))]
  before = colours.visible(image)
  after, parameters, where = degrade.DAMAGES[operation](before, rng)
  damaged = colours.replaced(image, after)
  shown = colours.shown(image)
  if where is None or shown is None:
    change = shown if where is None else where
  else:
    change = where & shown
  slots = {name: str(value) for name, value in parameters.items()}
  if rng.random() < supply.rules.inverse:
    return Pair(
      f"apply_{operation}", (image,), damaged, change, slots, parameters
    )
  return Pair(f"undo_{operation}", (damaged,), image, change, slots, parameters)
