# SPDX-License-Identifier: Apache-2.0
"""Edits of one object: its colour, material, light, size, place or presence.

The object is marked by a mask in a picture, or is a cut-out on a background.
The mask of the pair is what the object covers before or after.

Shapes: H height, W width, C 3 colours.
"""

import dataclasses

import numpy as np
from PIL import Image

from data_pipelines.edit_pairs import appearance, reference, scene
from data_pipelines.edit_pairs.pair import OBJECT, Name, Pair
from data_pipelines.edit_pairs.scene import Placed
from data_pipelines.edit_pairs.supply import Supply

_LOOKS = ("recolour", "material", "lighter", "darker")
_SCENES = ("larger", "smaller", "remove", "add", "move", "replace")
# Shares of pairs, ours.
_MARKED, _TRANSPARENT, _LOOK = 0.5, 0.15, 0.4


def draw(supply: Supply, rng: np.random.Generator) -> Pair:
  """One pair."""
  if supply.has_marked and rng.random() < _MARKED:
    return _in_place(supply, rng)
  placed = supply.placed(int(rng.integers(1, 4)))
  k = int(rng.integers(len(placed)))
  if rng.random() < _TRANSPARENT:
    background = Image.new("RGBA", supply.size, (0, 0, 0, 0))
  else:
    background = supply.place().image
  if rng.random() < _LOOK:
    return _look(placed, k, background, rng)
  operation = _SCENES[int(rng.integers(len(_SCENES)))]
  alone = len(placed) == 1 and background.mode == "RGBA"
  if alone and operation in ("remove", "add"):
    operation = "smaller"  # nothing at all would be left to see
  if operation == "move" and len(placed) == len(scene.COLUMNS):
    operation = "remove"
  make = {"add": _add, "remove": _remove, "move": _move, "replace": _replace}
  if operation in make:
    return make[operation](placed, k, background, supply, rng)
  return _scale(operation, placed, k, background, rng)


def _changed_colours(
  rgb_HWC: np.ndarray, inside_HW: np.ndarray, rng: np.random.Generator
):
  """Draws a new look: (operation, pixels, slots, parameters)."""
  operation = _LOOKS[int(rng.integers(len(_LOOKS)))]
  if operation == "recolour":
    name = appearance.colour_for(rgb_HWC, inside_HW, rng)
    value = appearance.COLOURS[name]
    after = appearance.recolour(rgb_HWC, inside_HW, value)
    return operation, after, {"colour": name}, {"rgb": list(value)}
  if operation == "material":
    names = list(appearance.MATERIALS)
    name = names[int(rng.integers(len(names)))]
    after = appearance.MATERIALS[name](rgb_HWC, inside_HW, rng)
    return operation, after, {"material": name}, {"material": name.en}
  percent = int(rng.choice([30, 40, 50, 60]))
  gain = 1 + percent / 100 if operation == "lighter" else 1 - percent / 100
  after = appearance.brighten(rgb_HWC, gain)
  return operation, after, {"percent": str(percent)}, {"gain": round(gain, 2)}


def _in_place(supply: Supply, rng: np.random.Generator) -> Pair:
  picture = supply.marked()
  inside = picture.region_HW
  before = np.asarray(picture.image)
  operation, after, slots, parameters = _changed_colours(
    np.ascontiguousarray(before[..., :3]), inside, rng
  )
  pixels = before.copy()
  pixels[inside, :3] = after[inside]
  name = picture.name or OBJECT
  slots = {"thing": name, **slots}
  return Pair(
    operation, (picture.image,), Image.fromarray(pixels), inside, slots,
    {**parameters, "thing": name.en},
  )  # fmt: skip


def _look(placed, k: int, background, rng) -> Pair:
  item = placed[k]
  rgba = np.array(item.image)
  inside = rgba[..., 3] > 0
  operation, after, slots, parameters = _changed_colours(
    np.ascontiguousarray(rgba[..., :3]), inside, rng
  )
  rgba[inside, :3] = after[inside]
  changed = dataclasses.replace(item, image=Image.fromarray(rgba))
  return _pair(
    operation, background, placed, _with(placed, k, changed), item,
    slots, parameters,
  )  # fmt: skip


