# SPDX-License-Identifier: Apache-2.0
"""What is on a canvas, independent of the canvas's size in pixels."""

import dataclasses

from data_pipelines.errors import InputError
from data_pipelines.shapes import vocabulary as vocab


@dataclasses.dataclass(frozen=True)
class Item:
  """One coloured shape or one line of text; exactly one of the two is set.

  Attributes:
    colour: a key of `vocabulary.COLOURS`.
    x: centre, as a fraction of the canvas width.
    y: centre, as a fraction of the canvas height.
    size: side of the shape's box, or cap height of the text, as a fraction of
      the canvas's SHORT side, so that forms survive any aspect ratio.
    shape: one of `vocabulary.SHAPES`, or ''.
    text: characters to draw, or ''.
  """

  colour: str
  x: float
  y: float
  size: float
  shape: str = ""
  text: str = ""

  def __post_init__(self):
    if self.colour not in vocab.COLOURS:
      raise InputError(
        f"Item colour {self.colour!r} is unknown; use one of "
        f"{', '.join(vocab.COLOURS)}."
      )
    if bool(self.shape) == bool(self.text):
      raise InputError("An Item needs either a shape or a text; give one.")
    if self.shape and self.shape not in vocab.SHAPES:
      raise InputError(
        f"Item shape {self.shape!r} is unknown; use one of "
        f"{', '.join(vocab.SHAPES)}."
      )

  @property
  def place(self) -> str:
    """The quadrant of the item's centre."""
    return vocab.place_of(self.x, self.y)


@dataclasses.dataclass(frozen=True)
class Scene:
  """Items painted in order on one flat background (sRGB bytes)."""

  items: tuple[Item, ...]
  background: tuple[int, int, int] = vocab.BACKGROUND


def describe(scene: Scene) -> str:
  """Returns a canonical description, blind to jitter and item order."""
  return "; ".join(
    sorted(f"{i.colour} {i.shape or i.text} {i.place}" for i in scene.items)
  )
