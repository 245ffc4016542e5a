# SPDX-License-Identifier: Apache-2.0
"""sRGB -> CIELAB (D65) and the nearest colour of the palette.

Twelve lines of arithmetic instead of scikit-image, which would be a heavy
dependency for one function; the tests compare the two.
"""

import functools

import numpy as np

from data_pipelines.shapes import vocabulary as vocab

BACKGROUND_LABEL = len(vocab.COLOURS)

_XYZ_FROM_RGB = np.array(
  [
    [0.412453, 0.357580, 0.180423],
    [0.212671, 0.715160, 0.072169],
    [0.019334, 0.119193, 0.950227],
  ]
)
_D65_WHITE = np.array([0.95047, 1.0, 1.08883])
_LAB_FROM_F = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]])


@functools.cache
def _linear_from_byte() -> np.ndarray:
  s = np.arange(256) / 255
  linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
  return linear.astype(np.float32)


def lab_from_rgb(image: np.ndarray) -> np.ndarray:
  """Converts uint8 sRGB [..., 3] to float32 CIELAB [..., 3] (IEC 61966-2-1)."""
  to_xyz = (_XYZ_FROM_RGB / _D65_WHITE[:, None]).T.astype(np.float32)
  xyz = _linear_from_byte()[image] @ to_xyz
  toe = xyz * np.float32((29 / 6) ** 2 / 3) + np.float32(4 / 29)
  f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), toe)
  lab = f @ _LAB_FROM_F.T.astype(np.float32)
  lab[..., 0] -= 16
  return lab


def delta_e(image_a: np.ndarray, image_b: np.ndarray) -> np.ndarray:
  """CIE76 difference of uint8 sRGB images, per pixel: [H, W, 3] -> [H, W]."""
  return np.linalg.norm(lab_from_rgb(image_a) - lab_from_rgb(image_b), axis=-1)


@functools.cache
def _palette_lab() -> np.ndarray:
  colours = [*vocab.COLOURS.values(), vocab.BACKGROUND]
  return lab_from_rgb(np.array(colours, np.uint8))


def palette_labels(image: np.ndarray) -> np.ndarray:
  """Nearest palette entry of every pixel, cleaned by a 3x3 majority vote.

  Args:
    image: uint8 [H, W, 3], sRGB.

  Returns:
    int [H, W]: an index into `vocabulary.COLOURS`, or BACKGROUND_LABEL.
  """
  lab, palette = lab_from_rgb(image), _palette_lab()
  # argmin |x - p|^2 = argmin |p|^2 - 2 x.p: one matrix product.
  cost = (palette**2).sum(-1) - 2 * lab @ palette.T
  return _majority(cost.argmin(-1), len(palette))


def _majority(labels_HW: np.ndarray, count: int) -> np.ndarray:
  padded = np.pad(labels_HW, 1, mode="edge")
  hits = (padded == np.arange(count)[:, None, None]).view(np.uint8)
  rows = hits[:, :-2] + hits[:, 1:-1] + hits[:, 2:]
  votes = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
  return votes.argmax(0)
