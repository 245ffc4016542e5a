# SPDX-License-Identifier: Apache-2.0
"""What stands around an object: desk, room, street, field or wall, and shadows.

The sun (or lamp) is a direction in the world; faces are lit by Lambert's law
over even light. Axes as in `camera`; canvases as in `painting`.
"""

import dataclasses
import functools

import cv2
import numpy as np

from data_pipelines.synthesis import backgrounds, calm, painting, surfaces
from data_pipelines.synthesis.camera import (
  Camera,
  Cylinder,
  Plane,
  project,
  rays,
  to_surface,
  to_world,
)
from data_pipelines.synthesis.objects import Object, Part

_COPY = 1.1  # side in the world of one copy of a material
_EVEN, _DIRECT = 0.78, 0.34  # light from everywhere, and from the sun
DIMMEST = _EVEN  # light on a face that the sun does not reach
_SHADE = 0.42  # depth of a shadow on the ground
_DEPTH = {"room": 0.85, "street": 2.4}  # of the wall behind the object


@dataclasses.dataclass(frozen=True)
class Scenery:
  """What is around an object.

  Attributes:
    setting: as in `objects.Object`.
    ground: material of the desk, floor or ground; '' where none is seen.
    wall: material of the wall; '' where none is seen.
    sun: direction to the light, of length 1.
    blur: sigma of what is not in focus, in pixels per 512 of the longer side.
    seed: of all textures.
    photo: path of a picture of the user that stands for it all; '' for none.
    photo_at: which part of it is seen, as in `backgrounds.photo`.
  """

  setting: str
  ground: str
  wall: str
  sun: tuple[float, float, float]
  blur: float
  seed: int
  photo: str = ""
  photo_at: tuple[float, float] = (0.5, 0.5)


def choose(setting: str, rng: np.random.Generator, photo: str = "") -> Scenery:
  """Random scenery of a setting, or a photo."""

  def one_of(names):
    return str(rng.choice(names))

  sun = np.array([rng.uniform(-0.6, 0.6), rng.uniform(0.7, 1), 0.55])
  return Scenery(
    setting,
    {
      "desk": one_of(surfaces.DESKS),
      "room": one_of(surfaces.DESKS),
      "street": one_of(("asphalt", "tiles", "concrete")),
      "field": "grass",
      "wall": "", "photo": "",
    }[setting],
    "" if setting in ("desk", "field", "photo") else one_of(surfaces.WALLS),
    tuple((sun / np.linalg.norm(sun)).tolist()),
    float(rng.uniform(0.8, 2.6)) if setting in ("street", "field", "room")
    else 0.0,
    int(rng.integers(2**31)), photo, tuple(rng.random(2).tolist()),
  )  # fmt: skip


def spot(
  scenery: Scenery, size: tuple[int, int], rng: np.random.Generator
) -> tuple[tuple[float, float], float]:
  """Where in the picture the object goes, and which part of it it spans."""
  if not scenery.photo:
    middle = tuple(float(v) for v in rng.uniform(0.46, 0.54, 2))
    return middle, float(rng.uniform(0.75, 0.9))
  fill = float(rng.uniform(0.4, 0.65))
  x, y = calm.calmest(photo_of(scenery, size), (fill, 0.6 * fill))
  edge = 0.5 * fill + 0.02
  return (min(max(x, edge), 1 - edge), min(max(y, edge), 1 - edge)), fill


@functools.lru_cache(maxsize=4)
def photo_of(scenery: Scenery, size: tuple[int, int]) -> np.ndarray | None:
  """The photo cut to a size, uint8 `[H, W, 3]`; None if it is unreadable."""
  found = backgrounds.photo(size, scenery.photo, scenery.photo_at)
  return None if found is None else np.asarray(found)


def light_of(scenery: Scenery, normal_N3: np.ndarray) -> np.ndarray:
  """Brightness `[N]` of faces with outward normals of length 1."""
  return _EVEN + _DIRECT * np.maximum(normal_N3 @ np.array(scenery.sun), 0)


def lit(
  scenery: Scenery, texture_HW4: np.ndarray, surface: Plane | Cylinder
) -> np.ndarray:
  """A face's texture in the light of the scenery."""
  if isinstance(surface, Plane):
    normal = np.cross(surface.down, surface.across)
    tone = light_of(scenery, normal[None] / np.linalg.norm(normal))
  else:
    count = texture_HW4.shape[1]
    angle = ((np.arange(count) + 0.5) / count * 2 - 1) * surface.angle
    normal_N3 = np.stack([np.sin(angle), 0 * angle, np.cos(angle)], 1)
    tone = light_of(scenery, normal_N3)
  out = texture_HW4.copy()
  out[..., :3] *= tone.astype(np.float32)[None, :, None]
  return out


