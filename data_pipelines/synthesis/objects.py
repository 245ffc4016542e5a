# SPDX-License-Identifier: Apache-2.0
"""What a thing that carries text is: a face, and a few polygons around it.

Its world is one where the longer side of the face is about 1 (see `camera` for
the axes). `outdoor` and `indoor` make the things.
"""

import dataclasses

import numpy as np

from data_pipelines.synthesis.camera import Cylinder, Plane, to_world
from data_pipelines.synthesis.panels import Palette

Colour = tuple[float, float, float]
Region = tuple[float, float, float, float, str]
WHOLE: tuple[Region, ...] = ((0.09, 0.12, 0.91, 0.88, "title"),)
TWO: tuple[Region, ...] = (
  (0.09, 0.1, 0.91, 0.5, "title"),
  (0.11, 0.54, 0.89, 0.88, "body"),
)


@dataclasses.dataclass(frozen=True)
class Part:
  """A polygon in one colour.

  Attributes:
    points_N3: its corners, clockwise as seen from its front.
    colour: in even light.
    solid: one side of a body, seen from its front only.
  """

  points_N3: np.ndarray
  colour: Colour
  solid: bool = False


@dataclasses.dataclass(frozen=True)
class Object:
  """Something with a face for text.

  Attributes:
    name: what it is, in one word.
    surface: of the face.
    shape: width and height of the face in the world.
    regions: (u0, v0, u1, v1, role) for text, in reading order.
    style: of `panels.STYLES`.
    colours: of the face.
    setting: 'desk' (seen from above), 'room', 'street', 'field', 'wall' or
      'photo'.
    behind: parts that are drawn before the face, back to front.
    before: parts that are drawn after it; they touch no region.
    yaw: largest angle from which it is seen, in degrees.
    pitch: lowest and highest height of the camera, in degrees.
    gloss: whether it shines.
    corner: radius of the face's corners in parts of its shorter side.
  """

  name: str
  surface: Plane | Cylinder
  shape: tuple[float, float]
  regions: tuple[Region, ...]
  style: str
  colours: Palette
  setting: str
  behind: tuple[Part, ...] = ()
  before: tuple[Part, ...] = ()
  yaw: float = 28.0
  pitch: tuple[float, float] = (-8.0, 14.0)
  gloss: bool = False
  corner: float = 0.0


def proportions(rng, tall: bool, wide=(1.3, 2.2), high=(0.4, 0.6)):
  """Random width and height of a face, the longer 1: wide, or high if tall."""
  ratio = rng.uniform(*(high if tall else wide))
  return (ratio, 1.0) if ratio < 1 else (1.0, 1 / ratio)


def upright(left, top, z, width, height) -> Plane:
  """A face that looks towards z."""
  return Plane(
    np.array([left, top, z]), np.array([width, 0.0, 0.0]),
    np.array([0.0, -height, 0.0]),
  )  # fmt: skip


def lying(width, height, y) -> Plane:
  """A face that looks up, read from the side of positive z."""
  return Plane(
    np.array([-width / 2, y, -height / 2]), np.array([width, 0.0, 0.0]),
    np.array([0.0, 0.0, height]),
  )  # fmt: skip


def flat(points, colour: Colour) -> Part:
  """A thin polygon, seen from both sides."""
  return Part(np.array(points, float), colour)


def rectangle(left, bottom, right, top, z, colour: Colour) -> Part:
  """An upright one that looks towards z."""
  return flat(
    ((left, top, z), (right, top, z), (right, bottom, z), (left, bottom, z)),
    colour,
  )


def body(low, high, colour: Colour, sides: Colour | None = None):
  """The six sides of a box with its edges along the axes.

  Args:
    low: its smallest x, y, z.
    high: its largest x, y, z.
    colour: of its front and back, and of the rest by default.
    sides: of its left and right.
  """
  (a, b, c), (d, e, f) = low, high
  side = sides or colour
  faces = (
    (((d, e, c), (a, e, c), (a, b, c), (d, b, c)), colour),  # back
    (((a, b, f), (d, b, f), (d, b, c), (a, b, c)), colour),  # below
    (((a, e, c), (a, e, f), (a, b, f), (a, b, c)), side),
    (((d, e, f), (d, e, c), (d, b, c), (d, b, f)), side),
    (((a, e, c), (d, e, c), (d, e, f), (a, e, f)), colour),
    (((a, e, f), (d, e, f), (d, b, f), (a, b, f)), colour),
  )
  return tuple(Part(np.array(p, float), c, True) for p, c in faces)


def points(thing: Object) -> np.ndarray:
  """Corners of the face and, unless far off it, of the parts: `[N, 3]`."""
  grid = np.array([(u, v) for u in (0, 0.25, 0.5, 0.75, 1) for v in (0, 1)])
  face_N3 = to_world(thing.surface, grid)
  if thing.setting in ("field", "street", "wall", "photo"):
    return face_N3
  parts = [part.points_N3 for part in (*thing.behind, *thing.before)]
  return np.concatenate([face_N3, *parts])
