# SPDX-License-Identifier: Apache-2.0
"""Materials: textures of what objects, walls and grounds are made of.

All are float32 `[H, W, 3]` in [0, 1], sRGB, drawn from a random stream. Those
of walls and grounds repeat without a seam when laid side by side, up to the
grain of noise. Colours and sizes are ours.
"""

import cv2
import numpy as np

Colour = tuple[float, float, float]

WALLS = ("brick", "plaster", "concrete", "tiles")
DESKS = ("planks", "marble", "cloth", "plaster")


def noise(
  rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int],
  octaves: int = 4,
) -> np.ndarray:  # fmt: skip
  """Soft noise of several scales that repeats at the edges.

  Args:
    rng: decides it.
    shape: (rows, columns).
    cells: bumps along rows and columns of the coarsest scale.
    octaves: number of scales, each of half the size and weight.

  Returns:
    float32 `shape`, of mean about 0, within [-1, 1].
  """
  out = np.zeros(shape, np.float32)
  weight = 1.0
  for octave in range(octaves):
    grid = [min(c * 2**octave, n) for c, n in zip(cells, shape)]
    coarse = rng.uniform(-1, 1, grid).astype(np.float32)
    around = cv2.copyMakeBorder(coarse, 1, 1, 1, 1, cv2.BORDER_WRAP)
    # Where the fine pixels lie on the coarse grid; cv2.resize would not wrap.
    y, x = (
      (np.arange(n, dtype=np.float32) + 0.5) * c / n + 0.5
      for n, c in zip(shape, grid)
    )
    x, y = np.meshgrid(x, y)
    out += weight * cv2.remap(around, x, y, cv2.INTER_LINEAR)
    weight /= 2
  return out / np.float32(2 - 2 * weight)


def tinted(colour: Colour, tone: np.ndarray) -> np.ndarray:
  """A colour whose brightness follows `tone` (0: as it is)."""
  base = np.asarray(colour, np.float32)
  return np.clip(base * (1 + tone[..., None]), 0, 1).astype(np.float32)


def material(name: str, rng: np.random.Generator, side: int = 256):
  """A square of a material, to be laid side by side.

  Args:
    name: of `WALLS` or `DESKS`, 'grass' or 'asphalt'.
    rng: decides its colours and grain.
    side: pixels.

  Returns:
    float32 `[side, side, 3]`.
  """
  make = {
    "brick": _brick, "plaster": _plaster, "concrete": _concrete,
    "tiles": _tiles, "planks": _planks, "grass": _grass, "asphalt": _asphalt,
    "marble": _marble, "cloth": cloth,
  }[name]  # fmt: skip
  return make(rng, (side, side))


def _one_of(rng, colours) -> Colour:
  chosen = np.asarray(colours[int(rng.integers(len(colours)))], float) / 255
  return tuple(np.clip(chosen * rng.uniform(0.92, 1.08, 3), 0, 1))


def _brick(rng, shape) -> np.ndarray:
  rows, columns = 8, 4
  y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
  row = np.floor(y * rows / shape[0])
  shifted = x * columns / shape[1] + 0.5 * (row % 2)
  column = np.floor(shifted) % columns
  tone = rng.uniform(-0.16, 0.16, (rows, columns)).astype(np.float32)
  tone = tone[row.astype(int), column.astype(int)]
  tone += 0.18 * noise(rng, shape, (24, 24))
  base = _one_of(rng, ((156, 84, 62), (176, 110, 84), (134, 78, 66)))
  wall = tinted(base, tone)
  # How far from the brick's edges, in pixels.
  inside_y = np.abs((y * rows / shape[0]) % 1 - 0.5) * shape[0] / rows
  inside_x = np.abs(shifted % 1 - 0.5) * shape[1] / columns
  gap = np.maximum(
    inside_y - (0.5 * shape[0] / rows - 1.6),
    inside_x - (0.5 * shape[1] / columns - 1.6),
  )
  gap = np.clip(gap, 0, 1)[..., None]
  mortar = tinted((0.72, 0.69, 0.65), 0.1 * noise(rng, shape, (32, 32)))
  return wall + gap * (mortar - wall)


def _plaster(rng, shape) -> np.ndarray:
  base = _one_of(
    rng,
    (
      (226, 218, 204), (204, 214, 216), (222, 200, 178), (190, 204, 190),
      (214, 190, 190), (176, 190, 206),
    ),
  )  # fmt: skip
  tone = 0.05 * noise(rng, shape, (3, 3)) + 0.04 * noise(rng, shape, (64, 64))
  return tinted(base, tone)


def _concrete(rng, shape) -> np.ndarray:
  base = _one_of(rng, ((168, 168, 164), (142, 142, 140), (186, 182, 176)))
  tone = 0.1 * noise(rng, shape, (3, 3), 6)
  pores = (noise(rng, shape, (96, 96), 1) > 0.86).astype(np.float32)
  return tinted(base, tone - 0.15 * cv2.blur(pores, (2, 2)))


