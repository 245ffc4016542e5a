# SPDX-License-Identifier: Apache-2.0
"""A cut-out as a reference image of its own.

What is drawn into a target is made from these very pixels, so that the
reference shows all that the target needs.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.edit_pairs import scene
from data_pipelines.edit_pairs.pair import Thing

_FILL = 0.8  # of the canvas, at most
_GREYS = (255, 255, 240, 200)


@dataclasses.dataclass(frozen=True)
class Shown:
  """A reference image.

  Attributes:
    image: RGB on a plain ground, or RGBA.
    thing: the cut-out at the size that it has in the image.
    x: its left edge, pixels.
    y: its upper edge, pixels.
  """

  image: Image.Image
  thing: Thing
  x: int
  y: int

  def describe(self, number: int) -> dict[str, Any]:
    """Plain JSON: which reference, and the box of the cut-out in it."""
    return {
      "reference": number, "box": [self.x, self.y, *self.thing.image.size],
    }  # fmt: skip


def show(
  thing: Thing, size: tuple[int, int], rng: np.random.Generator
) -> Shown:
  """A cut-out in the middle of a plain or transparent canvas.

  Args:
    thing: made smaller where it has to be, never larger.
    size: (width, height) of the canvas.
    rng: draws the ground.
  """
  width, height = size
  w, h = thing.image.size
  scale = min(1.0, _FILL * width / w, _FILL * height / h)
  cut = scene.resized(thing.image, scale)
  x, y = (width - cut.width) // 2, (height - cut.height) // 2
  if rng.random() < 0.3:
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    canvas.paste(cut, (x, y))
  else:
    grey = int(rng.choice(_GREYS))
    canvas = Image.new("RGBA", size, (grey, grey, grey, 255))
    canvas.alpha_composite(cut, (x, y))
    canvas = canvas.convert("RGB")
  return Shown(canvas, dataclasses.replace(thing, image=cut), x, y)
