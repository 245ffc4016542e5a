# SPDX-License-Identifier: Apache-2.0
"""Backgrounds drawn by code, so that everything runs without any input.

They are procedural, no photographs, and named so in every record
('embedded:...').

Shapes: H height, W width; arrays of colour are float32 [H, W, 3], 0 to 255.
"""

from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from data_pipelines.edit_pairs.pair import Name, Picture

_Size = tuple[int, int]


def draw(size: _Size, rng: np.random.Generator, other: str = "") -> Picture:
  """One of the backgrounds.

  Args:
    size: (width, height).
    rng: chooses and varies it.
    other: English name of the one that it must not be.
  """
  names = [name for name in PLACES if name.en != other]
  name = names[int(rng.integers(len(names)))]
  pixels = PLACES[name](size, rng)
  pixels = pixels + rng.standard_normal(pixels.shape, np.float32) * 2
  image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
  return Picture(image, f"embedded:{name.en}", name=name)


def _noise(size: _Size, rng: np.random.Generator, cells: float) -> np.ndarray:
  """[H, W], -1 to 1: four octaves of smooth noise.

  Args:
    size: (width, height).
    rng: draws it.
    cells: of the coarsest octave along the shorter side.
  """
  width, height = size
  total = np.zeros((height, width), np.float32)
  for octave in range(4):
    side = min(size) / (cells * 2**octave)
    shape = [int(length / side) + 2 for length in (height, width)]
    grid = rng.uniform(-1, 1, shape).astype(np.float32)
    total += cv2.resize(grid, size, interpolation=cv2.INTER_CUBIC) / 2**octave
  return np.clip(total / 1.6, -1, 1)


def _grid(size: _Size) -> tuple[np.ndarray, np.ndarray]:
  """x, y of every pixel, [1, W] and [H, 1], 0 to 1."""
  width, height = size
  x = (np.arange(width, dtype=np.float32) + 0.5) / width
  y = (np.arange(height, dtype=np.float32) + 0.5) / height
  return x[None], y[:, None]


def _blend(first, second, share_HW: np.ndarray) -> np.ndarray:
  """Colours or images, by the share of the second."""
  a, b = (np.asarray(value, np.float32) for value in (first, second))
  share = share_HW[..., None].astype(np.float32)
  return a * (1 - share) + b * share


def _sky(size: _Size, rng, top, low) -> np.ndarray:
  _, y = _grid(size)
  sky = _blend(top, low, np.broadcast_to(np.clip(y / 0.6, 0, 1), size[::-1]))
  clouds = np.clip(_noise(size, rng, 2.5) * 2 - 0.3, 0, 1) * 0.7
  return _blend(sky, (250, 250, 252), clouds)


def _ridge(size: _Size, rng, level: float, rough: float) -> np.ndarray:
  """bool [H, W]: below a hilly line about `level` from the top."""
  x, y = _grid(size)
  phase = rng.uniform(0, 2 * np.pi, 4)
  line = sum(
    np.sin(x * 2 * np.pi * (k + 0.7) + phase[k]) / (k + 1) for k in range(4)
  )
  return y > level + rough * line


def _meadow(size: _Size, rng) -> np.ndarray:
  picture = _sky(size, rng, (70, 130, 205), (190, 220, 240))
  hills = _ridge(size, rng, 0.5, 0.04)
  picture[hills] = (96, 138, 92)
  ground = _ridge(size, rng, 0.62, 0.02)
  blades = _noise(size, rng, 24)
  grass = _blend((92, 152, 58), (48, 98, 36), (blades + 1) / 2)
  picture[ground] = grass[ground]
  return picture


def _beach(size: _Size, rng) -> np.ndarray:
  picture = _sky(size, rng, (90, 160, 220), (220, 235, 245))
  _, y = _grid(size)
  waves = _noise((size[0], size[1] * 3), rng, 9)[::3][: size[1]]
  sea = _blend((24, 104, 150), (90, 178, 200), (waves + 1) / 2)
  wet = np.broadcast_to(y > 0.48, size[::-1])
  picture[wet] = sea[wet]
  dry = _ridge(size, rng, 0.68, 0.015)
  sand = _blend(
    (226, 204, 158), (200, 172, 122), (_noise(size, rng, 40) + 1) / 2
  )
  picture[dry] = sand[dry]
  return picture


def _desert(size: _Size, rng) -> np.ndarray:
  picture = _sky(size, rng, (60, 110, 180), (240, 205, 160))
  for k, level in enumerate((0.5, 0.62, 0.76)):
    dune = _ridge(size, rng, level, 0.035)
    ripples = (_noise(size, rng, 12) + 1) / 2
    shade = _blend((232 - 12 * k, 166 - 10 * k, 96), (190, 118, 62), ripples)
    picture[dune] = shade[dune]
  return picture


