# SPDX-License-Identifier: Apache-2.0
"""Deterministic styles: filters of OpenCV and a few lines of arithmetic.

Each takes RGB pixels and a generator, and returns pixels and plain
parameters. They imitate; no model is involved. The ranges are ours.

Shapes: H height, W width, C 3 colours.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from data_pipelines.edit_pairs import colours

Styled = tuple[np.ndarray, dict[str, Any]]


def sketch(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """Pencil on paper: grey divided by the blurred grey."""
  sigma = round(float(rng.uniform(0.008, 0.025)) * min(rgb_HWC.shape[:2]), 1)
  luma = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32)
  blurred = cv2.GaussianBlur(luma, (0, 0), sigma)
  pencil = colours.to_bytes(255 * ((luma + 1) / (blurred + 1)) ** 1.8)
  return colours.grey(pencil), {"sigma": sigma}


def watercolour(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """Flat washes with darker rims on grained paper."""
  passes = int(rng.integers(3, 6))
  wash = rgb_HWC
  for _ in range(passes):
    wash = cv2.bilateralFilter(wash, 7, 50, 7)
  luma = cv2.cvtColor(wash, cv2.COLOR_RGB2GRAY).astype(np.float32)
  rim = cv2.morphologyEx(luma, cv2.MORPH_GRADIENT, np.ones((3, 3)))
  grain = rng.standard_normal(luma.shape, np.float32)
  grain = cv2.GaussianBlur(grain, (0, 0), 1.2) * 10
  light = 255 - (255 - wash.astype(np.float32)) * 0.82
  return colours.to_bytes(light - 0.5 * rim[..., None] + grain[..., None]), {
    "passes": passes
  }


def oil(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """Strokes: the mean colour of the commonest brightness around a pixel."""
  radius, levels = int(rng.integers(3, 6)), 8
  side = (2 * radius + 1,) * 2
  level = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY).astype(int) * levels // 256
  best = np.zeros(level.shape, np.float32)
  paint = np.zeros(rgb_HWC.shape, np.float32)
  rgb = rgb_HWC.astype(np.float32)
  for k in range(levels):
    here = (level == k).astype(np.float32)
    count = cv2.boxFilter(here, -1, side)
    total = cv2.boxFilter(rgb * here[..., None], -1, side)
    more = count > best
    paint[more] = total[more] / count[more][:, None]
    best[more] = count[more]
  return colours.to_bytes(paint), {"radius": radius, "levels": levels}


def cartoon(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """Flat colours inside dark outlines."""
  levels = int(rng.integers(5, 9))
  flat = cv2.bilateralFilter(rgb_HWC, 9, 80, 9)
  flat = _quantise(flat, levels)
  luma = cv2.medianBlur(cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY), 5)
  lines = cv2.adaptiveThreshold(
    luma, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, 9, 4
  )
  return np.where(lines[..., None] > 0, flat, 25).astype(np.uint8), {
    "levels": levels
  }


def sepia(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """Brown as of an old print."""
  del rng
  luma = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY)[..., None] / 255
  return colours.to_bytes(255 * luma ** np.array([0.72, 0.95, 1.35])), {}


def black_and_white(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """Grey with a little more contrast."""
  contrast = round(float(rng.uniform(1.0, 1.4)), 2)
  luma = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32)
  luma = colours.to_bytes(127.5 + contrast * (luma - 127.5))
  return colours.grey(luma), {"contrast": contrast}


def posterise(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """Few levels per colour."""
  levels = int(rng.integers(3, 6))
  return _quantise(rgb_HWC, levels), {"levels": levels}


def pixel_art(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """Large square pixels of few levels."""
  height, width = rgb_HWC.shape[:2]
  block = max(3, round(min(height, width) * float(rng.uniform(0.016, 0.04))))
  small = cv2.resize(
    rgb_HWC, (-(-width // block), -(-height // block)),
    interpolation=cv2.INTER_AREA,
  )  # fmt: skip
  small = _quantise(small, 7)
  large = small.repeat(block, axis=0).repeat(block, axis=1)
  return large[:height, :width], {"block": block}


def warm(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """The light of a low sun."""
  strength = round(float(rng.uniform(0.12, 0.25)), 2)
  return _gains(rgb_HWC, (1 + strength, 1.02, 1 - strength)), {
    "strength": strength
  }


def cool(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """Bluish light."""
  strength = round(float(rng.uniform(0.12, 0.25)), 2)
  return _gains(rgb_HWC, (1 - strength, 1.0, 1 + strength)), {
    "strength": strength
  }


def night(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Styled:
  """Day for night: dark, blue and with little colour, as film does it."""
  gain = round(float(rng.uniform(0.3, 0.5)), 2)
  luma = rgb_HWC.mean(axis=-1, keepdims=True)
  pale = luma + 0.5 * (rgb_HWC - luma)
  dark = 255 * gain * (pale / 255) ** 1.3
  return _gains(dark, (0.62, 0.8, 1.35)), {"gain": gain}


STYLES: dict[str, Callable[[np.ndarray, np.random.Generator], Styled]] = {
  "sketch": sketch,
  "watercolour": watercolour,
  "oil": oil,
  "cartoon": cartoon,
  "sepia": sepia,
  "black_and_white": black_and_white,
  "posterise": posterise,
  "pixel_art": pixel_art,
  "warm": warm,
  "cool": cool,
  "night": night,
}


def _quantise(rgb_HWC: np.ndarray, levels: int) -> np.ndarray:
  steps = np.rint(np.arange(256) / 255 * (levels - 1)) * 255 / (levels - 1)
  return np.rint(steps).astype(np.uint8)[rgb_HWC]


def _gains(rgb_HWC: np.ndarray, gains: tuple[float, ...]) -> np.ndarray:
  return colours.to_bytes(rgb_HWC * np.array(gains))
