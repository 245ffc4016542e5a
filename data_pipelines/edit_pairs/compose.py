# SPDX-License-Identifier: Apache-2.0
"""One scene from two to four references: a background and cut-outs."""

import numpy as np

from data_pipelines.edit_pairs import reference, scene
from data_pipelines.edit_pairs.pair import Pair
from data_pipelines.edit_pairs.supply import Supply
from data_pipelines.sources.items import Unusable

_WORDS = {1: "one", 2: "two", 3: "three"}


def draw(supply: Supply, rng: np.random.Generator) -> Pair:
  """One pair; image 1 is the background, which stays beside the cut-outs."""
  background = supply.place()
  count = int(rng.integers(1, 4))
  columns = [str(c) for c in rng.permutation(list(scene.COLUMNS))[:count]]
  shown, placed = [], []
  for column in columns:
    # Images are told apart by their numbers, so names may repeat.
    thing = supply.thing([i.name for i, _ in shown], distinct=False)
    if thing is None:
      break
    one = reference.show(thing, supply.size, rng)
    shown.append((thing, one))
    placed.append(scene.place(one.thing, column, supply.size, rng))
  if not placed:
    raise Unusable("no usable cut-out is left")
  parameters = {
    "pasted": [
      {"from": one.describe(k), "to": item.describe()}
      for k, ((_, one), item) in enumerate(zip(shown, placed), start=1)
    ]
  }
  slots = {}
  for k, item in enumerate(placed, start=1):
    slots[f"thing{k}"] = item.thing.name
    slots[f"column{k}"] = scene.COLUMNS[item.column]
  return Pair(
    f"compose_{_WORDS[len(placed)]}",
    (background.image, *(one.image for _, one in shown)),
    scene.render(background.image, placed),
    scene.footprint(placed, supply.size),
    slots,
    parameters,
  )
