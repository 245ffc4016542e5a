# SPDX-License-Identifier: Apache-2.0
"""Puts textures and polygons seen by a camera on a canvas.

A canvas is float32 `[H, W, 3]` in [0, 1] and is changed in place; pixels are
continuous as in `camera`.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from data_pipelines.synthesis import camera as cameras

FINE = 2  # samples per pixel along x and y for what carries text
_PARTS = 16  # of a pixel, in which cv2 takes corners


def window(
  pixels_N2: np.ndarray, size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
  """x0, y0, x1, y1 of the pixels around some points, None if off the canvas."""
  low = np.floor(pixels_N2.min(0) - 1).astype(int)
  high = np.ceil(pixels_N2.max(0) + 1).astype(int)
  x0, y0 = np.maximum(low, 0)
  x1, y1 = np.minimum(high, size)
  return (int(x0), int(y0), int(x1), int(y1)) if x0 < x1 and y0 < y1 else None


def paste(
  canvas: np.ndarray, texture_HW4: np.ndarray, camera: cameras.Camera,
  surface: cameras.Plane | cameras.Cylinder,
) -> None:  # fmt: skip
  """Draws a texture on a surface.

  Args:
    canvas: to draw on.
    texture_HW4: float32 with alpha, of which the colours are not yet
      multiplied by it; about `FINE` texels per pixel are sharpest.
    camera: the camera.
    surface: where the texture's corners are (0, 0) and (1, 1).
  """
  edge = np.linspace(0, 1, 17)
  around = np.array([(u, v) for u in edge for v in (0, 1)])
  pixels = cameras.project(camera, cameras.to_world(surface, around))
  found = window(pixels, canvas.shape[1::-1])
  if found is None:
    return
  alpha = texture_HW4[..., 3:]
  source = np.concatenate([texture_HW4[..., :3] * alpha, alpha], -1)
  see = _see_plane if isinstance(surface, cameras.Plane) else _see_cylinder
  seen = see(source.astype(np.float32, copy=False), camera, surface, found)
  x0, y0, x1, y1 = found
  seen = cv2.resize(seen, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
  under = canvas[y0:y1, x0:x1]
  under *= 1 - seen[..., 3:]
  under += seen[..., :3]


def _see_plane(source, camera, plane, view) -> np.ndarray:
  """A texture in a window, `FINE` times as large as it is."""
  x0, y0, x1, y1 = view
  rows, columns = source.shape[:2]
  to_uv = np.diag([1 / columns, 1 / rows, 1])
  to_fine = np.array(
    [[FINE, 0, -FINE * x0], [0, FINE, -FINE * y0], [0, 0, 1.0]]
  )
  # cv2 counts from the middles of pixels and texels.
  half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
  whole = to_fine @ cameras.homography(camera, plane) @ to_uv
  return cv2.warpPerspective(
    source, np.linalg.inv(half) @ whole @ half,
    ((x1 - x0) * FINE, (y1 - y0) * FINE), flags=cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_CONSTANT, borderValue=0,
  )  # fmt: skip


def _see_cylinder(source, camera, surface, view) -> np.ndarray:
  """As `_see_plane`."""
  x0, y0, x1, y1 = view
  x, y = np.meshgrid(
    x0 + (np.arange((x1 - x0) * FINE) + 0.5) / FINE,
    y0 + (np.arange((y1 - y0) * FINE) + 0.5) / FINE,
  )
  u, v, met = cameras.to_surface(camera, surface, x, y)
  rows, columns = source.shape[:2]
  # cv2 counts from the middle of the first texel; far outside is far enough.
  map_x = np.where(met, np.clip(u, -9, 9) * columns - 0.5, -9)
  map_y = np.where(met, np.clip(v, -9, 9) * rows - 0.5, -9)
  return cv2.remap(
    source, map_x.astype(np.float32), map_y.astype(np.float32),
    cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0,
  )  # fmt: skip


def cover(
  pixels_N2: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, tuple[slice, slice]] | None:
  """Coverage of pixels by a polygon, float32 in a window, and the window."""
  found = window(pixels_N2, size)
  if found is None:
    return None
  x0, y0, x1, y1 = found
  mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
  # cv2's pixel (0, 0) has its middle at 0.
  corners = (pixels_N2 - (x0 + 0.5, y0 + 0.5)) * _PARTS
  corners = np.rint(np.clip(corners, -(2**24), 2**24)).astype(np.int32)
  cv2.fillPoly(mask, [corners], 255, cv2.LINE_AA, _PARTS.bit_length() - 1)
  return mask.astype(np.float32) / 255, (slice(y0, y1), slice(x0, x1))


def fill(
  canvas: np.ndarray, pixels_N2: np.ndarray, colour, alpha: float = 1.0
) -> None:
  """Draws a polygon with smooth edges in one colour."""
  found = cover(pixels_N2, canvas.shape[1::-1])
  if found is None:
    return
  mask, where = found
  under = canvas[where]
  under += alpha * mask[..., None] * (np.asarray(colour, np.float32) - under)


def shade(
  canvas: np.ndarray, polygons: Sequence[np.ndarray], depth: float, soft: float
) -> None:  # fmt: skip
  """Darkens what any polygon covers by `depth`; edges are `soft` px wide."""
  height, width = canvas.shape[:2]
  mask = np.zeros((height, width), np.float32)
  for pixels_N2 in polygons:
    found = cover(pixels_N2, (width, height))
    if found is not None:
      mask[found[1]] = np.maximum(mask[found[1]], found[0])
  mask = cv2.GaussianBlur(mask, (0, 0), max(soft, 0.5))
  canvas *= 1 - depth * mask[..., None]


def lay(
  size: tuple[int, int], texture_HW3: np.ndarray, camera: cameras.Camera,
  plane: cameras.Plane,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
  """A plane that goes on for ever, laid with copies of a texture.

  Args:
    size: (width, height) of the canvas.
    texture_HW3: one copy.
    camera: the camera.
    plane: that one copy covers.

  Returns:
    float32 `[H, W, 3]`, and bool `[H, W]`: where the plane is in sight.
  """
  x, y = np.meshgrid(*(np.arange(n, dtype=np.float32) + 0.5 for n in size))
  u, v, met = cameras.to_surface(camera, plane, x, y)
  rows, columns = texture_HW3.shape[:2]
  # Beyond some copies nothing can be made out, and float32 has no digits left.
  map_x = np.mod(np.clip(u, -1e4, 1e4), 1) * columns - 0.5
  map_y = np.mod(np.clip(v, -1e4, 1e4), 1) * rows - 0.5
  seen = cv2.remap(
    texture_HW3, map_x.astype(np.float32), map_y.astype(np.float32),
    cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP,
  )  # fmt: skip
  return seen, met