def _snow(size: _Size, rng) -> np.ndarray:
  picture = _sky(size, rng, (130, 165, 205), (225, 232, 240))
  far = _ridge(size, rng, 0.42, 0.07)
  picture[far] = (150, 168, 192)
  near = _ridge(size, rng, 0.62, 0.02)
  drift = _blend(
    (250, 252, 255), (206, 218, 236), (_noise(size, rng, 5) + 1) / 2
  )
  picture[near] = drift[near]
  return picture


def _starry(size: _Size, rng) -> np.ndarray:
  _, y = _grid(size)
  sky = _blend((8, 12, 40), (52, 44, 96), np.broadcast_to(y, size[::-1]))
  stars = rng.random(size[::-1]) > 0.9985
  sky[stars] = (245, 245, 220)
  hills = _ridge(size, rng, 0.72, 0.04)
  sky[hills] = (14, 20, 24)
  moon = rng.uniform((0.15, 0.12), (0.85, 0.3)) * size
  radius = int(0.06 * min(size))
  centre = tuple(int(c) for c in moon)
  cv2.circle(sky, centre, radius, (244, 240, 214), -1, cv2.LINE_AA)
  return sky


def _bricks(size: _Size, rng) -> np.ndarray:
  width, height = size
  high = max(6, min(size) // 14)
  wide = int(high * 2.4)
  rows, columns = np.arange(height) // high, np.arange(width)
  shifted = columns[None] + (rows[:, None] % 2) * (wide // 2)
  tone = rng.uniform(-22, 22, (height // high + 1, width // wide + 2))
  shade = tone[rows[:, None], shifted // wide].astype(np.float32)
  base = np.array(rng.choice([(158, 74, 56), (186, 150, 118)]), np.float32)
  wall = base + shade[..., None] + _noise(size, rng, 20)[..., None] * 14
  joint = max(1, high // 9)
  lines = (np.arange(height)[:, None] % high < joint) | (shifted % wide < joint)
  wall[lines] = (202, 196, 186)
  return wall


def _planks(size: _Size, rng) -> np.ndarray:
  width, height = size
  high = max(12, min(size) // 6)
  rows = np.arange(height) // high
  tone = rng.uniform(-18, 18, rows.max() + 1)[rows][:, None, None]
  grain = _noise((max(1, width // 8), height), rng, 10)
  grain = cv2.resize(grain, size, interpolation=cv2.INTER_CUBIC)
  rings = np.sin(grain * 14)[..., None]
  wood = np.array((156, 108, 66), np.float32) + tone + rings * 12
  wood[np.arange(height) % high < max(1, high // 24)] = (66, 42, 24)
  return wood.astype(np.float32)


def _room(size: _Size, rng) -> np.ndarray:
  wall = np.array(
    rng.choice([(206, 216, 204), (222, 206, 190), (188, 204, 222)]), np.float32
  )
  x, y = _grid(size)
  light = 1 - 0.25 * np.abs(x - rng.uniform(0.2, 0.8)) - 0.1 * y
  picture = wall * light[..., None]
  floor = np.broadcast_to(y > 0.7, size[::-1])
  picture[floor] = (_planks(size, rng) * light[..., None])[floor]
  skirting = np.broadcast_to((y > 0.675) & (y <= 0.7), size[::-1])
  picture[skirting] = (240, 238, 232)
  return picture.astype(np.float32)


def _tiles(size: _Size, rng) -> np.ndarray:
  width, height = size
  side = max(8, min(size) // 9)
  rows, columns = np.arange(height) // side, np.arange(width) // side
  dark = (rows[:, None] + columns[None]) % 2 == 1
  first, second = rng.permutation(
    [(70, 98, 122), (222, 218, 206), (138, 64, 60), (62, 92, 70)]
  )[:2]
  floor = _blend(first, second, dark) + _noise(size, rng, 6)[..., None] * 10
  joint = (np.arange(height)[:, None] % side < 2) | (
    np.arange(width)[None] % side < 2
  )
  floor[joint] = (120, 118, 114)
  return floor


PLACES: dict[Name, Callable[[_Size, np.random.Generator], np.ndarray]] = {
  Name("meadow", "草地"): _meadow,
  Name("beach", "海滩"): _beach,
  Name("desert", "沙漠"): _desert,
  Name("snowy field", "雪地"): _snow,
  Name("starry night", "星空"): _starry,
  Name("brick wall", "砖墙"): _bricks,
  Name("wooden wall", "木板墙"): _planks,
  Name("room", "房间"): _room,
  Name("tiled wall", "瓷砖墙"): _tiles,
}
