# SPDX-License-Identifier: Apache-2.0
"""Cut-outs on a background, side by side, so that no two overlap.

Shapes: H height, W width.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipelines.edit_pairs.pair import Name, Picture, Thing

COLUMNS = {
  "left": Name("on the left", "左边"),
  "middle": Name("in the middle", "中间"),
  "right": Name("on the right", "右边"),
}
# Shares of the canvas, ours. A column is a third; things stay inside theirs.
_WIDEST, _HEIGHTS, _BASES = 0.29, (0.32, 0.5), (0.8, 0.96)


@dataclasses.dataclass(frozen=True)
class Placed:
  """A cut-out at its place.

  Attributes:
    thing: what it is.
    image: RGBA, at its final size.
    x: left edge, pixels.
    y: upper edge, pixels.
    column: a key of COLUMNS.
  """

  thing: Thing
  image: Image.Image
  x: int
  y: int
  column: str

  def describe(self) -> dict:
    """Plain JSON for the parameters of a pair."""
    return {
      "thing": self.thing.name.en,
      "box": [self.x, self.y, *self.image.size],
      "column": self.column,
    }


def place(
  thing: Thing, column: str, size: tuple[int, int], rng: np.random.Generator
) -> Placed:
  """A cut-out in a column, standing near the lower edge.

  Args:
    thing: made smaller where it has to be, never larger.
    column: a key of COLUMNS.
    size: (width, height) of the canvas.
    rng: draws its height and where it stands.
  """
  width, height = size
  wanted = height * float(rng.uniform(*_HEIGHTS))
  base = height * float(rng.uniform(*_BASES))
  w, h = thing.image.size
  scale = min(1.0, wanted / h, width * _WIDEST / w)
  return put(thing, thing.image, scale, column, base, size)


def put(
  thing: Thing,
  image: Image.Image,
  scale: float,
  column: str,
  base: float,
  size: tuple[int, int],
) -> Placed:
  """An image of a cut-out, scaled, in a column, with its lower edge at base."""
  scaled = resized(image, scale)
  centre = (tuple(COLUMNS).index(column) + 0.5) / len(COLUMNS) * size[0]
  x = round(centre - scaled.width / 2)
  y = max(0, round(base) - scaled.height)
  return Placed(thing, scaled, x, y, column)


def resized(image: Image.Image, scale: float) -> Image.Image:
  """An image at a scale; at 1 the very image."""
  if scale == 1:
    return image
  size = [max(1, round(side * scale)) for side in image.size]
  # Pillow premultiplies alpha, so hidden colours do not bleed into edges.
  return image.resize(size, Image.Resampling.LANCZOS)


def render(background: Image.Image, placed: Sequence[Placed]) -> Image.Image:
  """The scene, in the mode of the background."""
  canvas = background.convert("RGBA")
  for item in placed:
    # A pixel under a transparent one keeps its bytes.
    canvas.alpha_composite(item.image, (item.x, item.y))
  return canvas.convert(background.mode)


def footprint(
  placed: Sequence[Placed], size: tuple[int, int], least: int = 1
) -> np.ndarray:
  """bool [H, W]: pixels of a canvas of `size` with an alpha of at least so."""
  touched = np.zeros((size[1], size[0]), bool)
  for item in placed:
    alpha = np.asarray(item.image.getchannel("A")) >= least
    rows = slice(item.y, item.y + alpha.shape[0])
    columns = slice(item.x, item.x + alpha.shape[1])
    view = touched[rows, columns]
    view |= alpha[: view.shape[0], : view.shape[1]]
  return touched


def describe(placed: Sequence[Placed], background: Picture) -> Name:
  """'mug, star and tree in front of a beach', as far as there are names."""
  english = [item.thing.name.en for item in placed]
  chinese = [item.thing.name.zh for item in placed]
  en = " and ".join(filter(None, [", ".join(english[:-1]), english[-1]]))
  zh = "和".join(filter(None, ["、".join(chinese[:-1]), chinese[-1]]))
  if background.name is None:
    return Name(en, zh)
  return Name(
    f"{en} in front of a {background.name.en}", f"{background.name.zh}前的{zh}"
  )