def backdrop(
  scenery: Scenery, camera: Camera, size: tuple[int, int]
) -> np.ndarray:
  """The empty scene: float32 `[H, W, 3]`."""
  rng = np.random.default_rng(scenery.seed)
  if scenery.photo:
    return photo_of(scenery, size).astype(np.float32) / 255
  if scenery.setting == "desk":
    return _ground(scenery, camera, size, rng)[0]
  if scenery.setting == "wall":
    return _wall(scenery, camera, size, rng, 0.0)[0]
  # What is out of focus needs half of the pixels.
  half = tuple((n + 1) // 2 for n in size)
  near = dataclasses.replace(
    camera, focal=camera.focal / 2, centre=camera.centre / 2
  )
  draw = _field if scenery.setting == "field" else _corner
  canvas = draw(scenery, near, half, rng).astype(np.float32)
  sigma = scenery.blur * max(half) / 512
  canvas = cv2.GaussianBlur(canvas, (0, 0), sigma)
  twice = (2 * half[0], 2 * half[1])
  canvas = cv2.resize(canvas, twice, interpolation=cv2.INTER_LINEAR)
  return canvas[: size[1], : size[0]].copy()


def _ground(scenery, camera, size, rng):
  side = _COPY * rng.uniform(0.8, 1.5)
  plane = Plane(
    np.array([-0.3 * side, 0.0, -0.7 * side]), np.array([side, 0.0, 0.0]),
    np.array([0.0, 0.0, side]),
  )  # fmt: skip
  texture = surfaces.material(scenery.ground, rng, 512)
  texture *= light_of(scenery, np.array([[0.0, 1.0, 0.0]])).astype(np.float32)
  return painting.lay(size, texture, camera, plane)


def _wall(scenery, camera, size, rng, depth: float):
  side = _COPY * rng.uniform(0.8, 1.4)
  plane = Plane(
    np.array([-0.6 * side, 0.0, -depth]), np.array([side, 0.0, 0.0]),
    np.array([0.0, -side, 0.0]),
  )  # fmt: skip
  texture = surfaces.material(scenery.wall, rng, 512)
  texture *= light_of(scenery, np.array([[0.0, 0.0, 1.0]])).astype(np.float32)
  return *painting.lay(size, texture, camera, plane), plane


def _corner(scenery, camera, size, rng) -> np.ndarray:
  """A wall that stands on the ground; its foot is a little darker."""
  depth = _DEPTH[scenery.setting]
  canvas, met, plane = _wall(scenery, camera, size, rng, depth)
  ground, below = _ground(scenery, camera, size, rng)
  x, y = np.meshgrid(*(np.arange(n, dtype=np.float32) + 0.5 for n in size))
  _, v, _ = to_surface(camera, plane, x, y)
  on_ground = below & (~met | (v > 0))
  canvas = np.where(on_ground[..., None], ground, canvas)
  near = 0.2 * np.exp(-np.abs(v) / 0.12) * met
  return canvas * (1 - near[..., None]).astype(np.float32)


def _field(scenery, camera, size, rng) -> np.ndarray:
  """Grass under a sky, and hills between them."""
  ground, below = _ground(scenery, camera, size, rng)
  x, y = np.meshgrid(*(np.arange(n, dtype=np.float32) + 0.5 for n in size))
  d = rays(camera, x, y)
  height = d[..., 1] / np.hypot(d[..., 0], d[..., 2])
  horizon = np.argmax(below.any(1)) if below.any() else size[1]
  canvas = surfaces.sky(rng, (size[1], size[0]), max(float(horizon), 8.0))
  for low, tint in ((0.09, (0.62, 0.7, 0.74)), (0.05, (0.42, 0.52, 0.4))):
    bumps = surfaces.noise(rng, (1, 512), (1, int(rng.integers(6, 14))), 4)[0]
    turn = np.arctan2(d[..., 0], -d[..., 2]) / np.pi
    ridge = low + low * bumps[((turn + 1) * 255.5).astype(int)]
    inside = np.clip((ridge - height) * camera.focal / 2, 0, 1)[..., None]
    canvas = canvas + inside * (np.asarray(tint, np.float32) - canvas)
  return np.where(below[..., None], ground, canvas).astype(np.float32)


def cast(
  canvas: np.ndarray, scenery: Scenery, camera: Camera, thing: Object
) -> None:
  """Darkens where the object keeps the sun from the ground or the wall."""
  axis, at = (2, 0.001) if scenery.setting in ("wall", "photo") else (1, 0.0)
  edge = np.linspace(0, 1, 9)
  outline = np.array(
    [(u, 0) for u in edge] + [(u, 1) for u in edge[::-1]], float
  )
  solids = [to_world(thing.surface, outline)]
  solids += [part.points_N3 for part in (*thing.behind, *thing.before)]
  fallen = []
  for solid_N3 in solids:
    above = np.maximum(solid_N3[:, axis] - at, 0)[:, None]
    fallen.append(project(camera, solid_N3 - above * np.array(scenery.sun)
                          / scenery.sun[axis]))  # fmt: skip
  height, width = canvas.shape[:2]
  soft = 0.008 * max(width, height)
  depth = _SHADE if axis == 1 else 0.3
  painting.shade(canvas, fallen, depth, soft)
  if axis == 1:  # and once more, closely around its foot
    foot = [
      project(camera, s * (1, 0, 1)) for s in solids if s[:, 1].min() < 0.05
    ]
    painting.shade(canvas, foot, 0.3, 2 * soft)


def build(
  canvas: np.ndarray, parts: tuple[Part, ...], scenery: Scenery, camera: Camera
) -> None:
  """Draws parts, in their order; the backs of solid ones are not seen."""
  for part in parts:
    a, b, c = part.points_N3[:3]
    normal = np.cross(c - b, b - a)
    normal = normal / max(np.linalg.norm(normal), 1e-9)
    towards = float(normal @ (camera.position - a))
    if towards < 0 and part.solid:
      continue
    facing = normal if towards > 0 else -normal
    tone = float(light_of(scenery, facing[None])[0])
    colour = np.clip(np.asarray(part.colour) * tone, 0, 1)
    painting.fill(canvas, project(camera, part.points_N3), colour)
