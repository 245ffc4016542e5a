# SPDX-License-Identifier: Apache-2.0
"""Strategy 2: text on an object in a scene, in perspective and under a light.

A plan decides everything; rendering it with and without ink differs in the
text alone. Text is set flat on the object's face, at `painting.FINE` texels
per pixel or more, and goes through the same camera as the polygons of its
lines. Chances and sizes are ours.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipelines.synthesis import (
  camera as cameras,
)
from data_pipelines.synthesis import (
  captions,
  indoor,
  lighting,
  objects,
  outdoor,
  painting,
  panels,
  places,
  scenery,
  writing,
)
from data_pipelines.synthesis.backgrounds import BAD_PHOTO, LEAST_CONTRAST
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import Language
from data_pipelines.synthesis.sample import (
  Rejected,
  Sample,
  TextBlock,
  layout_of,
  text_of,
)

OBJECTS = {**outdoor.OBJECTS, **indoor.OBJECTS}
PHOTO_CHANCE = 0.4  # of a photo of the user's as the background
TOO_PALE = "text does not stand out in this light"


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything about a picture but its pixels.

  Attributes:
    size: (width, height) of the picture.
    thing: the object.
    around: its surroundings.
    camera: who looks.
    light: on the finished picture.
    texels: (width, height) of the face's texture.
    seed: of the face's grain.
    written: blocks of text, in reading order.
  """

  size: tuple[int, int]
  thing: objects.Object
  around: scenery.Scenery
  camera: cameras.Camera
  light: lighting.Light
  texels: tuple[int, int]
  seed: int
  written: tuple[writing.Written, ...] = ()


def draw(
  language: Language, faces: Sequence[Face], size: tuple[int, int],
  rng: np.random.Generator, texts: Sequence[str] = (),
  photos: Sequence[str] = (),
) -> Sample | Rejected:  # fmt: skip
  """A picture of an object with text on it.

  Args:
    language: of the text.
    faces: fonts to choose from.
    size: (width, height) in pixels.
    rng: decides everything.
    texts: of the user, of which one is written, whole; none: random words.
    photos: paths of pictures of the user; some samples put a plate with text
      on a calm part of one. None: drawn scenes only.
  """
  name = str(rng.choice(list(OBJECTS)))
  photo = ""
  if photos and rng.random() < PHOTO_CHANCE:
    name, photo = "plate", str(photos[int(rng.integers(len(photos)))])
  found = plan(name, language, faces, size, rng, texts, photo)
  if isinstance(found, Rejected):
    return found
  return sample_of(found, language, rng)


def plan(
  name: str, language: Language, faces: Sequence[Face],
  size: tuple[int, int], rng: np.random.Generator,
  texts: Sequence[str] = (), photo: str = "",
) -> Plan | Rejected:  # fmt: skip
  """Decides on a picture of one kind of object.

  Args:
    name: of `OBJECTS`, or 'plate' for one on a photo.
    language: as in `draw`.
    faces: as in `draw`.
    size: as in `draw`.
    rng: as in `draw`.
    texts: as in `draw`.
    photo: path of the background of a plate.
  """
  tall = language.direction == "ttb"
  thing = (outdoor.plate if photo else OBJECTS[name])(rng, tall)
  around = scenery.choose(thing.setting, rng, photo)
  if photo and scenery.photo_of(around, size) is None:
    return Rejected(BAD_PHOTO)
  middle, fill = scenery.spot(around, size, rng)
  degrees = np.pi / 180
  camera = cameras.frame(
    objects.points(thing), size,
    yaw=float(rng.uniform(-1, 1)) * thing.yaw * degrees,
    pitch=float(rng.uniform(*thing.pitch)) * degrees,
    roll=float(rng.normal(0, 1.2)) * degrees,
    view=float(rng.uniform(28, 48)) * degrees, fill=fill, middle=middle,
  )  # fmt: skip
  texels, fine = _texels(camera, thing)
  light = lighting.draw_light(rng, thing.gloss)
  written = writing.write(thing, texels, fine, language, faces, rng, texts)
  if isinstance(written, Rejected):
    return written
  seed = int(rng.integers(2**31))
  out = Plan(size, thing, around, camera, light, texels, seed, written)
  return out if contrast(out) >= LEAST_CONTRAST else Rejected(TOO_PALE)


