# SPDX-License-Identifier: Apache-2.0
"""Cut-outs drawn by code, so that everything runs without any input.

They are procedural, no photographs, and named so in every record
('embedded:...'). Drawn at twice their size and averaged down: Pillow draws no
smooth edges.
"""

from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.edit_pairs.pair import Name, Thing

_SIDE = 640
_COLOURS = (
  (204, 56, 48), (232, 132, 38), (236, 200, 58), (74, 150, 72), (52, 112, 190),
  (124, 78, 166), (224, 120, 160), (132, 88, 56), (64, 160, 160),
)  # fmt: skip


class _Pen:
  """Shapes in units of the canvas, 0 to 1; light from the upper left."""

  def __init__(self, rng: np.random.Generator):
    self.image = Image.new("RGBA", (_SIDE, _SIDE), (0, 0, 0, 0))
    self._draw = ImageDraw.Draw(self.image)
    self._rng = rng

  def colour(self) -> tuple[int, int, int]:
    base = _COLOURS[int(self._rng.integers(len(_COLOURS)))]
    shift = self._rng.integers(-14, 15, 3)
    return tuple(int(c) for c in np.clip(np.add(base, shift), 0, 255))

  def polygon(self, points, colour) -> None:
    self._draw.polygon([tuple(np.multiply(p, _SIDE)) for p in points], colour)

  def box(self, x0, y0, x1, y1, colour, radius=0.0) -> None:
    box = [c * _SIDE for c in (x0, y0, x1, y1)]
    self._draw.rounded_rectangle(box, radius * _SIDE, colour)

  def oval(self, x0, y0, x1, y1, colour) -> None:
    self._draw.ellipse([c * _SIDE for c in (x0, y0, x1, y1)], colour)

  def line(self, points, colour, width) -> None:
    flat = [tuple(np.multiply(p, _SIDE)) for p in points]
    self._draw.line(flat, colour, int(width * _SIDE), "curve")

  def arc(self, x0, y0, x1, y1, start, end, colour, width) -> None:
    box = [c * _SIDE for c in (x0, y0, x1, y1)]
    self._draw.arc(box, start, end, colour, int(width * _SIDE))


def draw(rng: np.random.Generator, others: tuple[str, ...] = ()) -> Thing:
  """One of the things.

  Args:
    rng: chooses and varies it.
    others: English names of those that it must not be.
  """
  names = [name for name in THINGS if name.en not in others]
  name = names[int(rng.integers(len(names)))]
  pen = _Pen(rng)
  THINGS[name](pen)
  image = _shaded(pen.image, rng)
  image = image.reduce(2)
  box = image.getchannel("A").getbbox()
  return Thing(image.crop(box), f"embedded:{name.en}", name)


