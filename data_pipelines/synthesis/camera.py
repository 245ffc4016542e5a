# SPDX-License-Identifier: Apache-2.0
"""A pinhole camera, and the two surfaces that carry text: plane and cylinder.

World: x to the right, y up, z towards the viewer. Pixels and texture
coordinates are continuous: pixel (i, j) covers [i, i + 1] x [j, j + 1], so a
box of PIL needs no half pixel. Shapes: N points, 2 or 3 coordinates.
"""

import dataclasses

import cv2
import numpy as np

_UP = np.array([0.0, 1.0, 0.0])


@dataclasses.dataclass(frozen=True)
class Camera:
  """A camera without distortion.

  Attributes:
    position: in the world, `[3]`.
    axes: right, down and forward as rows, `[3, 3]`.
    focal: length in pixels.
    centre: principal point in pixels, `[2]`; it may lie off the picture's
      centre, as with a cropped photograph.
  """

  position: np.ndarray
  axes: np.ndarray
  focal: float
  centre: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plane:
  """A parallelogram; (u, v) in [0, 1] from its top left corner.

  Attributes:
    corner: top left, `[3]`.
    across: from top left to top right, `[3]`.
    down: from top left to bottom left, `[3]`.
  """

  corner: np.ndarray
  across: np.ndarray
  down: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cylinder:
  """A strip of an upright cylinder around the y axis, facing z.

  Attributes:
    radius: of the cylinder.
    angle: half of what the strip spans, in radians.
    bottom: its lowest y.
    top: its highest y.
  """

  radius: float
  angle: float
  bottom: float
  top: float


def look(
  target: np.ndarray, yaw: float, pitch: float, roll: float, distance: float,
  focal: float, centre: np.ndarray,
) -> Camera:  # fmt: skip
  """A camera that circles a target.

  Args:
    target: what the optical axis meets, `[3]`.
    yaw: angle around the y axis, in radians; positive sees the right side.
    pitch: height of the camera over the horizon, in radians.
    roll: of the picture, in radians.
    distance: from the target.
    focal: length in pixels.
    centre: principal point in pixels, `[2]`.
  """
  back = np.array(
    [
      np.sin(yaw) * np.cos(pitch),
      np.sin(pitch),
      np.cos(yaw) * np.cos(pitch),
    ]
  )
  right = np.cross(-back, _UP)
  right /= np.linalg.norm(right)
  down = np.cross(-back, right)
  c, s = np.cos(roll), np.sin(roll)
  axes = np.stack([c * right + s * down, c * down - s * right, -back])
  return Camera(target + distance * back, axes, focal, np.asarray(centre))


def frame(
  points_N3: np.ndarray, size: tuple[int, int], yaw: float, pitch: float,
  roll: float, view: float, fill: float, middle: tuple[float, float],
) -> Camera:  # fmt: skip
  """A camera that shows points at a given size and place.

  Args:
    points_N3: what must be in the picture.
    size: (width, height) in pixels.
    yaw: as in `look`.
    pitch: as in `look`.
    roll: as in `look`.
    view: angle of view of the longer side, in radians.
    fill: part of the width or height that the points span at most.
    middle: of the points' bounding box, as part of width and height.
  """
  size_2 = np.asarray(size, float)
  target = (points_N3.min(0) + points_N3.max(0)) / 2
  focal = size_2.max() / 2 / np.tan(view / 2)
  distance = 4 * np.linalg.norm(np.ptp(points_N3, 0))
  # The span is nearly inverse to the distance: this converges at once.
  for _ in range(8):
    camera = look(target, yaw, pitch, roll, distance, focal, size_2 / 2)
    pixels = project(camera, points_N3)
    distance *= (np.ptp(pixels, 0) / (fill * size_2)).max()
  camera = look(target, yaw, pitch, roll, distance, focal, size_2 / 2)
  pixels = project(camera, points_N3)
  shift = np.asarray(middle) * size_2 - (pixels.min(0) + pixels.max(0)) / 2
  return dataclasses.replace(camera, centre=camera.centre + shift)


def project(camera: Camera, points_N3: np.ndarray) -> np.ndarray:
  """Pixels `[N, 2]` of points in front of the camera."""
  seen = (points_N3 - camera.position) @ camera.axes.T
  return camera.focal * seen[:, :2] / seen[:, 2:] + camera.centre


