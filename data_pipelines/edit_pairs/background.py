# SPDX-License-Identifier: Apache-2.0
"""Another background behind a cut-out, which stays pixel by pixel."""

import numpy as np
from PIL import Image

from data_pipelines.edit_pairs import appearance, scene
from data_pipelines.edit_pairs.pair import Pair
from data_pipelines.edit_pairs.supply import Supply
from data_pipelines.sources.items import Unusable

_FILL = (0.55, 0.85)  # of the canvas; ours
_PLAIN, _TRANSPARENT, _FROM = 0.15, 0.15, 0.35


def draw(supply: Supply, rng: np.random.Generator) -> Pair:
  """One pair."""
  first = supply.place()
  thing = supply.thing()
  if thing is None:
    raise Unusable("no usable cut-out is left")
  item = _in_front(thing, supply.size, rng)
  source = scene.render(first.image, [item])
  slots, parameters = {"thing": thing.name}, {"thing": item.describe()}
  references = (source,)
  way = rng.random()
  if way < _TRANSPARENT:
    operation = "background_removed"
    target = scene.render(Image.new("RGBA", supply.size, (0, 0, 0, 0)), [item])
  elif way < _TRANSPARENT + _PLAIN:
    operation = "background_colour"
    names = list(appearance.COLOURS)
    name = names[int(rng.integers(len(names)))]
    value = appearance.COLOURS[name]
    target = scene.render(Image.new("RGB", supply.size, value), [item])
    slots["colour"], parameters["rgb"] = name, list(value)
  else:
    second = supply.place(first)
    target = scene.render(second.image, [item])
    parameters["from"], parameters["to"] = first.id, second.id
    if second.name is None or rng.random() < _FROM:
      operation, references = "background_from", (source, second.image)
    else:
      operation, slots["place"] = "background", second.name
  # Wherever the background shows, if only a little.
  change_HW = ~scene.footprint([item], supply.size, least=255)
  return Pair(operation, references, target, change_HW, slots, parameters)


def _in_front(thing, size, rng) -> scene.Placed:
  w, h = thing.image.size
  fill = float(rng.uniform(*_FILL))
  scale = min(1.0, fill * size[1] / h, fill * size[0] / w)
  base = size[1] * float(rng.uniform(0.9, 0.98))
  return scene.put(thing, thing.image, scale, "middle", base, size)
