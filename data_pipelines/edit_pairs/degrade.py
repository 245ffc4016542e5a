# SPDX-License-Identifier: Apache-2.0
"""Ways in which a picture is damaged.

Each takes RGB pixels and a generator, and returns the damaged pixels, plain
parameters and where it did something (None: everywhere). The ranges are ours.

Shapes: H height, W width, C 3 colours.
"""

import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data_pipelines.edit_pairs import colours

Damage = tuple[np.ndarray, dict[str, Any], np.ndarray | None]


def jpeg(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """Blocks and ringing of strong compression."""
  quality = int(rng.integers(4, 26))
  buffer = io.BytesIO()
  Image.fromarray(rgb_HWC).save(buffer, "JPEG", quality=quality)
  return np.array(Image.open(buffer)), {"quality": quality}, None


def downsample(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """Lost resolution, enlarged again in one of three ways."""
  factor = int(rng.choice([2, 3, 4, 6, 8]))
  name = str(rng.choice(["nearest", "bilinear", "bicubic"]))
  back = Image.Resampling[name.upper()]
  image = Image.fromarray(rgb_HWC)
  small = image.resize(
    [max(1, side // factor) for side in image.size], Image.Resampling.BOX
  )
  large = np.array(small.resize(image.size, back))
  return large, {"factor": factor, "enlarged": name}, None


def gaussian_noise(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """Independent noise of one strength."""
  sigma = round(float(rng.uniform(12, 60)), 1)
  noise = rng.standard_normal(rgb_HWC.shape, np.float32) * sigma
  return colours.to_bytes(rgb_HWC + noise), {"sigma": sigma}, None


def poisson_noise(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """Shot noise, as of few photons."""
  photons = round(float(np.exp(rng.uniform(np.log(6), np.log(60)))), 1)
  counts = rng.poisson(rgb_HWC / 255 * photons)
  return colours.to_bytes(counts * (255 / photons)), {"photons": photons}, None


def motion_blur(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """A straight shake of the camera."""
  length = int(_share(rgb_HWC, rng, 0.02, 0.07))
  angle = round(float(rng.uniform(0, 180)), 1)
  side = length | 1
  kernel = np.zeros((side, side), np.uint8)
  centre = side / 2 - 0.5
  step = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
  ends = [centre + sign * step * centre for sign in (-1, 1)]
  first, last = (tuple(np.round(end * 16).astype(int).tolist()) for end in ends)
  cv2.line(kernel, first, last, 255, 1, cv2.LINE_AA, shift=4)
  kernel = kernel.astype(np.float32)
  blurred = cv2.filter2D(rgb_HWC, -1, kernel / kernel.sum())
  return blurred, {"length": length, "angle": angle}, None


def defocus(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """A lens that is out of focus: a disc."""
  radius = int(_share(rgb_HWC, rng, 0.008, 0.025))
  side = 2 * radius + 1
  kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
  kernel = kernel.astype(np.float32)
  blurred = cv2.filter2D(rgb_HWC, -1, kernel / kernel.sum())
  return blurred, {"radius": radius}, None


def low_light(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """Too little light, and the noise that comes with it."""
  gain = round(float(rng.uniform(0.12, 0.35)), 3)
  gamma = round(float(rng.uniform(1.1, 1.6)), 2)
  sigma = round(float(rng.uniform(1, 5)), 1)
  dark = 255 * gain * (rgb_HWC / 255) ** gamma
  noise = rng.standard_normal(rgb_HWC.shape, np.float32) * sigma
  parameters = {"gain": gain, "gamma": gamma, "sigma": sigma}
  return colours.to_bytes(dark + noise), parameters, None


def fade(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """A print that has lost contrast and colour to the light."""
  contrast = round(float(rng.uniform(0.35, 0.6)), 2)
  colour = round(float(rng.uniform(0.2, 0.5)), 2)
  grey = rgb_HWC.mean(axis=-1, keepdims=True)
  pale = grey + colour * (rgb_HWC - grey)
  tint = np.array([236.0, 222.0, 188.0])
  faded = contrast * pale + (1 - contrast) * tint
  return colours.to_bytes(faded), {"contrast": contrast, "colour": colour}, None


def grey(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """Colour is lost."""
  del rng
  luma = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY)
  return colours.grey(luma), {}, None


def haze(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """Fog that thickens towards the top, where a scene is mostly far away."""
  low, high = sorted(np.round(rng.uniform(0.25, 0.85, 2), 2).tolist())
  height = rgb_HWC.shape[0]
  thick = np.linspace(max(high, low + 0.2), low, height)[:, None, None]
  light = int(rng.integers(205, 245))
  fog = rgb_HWC * (1 - thick) + light * thick
  return colours.to_bytes(fog), {"near": low, "far": high, "light": light}, None


def rain(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """Bright parallel streaks; the pixels between them are untouched."""
  height, width = rgb_HWC.shape[:2]
  count = int(height * width / rng.uniform(900, 2500))
  angle = float(rng.uniform(-25, 25))
  length = _share(rgb_HWC, rng, 0.03, 0.07)
  step = length * np.array([np.sin(np.radians(angle)), 1.0])
  streaks = np.zeros((height, width), np.uint8)
  starts = rng.uniform((-length, -length), (width, height), (count, 2))
  for start in starts:
    ends = np.round(np.stack([start, start + step])).astype(int).tolist()
    cv2.line(streaks, ends[0], ends[1], int(rng.integers(110, 220)), 1)
  alpha = streaks[..., None] / 255
  wet = colours.to_bytes(rgb_HWC * (1 - alpha) + 225 * alpha)
  parameters = {"streaks": count, "angle": round(angle, 1)}
  return wet, parameters, streaks > 0


def scratches(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """Thin bright and dark lines and specks of a worn print."""
  height, width = rgb_HWC.shape[:2]
  mask = np.zeros((height, width), np.uint8)
  lines, specks = int(rng.integers(4, 12)), int(rng.integers(10, 40))
  for _ in range(lines):
    points = np.cumsum(
      np.concatenate([
        rng.uniform((0, 0), (width, height), (1, 2)),
        rng.normal(0, _share(rgb_HWC, rng, 0.05, 0.12), (4, 2)),
      ]),
      axis=0,
    )  # fmt: skip
    thick = int(rng.integers(1, 3))
    cv2.polylines(mask, [points.astype(np.int32)], False, 255, thick)
  for _ in range(specks):
    centre = rng.uniform((0, 0), (width, height)).astype(int).tolist()
    cv2.circle(mask, centre, int(rng.integers(1, 4)), 255, -1)
  where = mask > 0
  worn = rgb_HWC.copy()
  shade = 250 if rng.random() < 0.7 else 15
  jitter = rng.integers(-5, 6, (int(where.sum()), 1))
  worn[where] = np.clip(shade + jitter, 0, 255)
  return worn, {"lines": lines, "specks": specks, "shade": shade}, where


def hole(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """A part is missing: one to three rectangles, discs or strokes."""
  height, width = rgb_HWC.shape[:2]
  mask = np.zeros((height, width), np.uint8)
  shapes = [str(s) for s in rng.choice(["box", "disc", "stroke"], 3)]
  shapes = shapes[: int(rng.integers(1, 4))]
  for shape in shapes:
    size = _share(rgb_HWC, rng, 0.1, 0.2)
    centre = rng.uniform((size, size), (width - size, height - size))
    x, y = (int(c) for c in centre)
    half = int(size / 2) + 1
    if shape == "box":
      cv2.rectangle(mask, (x - half, y - half), (x + half, y + half), 255, -1)
    elif shape == "disc":
      cv2.circle(mask, (x, y), half, 255, -1)
    else:
      points = centre + np.cumsum(rng.normal(0, size / 2, (5, 2)), axis=0)
      cv2.polylines(mask, [points.astype(np.int32)], False, 255, half // 2 + 1)
  where = mask > 0
  fill = int(rng.choice([0, 127, 255]))
  torn = rgb_HWC.copy()
  torn[where] = fill
  return torn, {"shapes": shapes, "fill": fill}, where


def old_photo(rgb_HWC: np.ndarray, rng: np.random.Generator) -> Damage:
  """Faded, grainy and scratched at once."""
  faded, first, _ = fade(rgb_HWC, rng)
  sigma = round(float(rng.uniform(5, 15)), 1)
  grain = rng.standard_normal((*rgb_HWC.shape[:2], 1), np.float32) * sigma
  worn, second, _ = scratches(colours.to_bytes(faded + grain), rng)
  return worn, {**first, "sigma": sigma, **second}, None


DAMAGES: dict[str, Callable[[np.ndarray, np.random.Generator], Damage]] = {
  "jpeg": jpeg,
  "downsample": downsample,
  "gaussian_noise": gaussian_noise,
  "poisson_noise": poisson_noise,
  "motion_blur": motion_blur,
  "defocus": defocus,
  "low_light": low_light,
  "fade": fade,
  "grey": grey,
  "haze": haze,
  "rain": rain,
  "scratches": scratches,
  "hole": hole,
  "old_photo": old_photo,
}


def _share(
  rgb_HWC: np.ndarray, rng: np.random.Generator, low: float, high: float
) -> float:
  """Pixels that are a random share of the shorter side, at least 2."""
  return max(2.0, min(rgb_HWC.shape[:2]) * float(rng.uniform(low, high)))