def _scale(operation: str, placed, k: int, background, rng) -> Pair:
  """Both sizes are smaller than the cut-out's own."""
  item = placed[k]
  factor = round(float(rng.uniform(0.5, 0.75)), 2)
  column, size = item.column, background.size
  base = item.y + item.image.height
  small = scene.put(item.thing, item.image, factor, column, base, size)
  first, second = (small, item) if operation == "larger" else (item, small)
  ratio = second.image.height / first.image.height
  return _pair(
    operation, background, _with(placed, k, first), _with(placed, k, second),
    item, {"percent": str(round(100 * ratio))}, {"factor": round(ratio, 3)},
  )  # fmt: skip


def _remove(placed, k: int, background, supply, rng) -> Pair:
  item = placed[k]
  without = [other for other in placed if other is not item]
  return _pair("remove", background, placed, without, item, {}, {})


def _move(placed, k: int, background, supply, rng) -> Pair:
  item = placed[k]
  taken = {other.column for other in placed}
  free = [name for name in scene.COLUMNS if name not in taken]
  column = free[int(rng.integers(len(free)))]
  base = item.y + item.image.height
  moved = scene.put(item.thing, item.image, 1.0, column, base, background.size)
  return _pair(
    "move", background, placed, _with(placed, k, moved), item,
    {"to": scene.COLUMNS[column]}, {"to": column},
  )  # fmt: skip


def _add(placed, k: int, background, supply, rng) -> Pair:
  item = placed[k]
  column = scene.COLUMNS[item.column]
  without = [other for other in placed if other is not item]
  if item.thing.name != OBJECT:
    return _pair(
      "add", background, without, placed, item, {"column": column}, {}
    )
  shown = reference.show(item.thing, supply.size, rng)
  item = dataclasses.replace(
    scene.place(shown.thing, item.column, supply.size, rng), thing=item.thing
  )
  return _pair(
    "add_from", background, without, _with(placed, k, item), item,
    {"column": column}, {"from": shown.describe(1)}, (shown.image,),
  )  # fmt: skip


def _replace(placed, k: int, background, supply, rng) -> Pair:
  item = placed[k]
  # A thing without a name of its own is asked for by its picture.
  new = supply.thing([i.thing.name for i in placed if i.thing.name != OBJECT])
  if new is None:
    return _remove(placed, k, background, supply, rng)
  if new.name != OBJECT:
    other = scene.place(new, item.column, background.size, rng)
    slots: dict[str, Name | str] = {"other": new.name}
    return _pair(
      "replace", background, placed, _with(placed, k, other), item, slots, {}
    )
  shown = reference.show(new, supply.size, rng)
  other = scene.place(shown.thing, item.column, background.size, rng)
  return _pair(
    "replace_from", background, placed, _with(placed, k, other), item, {},
    {"from": shown.describe(1)}, (shown.image,),
  )  # fmt: skip


def _with(placed, k: int, item: Placed) -> list[Placed]:
  return [*placed[:k], item, *placed[k + 1 :]]


def _pair(
  operation: str,
  background: Image.Image,
  before: list[Placed],
  after: list[Placed],
  item: Placed,
  slots: dict,
  parameters: dict,
  more: tuple[Image.Image, ...] = (),
) -> Pair:
  """The scene before and after; what differs is what may change."""
  others = set(map(id, before)) & set(map(id, after))
  touched = [i for i in (*before, *after) if id(i) not in others]
  source = scene.render(background, before)
  return Pair(
    operation,
    (source, *more),
    scene.render(background, after),
    scene.footprint(touched, background.size),
    {"thing": item.thing.name, **slots},
    {
      **parameters,
      "before": [i.describe() for i in before],
      "after": [i.describe() for i in after],
    },
  )
