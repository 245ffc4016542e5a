# SPDX-License-Identifier: Apache-2.0
"""Other colours, materials and brightness of an object, by its own shading.

Shapes: H height, W width, C 3 colours.
"""

from collections.abc import Callable

import cv2
import numpy as np

from data_pipelines.edit_pairs import colours
from data_pipelines.edit_pairs.pair import Name

COLOURS: dict[Name, tuple[int, int, int]] = {
  Name("red", "红色"): (200, 36, 36),
  Name("orange", "橙色"): (236, 130, 30),
  Name("yellow", "黄色"): (240, 208, 50),
  Name("green", "绿色"): (50, 150, 64),
  Name("blue", "蓝色"): (40, 90, 200),
  Name("purple", "紫色"): (122, 62, 172),
  Name("pink", "粉色"): (238, 130, 172),
  Name("brown", "棕色"): (120, 76, 44),
  Name("black", "黑色"): (36, 36, 40),
  Name("white", "白色"): (236, 236, 234),
}
# Of 441: a nearer colour has the same name for many people; ours.
_NEAREST = 100.0


def colour_for(
  rgb_HWC: np.ndarray, inside_HW: np.ndarray, rng: np.random.Generator
) -> Name:
  """A colour that the object does not have already."""
  mean = rgb_HWC[inside_HW].mean(axis=0)
  far = [
    name
    for name, value in COLOURS.items()
    if np.linalg.norm(np.subtract(value, mean)) > _NEAREST
  ]
  return far[int(rng.integers(len(far)))]


def recolour(
  rgb_HWC: np.ndarray, inside_HW: np.ndarray, colour: tuple[int, int, int]
) -> np.ndarray:
  """The object in one colour; light and shade stay.

  Args:
    rgb_HWC: uint8.
    inside_HW: bool, whose mean brightness becomes the colour itself.
    colour: RGB.

  Returns:
    uint8 [H, W, 3], meant for the pixels inside.
  """
  light_HW1 = _shading(rgb_HWC, inside_HW)[..., None]
  colour = np.asarray(colour, np.float32)
  # Shade scales the colour; light moves it towards white.
  dark = colour * np.minimum(light_HW1, 1)
  share = np.clip((light_HW1 - 1) * 0.6, 0, 1)
  return colours.to_bytes(dark + (255 - dark) * share)


def brighten(rgb_HWC: np.ndarray, gain: float) -> np.ndarray:
  """Values times `gain`; the brightest stay below white, so detail stays."""
  values = rgb_HWC.astype(np.float32) / 255
  if gain <= 1:
    return colours.to_bytes(values * gain * 255)
  return colours.to_bytes((1 - (1 - values) ** gain) * 255)


def gold(rgb_HWC, inside_HW, rng) -> np.ndarray:
  """Bands of reflected light in yellow."""
  return _metal(rgb_HWC, inside_HW, rng, ((74, 44, 8), (255, 224, 120)))


def silver(rgb_HWC, inside_HW, rng) -> np.ndarray:
  """Bands of reflected light in grey."""
  return _metal(rgb_HWC, inside_HW, rng, ((46, 50, 58), (244, 248, 252)))


def wood(rgb_HWC, inside_HW, rng) -> np.ndarray:
  """Wavy lines of grain."""
  field = _field(inside_HW.shape, rng, 3)
  x = np.arange(inside_HW.shape[1], dtype=np.float32)[None]
  grain = np.sin(x / inside_HW.shape[1] * 40 + field * 7)
  base = np.array((164, 112, 66), np.float32)
  return _lit(base + grain[..., None] * 26, rgb_HWC, inside_HW)


def stone(rgb_HWC, inside_HW, rng) -> np.ndarray:
  """Grey and rough."""
  rough = _field(inside_HW.shape, rng, 40) + _field(inside_HW.shape, rng, 8)
  base = np.array((138, 134, 128), np.float32)
  return _lit(base + rough[..., None] * 30, rgb_HWC, inside_HW)


def marble(rgb_HWC, inside_HW, rng) -> np.ndarray:
  """White with dark veins."""
  veins = 1 - np.abs(_field(inside_HW.shape, rng, 4)) * 7
  veins = np.clip(veins, 0, 1)[..., None]
  base = np.array((232, 230, 226), np.float32)
  return _lit(base - veins * 95, rgb_HWC, inside_HW)


MATERIALS: dict[Name, Callable] = {
  Name("gold", "黄金"): gold,
  Name("silver", "白银"): silver,
  Name("wood", "木头"): wood,
  Name("stone", "石头"): stone,
  Name("marble", "大理石"): marble,
}


def _shading(rgb_HWC: np.ndarray, inside_HW: np.ndarray) -> np.ndarray:
  """[H, W]: brightness over its mean inside."""
  luma = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32) + 8
  return luma / luma[inside_HW].mean()


def _lit(base_HWC, rgb_HWC, inside_HW) -> np.ndarray:
  light = np.clip(_shading(rgb_HWC, inside_HW), 0.25, 1.5)
  return colours.to_bytes(base_HWC * light[..., None])


def _metal(rgb_HWC, inside_HW, rng, ends) -> np.ndarray:
  height, width = inside_HW.shape
  light = np.clip(_shading(rgb_HWC, inside_HW), 0.2, 1.8)
  slope = np.arange(height)[:, None] / height + np.arange(width) / width * 0.5
  bands = np.sin(slope * 9 + float(rng.uniform(0, 6)) + light * 4) * 0.5 + 0.5
  share = np.clip(0.75 * bands + 0.3 * light - 0.15, 0, 1)[..., None]
  low, high = (np.asarray(end, np.float32) for end in ends)
  return colours.to_bytes(low + (high - low) * share)


def _field(shape: tuple[int, int], rng, cells: int) -> np.ndarray:
  """[H, W] float32, smooth, -1 to 1."""
  grid = rng.uniform(-1, 1, (cells + 2, cells + 2)).astype(np.float32)
  return cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC)
