# SPDX-License-Identifier: Apache-2.0
"""Editing examples: an instruction and the one exact result it asks for.

Source scenes jitter; what an edit adds or moves lands exactly on a quadrant's
centre with the size of what is already there, so the target follows from the
source and the instruction alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.shapes import prompts, scene
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.scene import Item, Scene


@dataclasses.dataclass(frozen=True)
class EditExample:
  """An instruction, the scene before and after; `atoms` describe the latter.

  `atoms` has the form documented in `prompts`, with a place for each object.
  """

  kind: str
  instruction: str
  source: Scene
  target: Scene
  atoms: dict[str, Any]


def sample_edit(kind: str, rng: np.random.Generator) -> EditExample:
  """Draws one example of a kind of `vocabulary.EDIT_KINDS`.

  Raises:
    InputError: for an unknown kind.
  """
  if kind == "retext":
    source = _glyph_source(rng)
  elif kind in _EDITS:
    source = _shape_source(rng)
  else:
    raise InputError(
      f"Edit kind {kind!r} is unknown; use one of "
      f"{', '.join(vocab.EDIT_KINDS)}."
    )
  instruction, items = _EDITS[kind](source.items, rng)
  target = Scene(items, source.background)
  return EditExample(kind, instruction, source, target, _atoms(target))


def is_held_out(example: EditExample) -> bool:
  """Whether instruction and source together are in the held-out 20 %."""
  key = f"{example.instruction} | {scene.describe(example.source)}"
  return prompts.is_held_out(key)


def sample_edit_split(
  kind: str, split: str, rng: np.random.Generator
) -> EditExample:
  """Draws one example of a kind from the 'seen' or 'held_out' edits.

  Raises:
    InputError: for an unknown kind or split.
  """
  prompts.require_split(split)
  while True:
    example = sample_edit(kind, rng)
    if is_held_out(example) == (split == "held_out"):
      return example


def _atoms(target: Scene) -> dict[str, Any]:
  if target.items and target.items[0].text:
    item = target.items[0]
    return {"text": item.text, "colour": item.colour}
  return {
    "objects": [
      {"colour": i.colour, "shape": i.shape, "place": i.place}
      for i in target.items
    ]
  }


def _shape_source(rng: np.random.Generator) -> Scene:
  """One or two items of one size; no two share colour, shape or quadrant."""
  count = int(rng.integers(1, 3))
  size = prompts.jittered(rng, (0, 0), prompts.SHAPE_SIZE)["size"]
  colours = rng.permutation(list(vocab.COLOURS))
  shapes = rng.permutation(vocab.SHAPES)
  places = rng.permutation(list(vocab.PLACES))
  return Scene(
    tuple(
      Item(
        str(colours[k]),
        shape=str(shapes[k]),
        **{
          **prompts.jittered(rng, vocab.PLACES[str(places[k])], size),
          "size": size,
        },
      )
      for k in range(count)
    )
  )


def _glyph_source(rng: np.random.Generator) -> Scene:
  geometry = prompts.jittered(rng, (0.5, 0.5), prompts.GLYPH_SIZE)
  colour = prompts.pick(rng, vocab.COLOURS)
  char = prompts.pick(rng, vocab.GLYPHS)
  return Scene((Item(colour, text=char, **geometry),))


def _new(items: tuple[Item, ...], field: str, options, rng) -> str:
  """Draws an option that no item has yet, so results stay unambiguous."""
  taken = {getattr(item, field) for item in items}
  return prompts.pick(rng, [o for o in options if o not in taken])


def _change_last(items: tuple[Item, ...], **changes) -> tuple[Item, ...]:
  """Returns the items with the last one changed.

  Sources are drawn symmetrically, so the last is as good as a random one.
  """
  return (*items[:-1], dataclasses.replace(items[-1], **changes))


def _recolour(items, rng):
  colour = _new(items, "colour", vocab.COLOURS, rng)
  instruction = f"make the {items[-1].shape} {colour}"
  return instruction, _change_last(items, colour=colour)


def _remove(items, rng):
  del rng
  return f"remove the {items[-1].colour} {items[-1].shape}", items[:-1]


def _add(items, rng):
  colour = _new(items, "colour", vocab.COLOURS, rng)
  shape = _new(items, "shape", vocab.SHAPES, rng)
  place = _new(items, "place", vocab.PLACES, rng)
  x, y = vocab.PLACES[place]
  new = Item(colour, x, y, items[0].size, shape=shape)
  article = vocab.article(colour)
  return f"add {article} {colour} {shape} in the {place}", (*items, new)


def _move(items, rng):
  place = _new(items, "place", vocab.PLACES, rng)
  x, y = vocab.PLACES[place]
  instruction = f"move the {items[-1].shape} to the {place}"
  return instruction, _change_last(items, x=x, y=y)


def _replace(items, rng):
  shape = _new(items, "shape", vocab.SHAPES, rng)
  instruction = f"replace the {items[-1].shape} with a {shape}"
  return instruction, _change_last(items, shape=shape)


def _retext(items, rng):
  """Letters become letters and digits digits, so one noun suffices."""
  noun = prompts.glyph_noun(items[-1].text)
  options = vocab.DIGITS if noun == "digit" else vocab.LETTERS
  text = _new(items, "text", options, rng)
  instruction = f"change the {noun} to {text}"
  return instruction, _change_last(items, text=text)


_EDITS: dict[str, Callable[..., tuple[str, tuple[Item, ...]]]] = {
  "recolour": _recolour,
  "remove": _remove,
  "add": _add,
  "move": _move,
  "replace": _replace,
  "retext": _retext,
}
