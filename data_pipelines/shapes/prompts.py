# SPDX-License-Identifier: Apache-2.0
"""Text-to-image examples: a prompt, its scene, and what must be true.

`atoms` is plain JSON in one of two forms:

    {"objects": [{"colour", "shape", "place"?}, ...], "relation"?: "left of"}
    {"text": "CAT", "colour": "green"}

`objects` lists everything that may be visible, and so fixes the count;
`relation` holds from the first object to the second.

The geometry is simple on purpose (fixed layouts, a few percent of jitter, one
background): the model that learns it in minutes on a CPU is tiny.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.scene import Item, Scene

SHAPE_SIZE = 0.34
GLYPH_SIZE = 0.58
SPLITS = ("seen", "held_out")

_JITTER = 0.02
_COUNT_SIZE = 0.3
_COUNT_LAYOUTS = {
  1: ((0.5, 0.5),),
  2: ((0.28, 0.5), (0.72, 0.5)),
  3: ((0.28, 0.3), (0.72, 0.3), (0.5, 0.72)),
  4: ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)),
}
_RELATION_LAYOUTS = {
  "left of": ((0.27, 0.5), (0.73, 0.5)),
  "right of": ((0.73, 0.5), (0.27, 0.5)),
  "above": ((0.5, 0.27), (0.5, 0.73)),
  "below": ((0.5, 0.73), (0.5, 0.27)),
}


@dataclasses.dataclass(frozen=True)
class Example:
  """A prompt with one scene that fulfils it."""

  kind: str
  prompt: str
  atoms: dict[str, Any]
  scene: Scene


def sample_t2i(kind: str, rng: np.random.Generator) -> Example:
  """Draws one example of a kind of `vocabulary.T2I_KINDS`.

  Raises:
    InputError: for an unknown kind.
  """
  if kind not in _SAMPLERS:
    raise InputError(
      f"Text-to-image kind {kind!r} is unknown; use one of "
      f"{', '.join(vocab.T2I_KINDS)}."
    )
  return _SAMPLERS[kind](rng)


def is_held_out(prompt: str) -> bool:
  """Whether a prompt is in the 20 % that training never sees."""
  return int(hashlib.md5(prompt.encode()).hexdigest(), 16) % 5 == 0


def sample_split(kind: str, split: str, rng: np.random.Generator) -> Example:
  """Draws one example of a kind whose prompt is 'seen' or 'held_out'.

  Raises:
    InputError: for an unknown kind or split.
  """
  require_split(split)
  while True:
    example = sample_t2i(kind, rng)
    if is_held_out(example.prompt) == (split == "held_out"):
      return example


def require_split(split: str):
  """Raises InputError unless `split` is 'seen' or 'held_out'."""
  if split not in SPLITS:
    raise InputError(f"Split {split!r} is unknown; use seen or held_out.")


def pick(rng: np.random.Generator, options) -> str:
  """Draws one of the options (a dict counts as its keys)."""
  options = tuple(options)
  return options[rng.integers(len(options))]


def jittered(
  rng: np.random.Generator, centre: tuple[float, float], size: float
) -> dict[str, float]:
  """Returns x, y and size of an item, each moved by a few percent."""
  dx, dy, ds = rng.uniform(-1, 1, 3).tolist()
  x, y = centre
  return {
    "x": x + _JITTER * dx,
    "y": y + _JITTER * dy,
    "size": size * (1 + 0.04 * ds),
  }


def glyph_noun(char: str) -> str:
  """Returns 'letter' or 'digit'."""
  return "digit" if char in vocab.DIGITS else "letter"


def _coloured_shape(rng: np.random.Generator) -> dict[str, str]:
  return {"colour": pick(rng, vocab.COLOURS), "shape": pick(rng, vocab.SHAPES)}


def _noun_phrase(thing: dict[str, str]) -> str:
  colour = thing["colour"]
  return f"{vocab.article(colour)} {colour} {thing['shape']}"


def _single(rng: np.random.Generator) -> Example:
  thing = _coloured_shape(rng)
  centre = tuple(rng.uniform(0.22, 0.78, 2).tolist())
  item = Item(**thing, **jittered(rng, centre, SHAPE_SIZE))
  return Example(
    "single", _noun_phrase(thing), {"objects": [thing]}, Scene((item,))
  )


def _position(rng: np.random.Generator) -> Example:
  thing, place = _coloured_shape(rng), pick(rng, vocab.PLACES)
  item = Item(**thing, **jittered(rng, vocab.PLACES[place], SHAPE_SIZE))
  prompt = f"{_noun_phrase(thing)} in the {place}"
  atoms = {"objects": [{**thing, "place": place}]}
  return Example("position", prompt, atoms, Scene((item,)))


def _counting(rng: np.random.Generator) -> Example:
  thing, count = _coloured_shape(rng), int(rng.integers(1, 5))
  size = jittered(rng, (0, 0), _COUNT_SIZE)["size"]
  items = tuple(
    Item(**thing, **{**jittered(rng, centre, size), "size": size})
    for centre in _COUNT_LAYOUTS[count]
  )
  noun = thing["shape"] if count == 1 else vocab.PLURALS[thing["shape"]]
  prompt = f"{vocab.NUMBERS[count - 1]} {thing['colour']} {noun}"
  atoms = {"objects": [dict(thing) for _ in items]}
  return Example("counting", prompt, atoms, Scene(items))


def _relation(rng: np.random.Generator) -> Example:
  relation = pick(rng, vocab.RELATIONS)
  colours = rng.permutation(list(vocab.COLOURS))[:2]
  things = [
    {"colour": str(colour), "shape": pick(rng, vocab.SHAPES)}
    for colour in colours
  ]
  items = tuple(
    Item(**thing, **jittered(rng, centre, SHAPE_SIZE))
    for thing, centre in zip(things, _RELATION_LAYOUTS[relation], strict=True)
  )
  prompt = f"{_noun_phrase(things[0])} {relation} {_noun_phrase(things[1])}"
  atoms = {"objects": things, "relation": relation}
  return Example("relation", prompt, atoms, Scene(items))


def _glyph(rng: np.random.Generator) -> Example:
  colour, char = pick(rng, vocab.COLOURS), pick(rng, vocab.GLYPHS)
  item = Item(colour, text=char, **jittered(rng, (0.5, 0.5), GLYPH_SIZE))
  prompt = f"the {glyph_noun(char)} {char} in {colour}"
  return Example(
    "glyph", prompt, {"text": char, "colour": colour}, Scene((item,))
  )


def _word(rng: np.random.Generator) -> Example:
  colour, word = pick(rng, vocab.COLOURS), pick(rng, vocab.WORDS)
  # On the fixed pitch of 1.2 cap heights, 86 % of the short side are filled.
  size = min(0.24, 0.86 / (1.2 * len(word)))
  item = Item(colour, text=word, **jittered(rng, (0.5, 0.5), size))
  atoms = {"text": word, "colour": colour}
  return Example("word", f"the word {word} in {colour}", atoms, Scene((item,)))


_SAMPLERS: dict[str, Callable[[np.random.Generator], Example]] = {
  "single": _single,
  "position": _position,
  "counting": _counting,
  "relation": _relation,
  "glyph": _glyph,
  "word": _word,
}
