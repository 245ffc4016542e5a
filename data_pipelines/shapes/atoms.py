# SPDX-License-Identifier: Apache-2.0
"""From a text-to-image prompt of `prompts` back to its atoms.

A loader's sample has its caption and not its provenance; the language of the
prompts is small enough to be read without doubt.
"""

import re
from typing import Any

import numpy as np

from data_pipelines.shapes import checker, reader
from data_pipelines.shapes import colour as colours
from data_pipelines.shapes import vocabulary as vocab

_SINGULAR = {plural: shape for shape, plural in vocab.PLURALS.items()}


def _any(words) -> str:
  return "|".join(map(re.escape, words))


_THING = rf"an? ({_any(vocab.COLOURS)}) ({_any(vocab.SHAPES)})"
_SINGLE = re.compile(rf"{_THING}(?: in the ({_any(vocab.PLACES)}))?")
_RELATION = re.compile(rf"{_THING} ({_any(vocab.RELATIONS)}) {_THING}")
_COUNT = re.compile(
  rf"({_any(vocab.NUMBERS)}) ({_any(vocab.COLOURS)}) "
  rf"({_any((*vocab.SHAPES, *_SINGULAR))})"
)
_TEXT = re.compile(
  rf"the (?:letter|digit|word) (\S+) in ({_any(vocab.COLOURS)})"
)

_RETEXT = re.compile(r"change the (?:letter|digit) to (\S+)")


def atoms_of(prompt: str) -> dict[str, Any] | None:
  """The atoms that a prompt stands for; None if it is of another language."""
  if found := _TEXT.fullmatch(prompt):
    return {"text": found[1], "colour": found[2]}
  if found := _SINGLE.fullmatch(prompt):
    thing = {"colour": found[1], "shape": found[2]}
    return {"objects": [thing | ({"place": found[3]} if found[3] else {})]}
  if found := _RELATION.fullmatch(prompt):
    things = [found.group(1, 2), found.group(4, 5)]
    objects = [{"colour": c, "shape": s} for c, s in things]
    return {"objects": objects, "relation": found[3]}
  if found := _COUNT.fullmatch(prompt):
    shape = _SINGULAR.get(found[3], found[3])
    count = vocab.NUMBERS.index(found[1]) + 1
    thing = {"colour": found[2], "shape": shape}
    return {"objects": [dict(thing) for _ in range(count)]}
  return None


def atoms_of_edit(
  instruction: str, target: np.ndarray
) -> dict[str, Any] | None:
  """The atoms of an edit's right result, read off that image.

  Args:
    instruction: of `edits`.
    target: uint8 [H, W, 3], the right result.

  Returns:
    Atoms as those of `edits`, in any order; None where the target is no scene
    of shapes or glyphs.
  """
  if found := _RETEXT.fullmatch(instruction):
    colour = reader.dominant_colour(colours.palette_labels(target))
    return {"text": found[1], "colour": colour} if colour else None
  objects = checker.find_objects(target)
  if not all(thing.shape for thing in objects):
    return None
  return {
    "objects": [
      {"colour": o.colour, "shape": o.shape, "place": o.place} for o in objects
    ]
  }
