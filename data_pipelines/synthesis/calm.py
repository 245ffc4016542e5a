# SPDX-License-Identifier: Apache-2.0
"""The calm part of a photo: where its grey values are most predictable."""

import cv2
import numpy as np

LEVELS = 16  # grey values that entropy tells apart
_SIDE = 128  # of the copy that is looked at, in pixels


def entropy(grey_HW: np.ndarray, window: tuple[int, int]) -> np.ndarray:
  """Entropy of the grey values in every window, in bits.

  Args:
    grey_HW: uint8.
    window: (width, height), at most those of the picture.

  Returns:
    float32 `[H - height + 1, W - width + 1]`, within [0, log2(`LEVELS`)];
    entry (y, x) is of the window that starts there.
  """
  width, height = window
  bins = grey_HW.astype(int) * LEVELS // 256
  rows, columns = grey_HW.shape
  out = np.zeros((rows - height + 1, columns - width + 1), np.float32)
  for level in range(LEVELS):
    counts = cv2.integral((bins == level).astype(np.uint8))
    inside = counts[height:, width:] - counts[:-height, width:]
    inside = inside - counts[height:, :-width] + counts[:-height, :-width]
    share = inside.astype(np.float32) / (width * height)
    out -= share * np.log2(np.maximum(share, 1e-9))
  return out


def calmest(
  picture_HW3: np.ndarray, share: tuple[float, float]
) -> tuple[float, float]:
  """The middle of the window of least entropy.

  Args:
    picture_HW3: uint8.
    share: width and height of the window in parts of the picture's, below 1.

  Returns:
    (x, y) in parts of width and height.
  """
  height, width = picture_HW3.shape[:2]
  scale = min(1.0, _SIDE / max(width, height))
  small = (max(2, round(scale * width)), max(2, round(scale * height)))
  grey = cv2.cvtColor(picture_HW3, cv2.COLOR_RGB2GRAY)
  grey = cv2.resize(grey, small, interpolation=cv2.INTER_AREA)
  window = tuple(max(1, min(n, round(s * n))) for s, n in zip(share, small))
  found = entropy(grey, window)
  y, x = np.unravel_index(np.argmin(found), found.shape)
  return (x + window[0] / 2) / small[0], (y + window[1] / 2) / small[1]
