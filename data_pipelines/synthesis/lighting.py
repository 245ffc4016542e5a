# SPDX-License-Identifier: Apache-2.0
"""Light on a finished picture: uneven light, shadow, gloss, grain, softness.

Light only multiplies and gloss only adds white, so whatever was brighter stays
brighter. Pictures are float32 `[H, W, 3]` in [0, 1], sRGB.
Every bound is ours, chosen so that a contrast of 4.5 stays above 3.
"""

import dataclasses

import cv2
import numpy as np

from data_pipelines.synthesis import backgrounds

DARKEST, BRIGHTEST = 0.6, 1.15  # of the multiplied light
GLOSS = 0.22  # most white that gloss adds
GRAIN = 0.012  # largest standard deviation of the sensor's noise
SOFT = 0.45  # largest sigma of the blur, in pixels


@dataclasses.dataclass(frozen=True)
class Light:
  """How a picture is lit.

  Attributes:
    angle: where the light comes from, in the picture's plane, in radians.
    slope: how much brighter the lit side is than the other, of 1.
    vignette: how much darker the corners are.
    shadow: depth of the shadow of something outside the picture; 0: none.
    shadow_at: (x, y) of a point on its edge, in parts of width and height.
    shadow_angle: of its edge, in radians.
    shadow_soft: width of its edge, in parts of a side.
    gloss: white added at the brightest point.
    gloss_at: that point, in parts of width and height.
    gloss_size: its radius, in parts of a side.
    grain: standard deviation of the noise.
    soft: sigma of the blur in pixels.
    seed: of the noise.
  """

  angle: float = 0.0
  slope: float = 0.0
  vignette: float = 0.0
  shadow: float = 0.0
  shadow_at: tuple[float, float] = (0.5, 0.5)
  shadow_angle: float = 0.0
  shadow_soft: float = 0.05
  gloss: float = 0.0
  gloss_at: tuple[float, float] = (0.5, 0.5)
  gloss_size: float = 0.3
  grain: float = 0.0
  soft: float = 0.0
  seed: int = 0


def draw_light(rng: np.random.Generator, gloss: bool) -> Light:
  """A random light; only glossy things shine."""

  def point():
    return tuple(float(v) for v in rng.uniform(0.1, 0.9, 2))

  return Light(
    angle=float(rng.uniform(-np.pi, np.pi)),
    slope=float(rng.uniform(0, 0.3)),
    vignette=float(rng.uniform(0, 0.2)),
    shadow=float(rng.uniform(0.1, 0.35)) if rng.random() < 0.4 else 0.0,
    shadow_at=point(),
    shadow_angle=float(rng.uniform(-np.pi, np.pi)),
    shadow_soft=float(rng.uniform(0.01, 0.1)),
    gloss=float(rng.uniform(0.05, GLOSS)) if gloss else 0.0,
    gloss_at=point(),
    gloss_size=float(rng.uniform(0.15, 0.4)),
    grain=float(rng.uniform(0, GRAIN)),
    soft=float(rng.uniform(0, SOFT)),
    seed=int(rng.integers(2**31)),
  )


def gain(light: Light, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """What the picture is multiplied by at some points.

  Args:
    light: the light.
    x: in parts of the width.
    y: in parts of the height; broadcast with x.

  Returns:
    within [`DARKEST`, `BRIGHTEST`].
  """
  # From -1 to 1 along the direction of the light.
  along = np.cos(light.angle) * (2 * x - 1) + np.sin(light.angle) * (2 * y - 1)
  field = 1 + 0.5 * light.slope * along / np.sqrt(2)
  corner = (np.square(2 * x - 1) + np.square(2 * y - 1)) / 2
  field *= 1 - light.vignette * np.square(corner)
  (px, py), soft = light.shadow_at, light.shadow_soft
  beyond = (x - px) * np.cos(light.shadow_angle)
  beyond = (beyond + (y - py) * np.sin(light.shadow_angle)) / soft
  field *= 1 - light.shadow / (1 + np.exp(-4 * np.clip(beyond, -9, 9)))
  return np.clip(field, DARKEST, BRIGHTEST)


def veil(light: Light, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """How much white lies over the picture, as `gain`; within [0, `GLOSS`]."""
  (px, py), radius = light.gloss_at, light.gloss_size
  far = np.square(x - px) + np.square(y - py)
  return np.clip(light.gloss * np.exp(-far / radius**2), 0, GLOSS)


def mix(colour: np.ndarray, gain: np.ndarray, veil: np.ndarray) -> np.ndarray:
  """A colour under light and gloss, in [0, 1]; monotone in the colour."""
  lit = np.clip(colour * gain, 0, 1)
  return lit + veil * (1 - lit)


def shine(image: np.ndarray, light: Light) -> np.ndarray:
  """A picture under light and gloss, without grain and blur."""
  height, width = image.shape[:2]
  x, y = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in (width, height))
  fields = (field(light, x[None], y[:, None])[..., None]
            for field in (gain, veil))  # fmt: skip
  return mix(image, *fields)


def expose(image: np.ndarray, light: Light) -> np.ndarray:
  """The picture as a camera takes it under a light.

  Args:
    image: float32 `[H, W, 3]` in [0, 1].
    light: the light; its seed decides the noise, not the picture.

  Returns:
    uint8 `[H, W, 3]`.
  """
  out = shine(image, light)
  if light.soft > 0.2:  # below, three taps are one
    out = cv2.GaussianBlur(out, (5, 5), light.soft)
  if light.grain:
    rng = np.random.default_rng(light.seed)
    out = out + light.grain * rng.standard_normal(out.shape, np.float32)
  return np.rint(255 * np.clip(out, 0, 1)).astype(np.uint8)


def contrast(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Ratio of WCAG 2.2, 1 to 21, of sRGB colours `[..., 3]` in [0, 1]."""
  one, other = (backgrounds.luminance(255 * np.asarray(c)) for c in (a, b))
  return (np.maximum(one, other) + 0.05) / (np.minimum(one, other) + 0.05)
