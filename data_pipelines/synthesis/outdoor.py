# SPDX-License-Identifier: Apache-2.0
"""Signs, shop fronts, posters, banners and boards.

Sizes are ours.
"""

import itertools

import numpy as np

from data_pipelines.synthesis.camera import Plane
from data_pipelines.synthesis.objects import (
  TWO,
  WHOLE,
  Object,
  body,
  flat,
  proportions,
  rectangle,
  upright,
)
from data_pipelines.synthesis.panels import Palette, palette

_METAL, _WOOD = (0.55, 0.57, 0.6), (0.5, 0.34, 0.22)
_MENU = ((0.1, 0.1, 0.9, 0.3, "title"), (0.12, 0.34, 0.88, 0.9, "body"))


def _sign(rng, tall: bool) -> Object:
  w, h = proportions(rng, tall)
  base = 0.9
  posts = (0.0,) if tall else (-0.32 * w, 0.32 * w)
  behind = ()
  for x in posts:
    behind += body(
      (x - 0.02, 0, -0.09), (x + 0.02, base + 0.9 * h, -0.05), _METAL
    )
  behind += body((-w / 2, base, -0.05), (w / 2, base + h, -0.004), _METAL)
  colours = palette(rng, "any")
  regions = WHOLE if tall or rng.random() < 0.5 else TWO
  return Object(
    "sign", upright(-w / 2, base + h, 0.0, w, h), (w, h), regions, "board",
    colours, str(rng.choice(["field", "street"])), behind, gloss=True,
  )  # fmt: skip


def _shop(rng, tall: bool) -> Object:
  w, h = proportions(rng, tall, wide=(2.4, 4.2), high=(0.28, 0.4))
  base, colours = 0.95 if not tall else 0.35, palette(rng, "any")
  r, g, b = (float(v) for v in rng.uniform(0.15, 0.3, 3))
  glass = (r, g + 0.03, b + 0.06)
  left, right = (-0.5, 0.5) if not tall else (0.4, 1.5)
  behind = [
    rectangle(left - 0.03, 0.02, right + 0.03, 0.88, 0.002, colours.accent),
    rectangle(left, 0.05, right, 0.85, 0.003, glass),
    rectangle((left + right) / 2 - 0.01, 0.05, (left + right) / 2 + 0.01, 0.85,
          0.004, colours.accent),
  ]  # fmt: skip
  stripes = np.linspace(left - 0.05, right + 0.05, 10)
  for i, (a, b) in enumerate(itertools.pairwise(stripes)):
    cloth = colours.accent if i % 2 else (0.95, 0.94, 0.9)
    behind.append(
      flat(
        ((a, 0.9, 0.01), (b, 0.9, 0.01), (b, 0.72, 0.24), (a, 0.72, 0.24)),
        cloth,
      )
    )
  behind += body((-w / 2, base, 0), (w / 2, base + h, 0.07), colours.paper)
  return Object(
    "shop", upright(-w / 2, base + h, 0.072, w, h), (w, h),
    WHOLE if tall else ((0.06, 0.16, 0.94, 0.84, "title"),), "board",
    colours, "wall", tuple(behind), pitch=(-14.0, 2.0),
  )  # fmt: skip


def _poster(rng, tall: bool) -> Object:
  w, h = proportions(rng, tall or rng.random() < 0.5, (1.2, 1.6), (0.62, 0.8))
  plane = upright(-w / 2, 1.5, 0.004, w, h)
  tape = (0.9, 0.86, 0.68)
  before = []
  for u, v in ((0, 0), (1, 0)):  # a strip across each upper corner
    x, y = -w / 2 + u * w, 1.5 - v * h
    s = -1 if u else 1
    before.append(
      flat(
        ((x - 0.05 * s, y - 0.045, 0.006), (x + 0.045 * s, y + 0.05, 0.006),
         (x + 0.07 * s, y + 0.025, 0.006), (x - 0.025 * s, y - 0.07, 0.006)),
        tape,
      )
    )  # fmt: skip
  return Object(
    "poster", plane, (w, h), WHOLE if tall else TWO, "paper",
    palette(rng, "any"), "wall", (), tuple(before),
  )  # fmt: skip


def _banner(rng, tall: bool) -> Object:
  w, h = proportions(rng, tall, wide=(2.2, 3.6), high=(0.3, 0.42))
  base = 0.9
  behind = ()
  for x in (-w / 2 - 0.06, w / 2 + 0.06):
    behind += body(
      (x - 0.018, 0, -0.018), (x + 0.018, base + h + 0.12, 0.018), _WOOD
    )
  for side in (-1, 1):  # cords from the poles to the corners
    for y in (base + h - 0.02, base + 0.02):
      a, b = side * w / 2, side * (w / 2 + 0.05)
      behind += (
        flat(((a, y + 0.004, 0), (b, y + 0.014, 0), (b, y + 0.006, 0),
               (a, y - 0.004, 0)), (0.8, 0.78, 0.7)),
      )  # fmt: skip
  return Object(
    "banner", upright(-w / 2, base + h, 0.0, w, h), (w, h),
    WHOLE if tall else ((0.06, 0.16, 0.94, 0.84, "title"),), "banner",
    palette(rng, "any"), str(rng.choice(["field", "street"])), behind,
  )  # fmt: skip


def _chalkboard(rng, tall: bool) -> Object:
  w, h = proportions(rng, True, high=(0.6, 0.75))
  lean = 0.22 * h
  plane = Plane(
    np.array([-w / 2, h, -lean]), np.array([w, 0.0, 0.0]),
    np.array([0.0, 0.06 - h, lean]),
  )  # fmt: skip
  behind = []
  for x in (-w / 2 + 0.02, w / 2 - 0.02):
    for a, b in ((-2 * lean, -lean), (0.01, -lean - 0.01)):
      behind.append(
        flat(((x - 0.02, 0, a), (x - 0.02, h, b), (x + 0.02, h, b),
               (x + 0.02, 0, a)), _WOOD)
      )  # fmt: skip
  chalk = tuple(float(v) for v in rng.uniform(0.86, 1.0, 3))
  colours = Palette(
    (0.13, 0.17, 0.16), chalk, (0.55, 0.38, 0.24), ("black", "黑色")
  )
  return Object(
    "chalkboard", plane, (w, float(np.hypot(h - 0.06, lean))),
    ((0.12, 0.1, 0.88, 0.9, "title"),) if tall else _MENU, "chalk", colours,
    "street", tuple(behind), pitch=(2.0, 20.0),
  )  # fmt: skip


def plate(rng, tall: bool) -> Object:
  """A plate that hovers a little before a photo."""
  w, h = proportions(rng, tall, wide=(1.5, 2.6))
  return Object(
    "plate", upright(-w / 2, h / 2, 0.015, w, h), (w, h),
    WHOLE if tall or rng.random() < 0.5 else TWO, "board", palette(rng, "any"),
    "photo", yaw=22.0, corner=0.06,
  )  # fmt: skip


OBJECTS = {
  "sign": _sign,
  "shop": _shop,
  "poster": _poster,
  "banner": _banner,
  "chalkboard": _chalkboard,
}