def _texels(camera: cameras.Camera, thing) -> tuple[tuple[int, int], float]:
  """Size of a face's texture, and its texels per pixel where it is smallest.

  `painting.FINE` texels per pixel where the face is seen largest.
  """
  u0, v0, u1, v1, _ = writing.around(thing.regions)
  grid_N2 = np.array(
    [(u, v) for u in np.linspace(u0, u1, 5) for v in np.linspace(v0, v1, 5)]
  )
  step = 1e-3
  pixels = []
  for move in ((step, 0), (0, step)):
    here, there = (
      cameras.project(camera, cameras.to_world(thing.surface, g))
      for g in (grid_N2, grid_N2 + move)
    )
    pixels.append(np.linalg.norm(there - here, axis=1) / step)
  texels = tuple(max(8, round(painting.FINE * p.max())) for p in pixels)
  return texels, max(n / p.min() for n, p in zip(texels, pixels))


def render(plan: Plan, ink: bool = True) -> np.ndarray:
  """Draws a plan.

  Args:
    plan: what to draw.
    ink: whether with the text.

  Returns:
    uint8 `[H, W, 3]`.
  """
  thing, around, camera = plan.thing, plan.around, plan.camera
  canvas = scenery.backdrop(around, camera, plan.size)
  scenery.cast(canvas, around, camera, thing)
  scenery.build(canvas, thing.behind, around, camera)
  rng = np.random.default_rng(plan.seed)
  face = panels.paint(thing.style, plan.texels, thing.colours, rng)
  if ink:
    for written in plan.written:
      writing.stamp(face, written, thing.colours.ink)
  if thing.corner:
    face = panels.rounded(face, thing.corner)
  face = scenery.lit(around, face, thing.surface)
  painting.paste(canvas, face, camera, thing.surface)
  scenery.build(canvas, thing.before, around, camera)
  return lighting.expose(canvas, plan.light)


def blocks(plan: Plan) -> tuple[TextBlock, ...]:
  """The text with the polygons of its lines in the picture."""
  scale = np.array(2 * plan.texels, float)
  return tuple(
    TextBlock(
      written.role,
      tuple(
        (text, _polygon(plan, np.asarray(box) / scale).tolist())
        for text, box in written.lines
      ),
      written.text,
    )
    for written in plan.written
  )


def _polygon(plan: Plan, box_uv) -> np.ndarray:
  return cameras.quad(plan.camera, plan.thing.surface, tuple(box_uv))


def contrast(plan: Plan) -> float:
  """Least contrast of ink and paper at the corners of lines, as lit."""
  size = np.array(plan.size)
  colours = np.array([plan.thing.colours.ink, plan.thing.colours.paper])
  least = np.inf
  for block in blocks(plan):
    for _, polygon in block.lines:
      x, y = (np.array(polygon) / size).T
      gain = scenery.DIMMEST * lighting.gain(plan.light, x, y)
      veil = lighting.veil(plan.light, x, y)
      lit = [lighting.mix(c, gain[:, None], veil[:, None]) for c in colours]
      least = min(least, lighting.contrast(*lit).min())
  return float(least)


def sample_of(
  plan: Plan, language: Language, rng: np.random.Generator
) -> Sample:
  """A plan as a sample."""
  english, chinese = places.described(plan.thing, plan.around)
  layout = layout_of(
    "composed", language, plan.size, [w.face for w in plan.written],
    blocks(plan), english,
  )  # fmt: skip
  caption = captions.of(layout, english, chinese, language, rng)
  return Sample(
    Image.fromarray(render(plan)), text_of(layout), caption,
    f"text-composed-{language.code}", layout,
  )  # fmt: skip