def _shaded(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """Lighter towards the upper left, darker at the rim, a little uneven."""
  rgba = np.array(image)
  alpha = rgba[..., 3]
  inside = cv2.distanceTransform((alpha > 0).astype(np.uint8), cv2.DIST_L2, 3)
  round_ = np.clip(inside / (0.14 * _SIDE), 0, 1) ** 0.5
  steps = np.linspace(0, 1, _SIDE, dtype=np.float32)
  light = 1.12 - 0.18 * (steps[None] + steps[:, None]) / 2
  coarse = rng.uniform(-1, 1, (24, 24)).astype(np.float32)
  uneven = cv2.resize(coarse, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)
  gain = light * (0.72 + 0.3 * round_) + 0.03 * uneven
  shaded = rgba[..., :3] * gain[..., None]
  rgba[..., :3] = np.clip(np.rint(shaded), 0, 255).astype(np.uint8)
  return Image.fromarray(rgba)


def _ball(pen: _Pen) -> None:
  pen.oval(0.1, 0.1, 0.9, 0.9, pen.colour())
  pen.polygon([(0.14, 0.4), (0.86, 0.4), (0.9, 0.52), (0.1, 0.52)], "white")


def _mug(pen: _Pen) -> None:
  colour = pen.colour()
  pen.arc(0.55, 0.3, 0.92, 0.72, -90, 90, colour, 0.07)
  pen.box(0.15, 0.18, 0.72, 0.85, colour, 0.06)
  pen.oval(0.17, 0.13, 0.7, 0.25, (96, 60, 40))


def _apple(pen: _Pen) -> None:
  colour = pen.colour()
  pen.line([(0.5, 0.3), (0.54, 0.1)], (92, 62, 38), 0.04)
  pen.oval(0.12, 0.22, 0.6, 0.9, colour)
  pen.oval(0.4, 0.22, 0.88, 0.9, colour)
  pen.oval(0.55, 0.08, 0.8, 0.2, (84, 146, 60))


def _balloon(pen: _Pen) -> None:
  colour = pen.colour()
  pen.line([(0.5, 0.7), (0.46, 0.85), (0.52, 0.98)], (90, 90, 90), 0.012)
  pen.polygon([(0.5, 0.66), (0.44, 0.75), (0.56, 0.75)], colour)
  pen.oval(0.2, 0.05, 0.8, 0.7, colour)


def _umbrella(pen: _Pen) -> None:
  colour = pen.colour()
  pen.line([(0.5, 0.1), (0.5, 0.86)], (80, 60, 50), 0.03)
  pen.arc(0.34, 0.76, 0.515, 0.96, 0, 180, (80, 60, 50), 0.03)
  pen.polygon(
    [(0.5 - 0.44 * np.cos(t), 0.55 - 0.43 * np.sin(t))
     for t in np.linspace(0, np.pi, 40)], colour,
  )  # fmt: skip
  for k in range(3):
    pen.oval(0.06 + 0.293 * k, 0.5, 0.353 + 0.293 * k, 0.6, colour)


def _book(pen: _Pen) -> None:
  pen.polygon([(0.2, 0.14), (0.84, 0.1), (0.84, 0.86), (0.2, 0.9)], "ivory")
  colour = pen.colour()
  pen.polygon([(0.14, 0.12), (0.76, 0.12), (0.76, 0.88), (0.14, 0.88)], colour)
  pen.box(0.26, 0.24, 0.64, 0.36, (240, 232, 214))


def _star(pen: _Pen) -> None:
  angles = np.arange(10) * np.pi / 5
  radii = np.where(np.arange(10) % 2, 0.19, 0.45)
  points = np.stack([np.sin(angles), -np.cos(angles)], 1) * radii[:, None]
  pen.polygon(points + 0.5, pen.colour())


def _fish(pen: _Pen) -> None:
  colour = pen.colour()
  pen.polygon([(0.68, 0.5), (0.97, 0.26), (0.97, 0.74)], colour)
  pen.oval(0.04, 0.24, 0.78, 0.76, colour)
  pen.oval(0.16, 0.38, 0.26, 0.48, "white")
  pen.oval(0.19, 0.41, 0.24, 0.46, "black")


def _tree(pen: _Pen) -> None:
  pen.box(0.44, 0.6, 0.56, 0.98, (104, 72, 46))
  green = (62, int(pen._rng.integers(110, 150)), 58)
  for x, y, r in ((0.5, 0.28, 0.24), (0.3, 0.44, 0.2), (0.7, 0.44, 0.2)):
    pen.oval(x - r, y - r, x + r, y + r, green)
  pen.oval(0.3, 0.3, 0.7, 0.7, green)


def _house(pen: _Pen) -> None:
  pen.box(0.18, 0.44, 0.82, 0.94, (226, 212, 184))
  pen.polygon([(0.08, 0.46), (0.5, 0.08), (0.92, 0.46)], pen.colour())
  pen.box(0.42, 0.62, 0.58, 0.94, (110, 76, 50))
  for x in (0.24, 0.64):
    pen.box(x, 0.54, x + 0.12, 0.68, (140, 190, 220))


def _car(pen: _Pen) -> None:
  colour = pen.colour()
  pen.polygon([(0.22, 0.48), (0.34, 0.28), (0.66, 0.28), (0.8, 0.48)], colour)
  pen.polygon(
    [(0.29, 0.47), (0.37, 0.33), (0.62, 0.33), (0.71, 0.47)], (176, 212, 230)
  )
  pen.box(0.03, 0.46, 0.97, 0.68, colour, 0.08)
  for x in (0.14, 0.64):
    pen.oval(x, 0.56, x + 0.22, 0.78, (40, 40, 44))
    pen.oval(x + 0.06, 0.62, x + 0.16, 0.72, (190, 190, 196))


def _lamp(pen: _Pen) -> None:
  pen.box(0.47, 0.46, 0.53, 0.9, (120, 110, 100))
  pen.oval(0.28, 0.86, 0.72, 0.97, (120, 110, 100))
  pen.polygon([(0.34, 0.06), (0.66, 0.06), (0.84, 0.5), (0.16, 0.5)],
    pen.colour())  # fmt: skip


def _bottle(pen: _Pen) -> None:
  colour = pen.colour()
  pen.box(0.43, 0.04, 0.57, 0.12, (70, 60, 56), 0.01)
  pen.box(0.44, 0.11, 0.56, 0.36, colour)
  pen.box(0.32, 0.3, 0.68, 0.97, colour, 0.08)
  pen.box(0.32, 0.52, 0.68, 0.78, (240, 236, 220))


def _flower(pen: _Pen) -> None:
  pen.line([(0.5, 0.4), (0.48, 0.98)], (72, 132, 60), 0.035)
  pen.oval(0.5, 0.66, 0.74, 0.76, (72, 132, 60))
  colour = pen.colour()
  for k in range(6):
    x = 0.5 + 0.19 * np.cos(k * np.pi / 3)
    y = 0.32 + 0.19 * np.sin(k * np.pi / 3)
    pen.oval(x - 0.12, y - 0.12, x + 0.12, y + 0.12, colour)
  pen.oval(0.4, 0.22, 0.6, 0.42, (244, 206, 70))


def _box(pen: _Pen) -> None:
  colour = pen.colour()
  pen.box(0.1, 0.3, 0.9, 0.92, colour)
  pen.box(0.06, 0.2, 0.94, 0.36, colour)
  pen.box(0.44, 0.2, 0.56, 0.92, (246, 240, 228))
  pen.oval(0.3, 0.06, 0.5, 0.22, (246, 240, 228))
  pen.oval(0.5, 0.06, 0.7, 0.22, (246, 240, 228))


THINGS: dict[Name, Callable[[_Pen], None]] = {
  Name("ball", "球"): _ball,
  Name("mug", "杯子"): _mug,
  Name("apple", "苹果"): _apple,
  Name("balloon", "气球"): _balloon,
  Name("umbrella", "雨伞"): _umbrella,
  Name("book", "书"): _book,
  Name("star", "星星"): _star,
  Name("fish", "鱼"): _fish,
  Name("tree", "树"): _tree,
  Name("house", "房子"): _house,
  Name("car", "汽车"): _car,
  Name("lamp", "台灯"): _lamp,
  Name("bottle", "瓶子"): _bottle,
  Name("flower", "花"): _flower,
  Name("gift box", "礼盒"): _box,
}
