# SPDX-License-Identifier: Apache-2.0
"""Scene -> pixels, and the shape masks that the checker shares."""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.errors import InputError
from data_pipelines.shapes import fonts
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.scene import Item, Scene

MIN_SIDE = 32
_SUPERSAMPLE = 4

# Text is set on a fixed pitch: the k-th letter of a word is always at the same
# place, which is what a tiny model can learn. Both in cap heights.
_PITCH = 1.2
_MIN_GAP = 0.17


def render(
  scene: Scene, width: int, height: int, font_path: str | None = None
) -> np.ndarray:
  """Draws a scene with anti-aliased edges.

  Args:
    scene: what to draw.
    width: canvas width in pixels, at least 32.
    height: canvas height in pixels, at least 32.
    font_path: font of text items; by default DejaVu Sans Bold.

  Returns:
    uint8 [height, width, 3], sRGB.

  Raises:
    InputError: for a canvas that is too small or text the font cannot draw.
  """
  if min(width, height) < MIN_SIDE:
    raise InputError(
      f"Canvas {width}x{height} is too small; both sides must be at least "
      f"{MIN_SIDE} pixels."
    )
  canvas_HWC = np.full((height, width, 3), scene.background, np.float32)
  for item in scene.items:
    mask_HW = item_mask(item, width, height, font_path)
    colour_C = np.asarray(vocab.COLOURS[item.colour], np.float32)
    canvas_HWC += mask_HW[..., None] * (colour_C - canvas_HWC)
  return np.rint(canvas_HWC).astype(np.uint8)


def item_mask(
  item: Item, width: int, height: int, font_path: str | None = None
) -> np.ndarray:
  """Coverage of every pixel by one item: float32 [height, width] in [0, 1]."""
  x, y = item.x * width, item.y * height
  size = item.size * min(width, height)
  if item.shape:
    return shape_mask(item.shape, width, height, x, y, size)
  path = font_path or fonts.default_font()
  return text_mask(item.text, width, height, x, y, size, path)


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Whether points lie in a shape whose box is [-1, 1] x [-1, 1], v down.

  The squares are a little smaller than their box, so that all four shapes
  look equally large.
  """
  if shape == "circle":
    return u * u + v * v <= 1
  if shape == "square":
    return (abs(u) <= 0.88) & (abs(v) <= 0.88)
  if shape == "triangle":
    return (v <= 0.85) & (abs(u) * 1.85 <= v + 1)
  if shape == "cross":
    across = (abs(u) <= 1) & (abs(v) <= 0.34)
    return across | ((abs(u) <= 0.34) & (abs(v) <= 1))
  raise InputError(
    f"Shape {shape!r} is unknown; use one of {', '.join(vocab.SHAPES)}."
  )


def shape_mask(
  shape: str, width: int, height: int, x: float, y: float, size: float
) -> np.ndarray:
  """Coverage of every pixel by a shape.

  Args:
    shape: one of `vocabulary.SHAPES`.
    width: canvas width in pixels.
    height: canvas height in pixels.
    x: centre of the shape's box in pixels; 0 is the canvas's left edge.
    y: centre of the shape's box in pixels; 0 is the canvas's top edge.
    size: side of the shape's box in pixels.

  Returns:
    float32 [height, width] in [0, 1].
  """
  mask_HW = np.zeros((height, width), np.float32)
  radius = size / 2
  x0, x1 = _span(x, radius, width)
  y0, y1 = _span(y, radius, height)
  if x0 >= x1 or y0 >= y1:
    return mask_HW
  s = _SUPERSAMPLE
  u = ((np.arange((x1 - x0) * s) + 0.5) / s + x0 - x) / radius
  v = ((np.arange((y1 - y0) * s) + 0.5) / s + y0 - y) / radius
  hits = inside(shape, u[None, :], v[:, None]).view(np.uint8)
  # Adding strided views is several times faster than a mean over two axes.
  rows = sum(hits[k::s] for k in range(s))
  counts = sum(rows[:, k::s] for k in range(s))
  mask_HW[y0:y1, x0:x1] = counts / np.float32(s * s)
  return mask_HW


def _span(centre: float, radius: float, limit: int) -> tuple[int, int]:
  low, high = math.floor(centre - radius), math.ceil(centre + radius)
  return max(low, 0), min(high, limit)


@functools.lru_cache(maxsize=len(vocab.SHAPES))
def shape_moments(shape: str) -> tuple[float, float]:
  """Area and v of the centroid of a shape in its [-1, 1] box."""
  grid = (np.arange(400) + 0.5) / 200 - 1
  hits = inside(shape, grid[None, :], grid[:, None])
  return 4 * float(hits.mean()), float(np.nonzero(hits)[0].mean() / 200 - 1)


def text_mask(
  text: str,
  width: int,
  height: int,
  x: float,
  y: float,
  size: float,
  font_path: str,
) -> np.ndarray:
  """Coverage of every pixel by one line of text on a fixed pitch.

  Args:
    text: the characters.
    width: canvas width in pixels.
    height: canvas height in pixels.
    x: centre of the line in pixels.
    y: middle of the capitals in pixels.
    size: cap height in pixels.
    font_path: a font that has every character.

  Returns:
    float32 [height, width] in [0, 1].

  Raises:
    InputError: naming the characters that the font cannot draw.
  """
  text = fonts.require_drawable(text, font_path)
  s = _SUPERSAMPLE
  em = max(1, round(s * size / fonts.cap_height(font_path)))
  font = fonts.font_at(font_path, em)
  pitch = s * size * _pitch(text, font_path)
  left = s * x - pitch * (len(text) - 1) / 2
  image = Image.new("L", (width * s, height * s))
  draw = ImageDraw.Draw(image)
  for k, char in enumerate(text):
    where = (left + k * pitch, s * (y + size / 2))
    draw.text(where, char, fill=255, font=font, anchor="ms")
  return np.asarray(image.reduce(s), np.float32) / np.float32(255)


@functools.lru_cache(maxsize=1024)
def _pitch(text: str, font_path: str) -> float:
  """Distance between letter centres in cap heights; letters never touch."""
  font = fonts.font_at(font_path, 1000)
  cap = 1000 * fonts.cap_height(font_path)
  boxes = [font.getbbox(char, anchor="ms") for char in text]
  widest = max((box[2] - box[0]) / cap for box in boxes)
  return max(_PITCH, widest + _MIN_GAP)