def _tiles(rng, shape) -> np.ndarray:
  count = int(rng.integers(3, 6))
  y, x = (
    np.arange(n, dtype=np.float32)[s] * count / n
    for n, s in zip(shape, (np.s_[:, None], np.s_[None]))
  )
  edge = np.minimum(
    np.minimum(y % 1, 1 - y % 1), np.minimum(x % 1, 1 - x % 1)
  ) * (shape[0] / count)
  tone = rng.uniform(-0.05, 0.05, (count, count)).astype(np.float32)
  tone = tone[y.astype(int), x.astype(int)] + 0.03 * noise(rng, shape, (8, 8))
  base = _one_of(
    rng, ((206, 212, 210), (150, 172, 178), (196, 176, 150), (120, 138, 130))
  )
  wall = tinted(base, tone)
  return wall * np.where(edge < 1.5, 0.7, 1)[..., None].astype(np.float32)


def _planks(rng, shape) -> np.ndarray:
  count = int(rng.integers(3, 6))
  y = np.arange(shape[0], dtype=np.float32)[:, None] * count / shape[0]
  plank = np.floor(y).astype(int)
  x = np.arange(shape[1])[None]
  # Long thin fibres, cut at every plank and shifted along it.
  fibre = noise(rng, shape, (40, 3), 4)
  shift = rng.integers(0, shape[1], count)[plank]
  rows = np.broadcast_to(np.arange(shape[0])[:, None], shape)
  fibre = fibre[rows, (x + shift) % shape[1]]
  tone = 0.28 * fibre + rng.uniform(-0.1, 0.1, count).astype(np.float32)[plank]
  seam = np.minimum(y % 1, 1 - y % 1) * shape[0] / count
  base = _one_of(
    rng, ((166, 122, 82), (128, 88, 58), (198, 162, 118), (92, 66, 50))
  )
  wood = tinted(base, tone.astype(np.float32))
  return wood * np.where(seam < 0.9, 0.6, 1)[..., None].astype(np.float32)


def _grass(rng, shape) -> np.ndarray:
  base = _one_of(rng, ((98, 134, 62), (120, 142, 74), (82, 118, 66)))
  tone = 0.25 * noise(rng, shape, (5, 5)) + 0.35 * noise(rng, shape, (90, 90))
  return tinted(base, tone)


def _asphalt(rng, shape) -> np.ndarray:
  base = _one_of(rng, ((98, 98, 102), (120, 118, 116)))
  grain = rng.normal(0, 0.07, shape).astype(np.float32)
  return tinted(base, grain + 0.1 * noise(rng, shape, (4, 4)))


def _marble(rng, shape) -> np.ndarray:
  veins = 1 - np.abs(noise(rng, shape, (3, 3), 5)) * 5
  tone = 0.04 * noise(rng, shape, (4, 4)) - 0.16 * np.clip(veins, 0, 1)
  return tinted(_one_of(rng, ((232, 230, 226), (70, 76, 80))), tone)


def cloth(
  rng: np.random.Generator, shape: tuple[int, int],
  colour: Colour | None = None,
) -> np.ndarray:  # fmt: skip
  """A weave, in a colour of its own unless one is given."""
  base = colour or _one_of(
    rng, ((196, 188, 174), (110, 126, 150), (150, 104, 96), (120, 136, 116))
  )
  y, x = np.mgrid[: shape[0], : shape[1]]
  weave = np.where((x // 2 + y // 2) % 2 > 0, 0.03, -0.03).astype(np.float32)
  return tinted(base, weave + 0.05 * noise(rng, shape, (6, 6)))


def paper(
  rng: np.random.Generator, shape: tuple[int, int], colour: Colour,
  grain: float = 0.02,
) -> np.ndarray:  # fmt: skip
  """A nearly even sheet; `grain` is the largest change of brightness."""
  fine = rng.uniform(-grain, grain, shape).astype(np.float32)
  return tinted(colour, 0.5 * fine + 0.5 * grain * noise(rng, shape, (4, 4)))


def sky(
  rng: np.random.Generator, shape: tuple[int, int], horizon: float
) -> np.ndarray:
  """A sky with soft clouds, palest at the horizon (a row, in pixels)."""
  high = _one_of(rng, ((96, 150, 206), (120, 166, 210), (150, 160, 176)))
  low = _one_of(rng, ((206, 222, 234), (236, 220, 202), (214, 218, 222)))
  y = np.arange(shape[0], dtype=np.float32)[:, None, None]
  t = np.clip(y / max(horizon, 1), 0, 1)
  out = np.asarray(high, np.float32) * (1 - t) + np.asarray(low) * t
  clouds = np.clip(2.2 * noise(rng, shape, (3, 2), 5) - 0.2, 0, 1)[..., None]
  out = np.broadcast_to(out, (*shape, 3))
  return (out + 0.75 * clouds * (1 - t) * (0.97 - out)).astype(np.float32)