def rays(camera: Camera, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Directions `[..., 3]` in the world of pixels x, y of one shape."""
  u, v = (x - camera.centre[0]) / camera.focal, (y - camera.centre[1])
  local = np.stack([u, v / camera.focal, np.ones_like(u)], -1)
  return local @ camera.axes


def to_world(surface: Plane | Cylinder, uv_N2: np.ndarray) -> np.ndarray:
  """Points `[N, 3]` of a surface at (u, v)."""
  u, v = uv_N2[:, :1], uv_N2[:, 1:]
  if isinstance(surface, Plane):
    return surface.corner + u * surface.across + v * surface.down
  angle = (2 * u - 1) * surface.angle
  y = surface.top + v * (surface.bottom - surface.top)
  r = surface.radius
  return np.concatenate([r * np.sin(angle), y, r * np.cos(angle)], 1)


def homography(camera: Camera, plane: Plane) -> np.ndarray:
  """`[3, 3]`, from (u, v, 1) of a plane to homogeneous pixels."""
  basis = np.stack(
    [plane.across, plane.down, plane.corner - camera.position], 1
  )
  lens = np.diag([camera.focal, camera.focal, 1.0])
  lens[:2, 2] = camera.centre
  return lens @ camera.axes @ basis


def to_surface(
  camera: Camera, surface: Plane | Cylinder, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """u, v of pixels, and where the ray meets the surface's front at all.

  Args:
    camera: the camera.
    surface: its u and v may leave [0, 1]: the plane and cylinder go on.
    x: pixels.
    y: pixels, of the same shape.

  Returns:
    u, v and a bool array, all of that shape.
  """
  if isinstance(surface, Plane):
    h = np.linalg.inv(homography(camera, surface)).tolist()
    # Pixels are (u, v, 1) times depth, so w is one over the depth.
    u, v, w = (a * x + b * y + c for a, b, c in h)
    met = w > 1e-9
    w = np.where(met, w, 1)
    return u / w, v / w, met
  d = rays(camera, x, y)
  px, py, pz = camera.position
  a = d[..., 0] ** 2 + d[..., 2] ** 2
  b = d[..., 0] * px + d[..., 2] * pz
  root = b * b - a * (px * px + pz * pz - surface.radius**2)
  met = root > 0
  # The nearer of both meetings.
  t = (-b - np.sqrt(np.where(met, root, 0))) / a
  angle = np.arctan2(px + t * d[..., 0], pz + t * d[..., 2])
  u = (angle / surface.angle + 1) / 2
  v = (surface.top - (py + t * d[..., 1])) / (surface.top - surface.bottom)
  return u, v, met


def quad(
  camera: Camera, surface: Plane | Cylinder,
  box: tuple[float, float, float, float],
) -> np.ndarray:  # fmt: skip
  """Four pixels around a box on a surface, first the text's top left corner.

  On a plane they are its corners. On a cylinder, whose edges are seen curved,
  they are the smallest rectangle, turned as it need be, that holds the box.

  Args:
    camera: the camera.
    surface: the surface.
    box: u0, v0, u1, v1.

  Returns:
    `[4, 2]`: top left, top right, bottom right, bottom left, as read.
  """
  u0, v0, u1, v1 = box
  corners_42 = np.array([[u0, v0], [u1, v0], [u1, v1], [u0, v1]])
  seen_42 = project(camera, to_world(surface, corners_42))
  if isinstance(surface, Plane):
    return seen_42
  along = np.linspace(0, 1, 33)[:, None]
  edge_N2 = np.concatenate(
    [
      a + along * (b - a)
      for a, b in zip(corners_42, np.roll(corners_42, -1, 0))
    ]
  )
  pixels_N2 = project(camera, to_world(surface, edge_N2)).astype(np.float32)
  found_42 = cv2.boxPoints(cv2.minAreaRect(pixels_N2)).astype(float)
  # cv2 starts at a corner of its own choice; both go clockwise.
  turns = [np.roll(found_42, -k, 0) for k in range(4)]
  return min(turns, key=lambda t: np.square(t - seen_42).sum())
