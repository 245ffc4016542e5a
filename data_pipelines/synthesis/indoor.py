# SPDX-License-Identifier: Apache-2.0
"""Books, mugs, boxes, screens, notebooks and cards, on a desk.

Sizes are ours.
"""

import numpy as np

from data_pipelines.synthesis.camera import Cylinder
from data_pipelines.synthesis.objects import (
  TWO,
  WHOLE,
  Object,
  Part,
  body,
  flat,
  lying,
  proportions,
  upright,
)
from data_pipelines.synthesis.panels import palette

_PAGES, _BLACK = (0.93, 0.9, 0.82), (0.1, 0.1, 0.11)


def _book(rng, tall: bool) -> Object:
  w, h = proportions(rng, True, high=(0.66, 0.78))
  thick, colours = rng.uniform(0.06, 0.14), palette(rng, "any")
  cover = 0.012
  behind = body((-w / 2, 0, -h / 2), (w / 2, cover, h / 2), colours.paper)
  behind += body(
    (-w / 2 + 0.02, cover, -h / 2 + 0.015),
    (w / 2 - 0.015, thick - cover, h / 2 - 0.015), _PAGES,
  )  # fmt: skip
  # The spine and the upper cover, whose top is the face.
  behind += body(
    (-w / 2, 0, -h / 2), (-w / 2 + 0.014, thick, h / 2), colours.paper
  )
  behind += body(
    (-w / 2, thick - cover, -h / 2), (w / 2, thick, h / 2), colours.paper
  )
  regions = (
    ((0.16, 0.1, 0.9, 0.76, "title"),)
    if tall
    else ((0.12, 0.09, 0.92, 0.46, "title"), (0.12, 0.48, 0.92, 0.76, "body"))
    if rng.random() < 0.5
    else ((0.12, 0.12, 0.92, 0.74, "title"), (0.14, 0.82, 0.9, 0.94, "label"))
  )
  return Object(
    "book", lying(w, h, thick + 0.001), (w, h), regions, "cover", colours,
    "desk", behind, yaw=24.0, pitch=(48.0, 75.0), gloss=rng.random() < 0.5,
  )  # fmt: skip


def _mug(rng, tall: bool) -> Object:
  radius, height = 0.42, rng.uniform(0.9, 1.05)
  colours = palette(rng, "any")
  # The whole visible half is the face; text stays in its middle.
  surface = Cylinder(radius, np.pi * 0.62, 0.0, height)
  turn = np.linspace(-0.5 * np.pi, 0.5 * np.pi, 25)
  outer, inner = (
    np.stack(
      [radius - 0.02 + a * np.cos(turn), height * 0.5 + b * np.sin(turn),
       0 * turn], 1,
    )
    for a, b in ((0.3, 0.33 * height), (0.19, 0.22 * height))
  )  # fmt: skip
  # Left of the axis when seen from the right, so that it is never hidden.
  handle = Part(np.concatenate([outer, inner[::-1]]), colours.paper)
  ring = np.linspace(0, 2 * np.pi, 49)[:-1]

  def disk(r, y, colour):
    points = np.stack([r * np.cos(ring), y + 0 * ring, r * np.sin(ring)], 1)
    return Part(points, colour)

  before = (
    disk(radius, height, colours.paper),
    disk(0.93 * radius, height, tuple(0.55 * v for v in colours.paper)),
    disk(0.86 * radius, height - 0.01, (0.25, 0.15, 0.09)),
  )
  regions = (
    ((0.4, 0.2, 0.6, 0.88, "title"),)
    if tall
    else ((0.29, 0.26, 0.71, 0.84, "title"),)
  )
  return Object(
    "mug", surface, (2 * 0.62 * np.pi * radius, height), regions, "print",
    colours, "room", (handle,), before, yaw=12.0, pitch=(10.0, 24.0),
    gloss=True,
  )  # fmt: skip


def _box(rng, tall: bool) -> Object:
  w, h = proportions(rng, tall or rng.random() < 0.4, (1.15, 1.5), (0.55, 0.8))
  deep, colours = rng.uniform(0.3, 0.5), palette(rng, "any")
  behind = body(
    (-w / 2, 0, -deep), (w / 2, h, -0.001), colours.paper,
    sides=colours.accent,
  )  # fmt: skip
  return Object(
    "box", upright(-w / 2, h, 0.0, w, h), (w, h),
    ((0.09, 0.12, 0.91, 0.88, "title"),) if tall else TWO, "label", colours,
    "room", behind, yaw=35.0, pitch=(6.0, 26.0),
  )  # fmt: skip


def _screen(rng, tall: bool) -> Object:
  w, h = proportions(rng, tall, wide=(1.45, 1.78), high=(0.5, 0.6))
  base, edge = 0.2, 0.03
  behind = body((-0.2, 0, -0.22), (0.2, 0.015, 0.05), _BLACK)
  behind += body((-0.05, 0.015, -0.12), (0.05, base + 0.1, -0.07), _BLACK)
  behind += body(
    (-w / 2 - edge, base - edge, -0.06),
    (w / 2 + edge, base + h + edge, -0.002), _BLACK,
  )  # fmt: skip
  regions = (
    ((0.08, 0.14, 0.92, 0.92, "body"),)
    if tall
    else ((0.06, 0.13, 0.94, 0.34, "title"), (0.07, 0.4, 0.93, 0.94, "body"))
  )
  return Object(
    "screen", upright(-w / 2, base + h, 0.0, w, h), (w, h), regions,
    "screen", palette(rng, "any"), "room", behind, pitch=(0.0, 16.0),
    gloss=True,
  )  # fmt: skip


def _notebook(rng, tall: bool) -> Object:
  w, h = proportions(rng, True, high=(0.68, 0.8))
  thick, before = 0.035, []
  behind = body((-w / 2, 0, -h / 2), (w / 2, thick, h / 2), _PAGES)
  for x in np.linspace(-0.44 * w, 0.44 * w, 19):
    z, y = -h / 2, thick + 0.002
    before.append(_ring(x, y, z))
  return Object(
    "notebook", lying(w, h, thick + 0.001), (w, h),
    ((0.14, 0.12, 0.94, 0.92, "body"),) if tall
    else ((0.13, 0.1, 0.94, 0.26, "title"), (0.13, 0.3, 0.94, 0.94, "body")),
    "lined", palette(rng, "light"), "desk", behind, tuple(before), yaw=24.0,
    pitch=(52.0, 78.0),
  )  # fmt: skip


def _ring(x, y, z) -> Part:
  return flat(
    ((x - 0.005, y, z + 0.035), (x + 0.005, y, z + 0.035),
     (x + 0.005, y + 0.02, z - 0.02), (x - 0.005, y + 0.02, z - 0.02)),
    (0.3, 0.3, 0.32),
  )  # fmt: skip


def _card(rng, tall: bool) -> Object:
  w, h = proportions(rng, tall, (1.4, 1.8), (0.55, 0.7))
  colours = palette(rng, "any")
  behind = body((-w / 2, 0, -h / 2), (w / 2, 0.01, h / 2), colours.paper)
  return Object(
    "card", lying(w, h, 0.0105), (w, h), WHOLE if tall else TWO, "paper",
    colours, "desk", behind, yaw=26.0, pitch=(45.0, 78.0), corner=0.03,
  )  # fmt: skip


OBJECTS = {
  "book": _book,
  "mug": _mug,
  "box": _box,
  "screen": _screen,
  "notebook": _notebook,
  "card": _card,
}
