# SPDX-License-Identifier: Apache-2.0
"""Grids of pictures, for people."""

from collections.abc import Sequence

import numpy as np

_PAD = 4


def flatten(image: np.ndarray) -> np.ndarray:
  """uint8 `[H, W, 3|4]` over white: `[H, W, 3]`."""
  if image.shape[-1] == 3:
    return image
  alpha = image[..., 3:].astype(np.float32) / 255.0
  rgb = image[..., :3].astype(np.float32) * alpha + 255.0 * (1.0 - alpha)
  return np.uint8(np.round(rgb))


def grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
  """Tiles uint8 images of any sizes on grey: `[H, W, 3]`."""
  images = [flatten(image) for image in images]
  height = max(i.shape[0] for i in images) + _PAD
  width = max(i.shape[1] for i in images) + _PAD
  rows = -(-len(images) // columns)
  out = np.full((rows * height, columns * width, 3), 160, np.uint8)
  for n, image in enumerate(images):
    y, x = (n // columns) * height, (n % columns) * width
    h, w = image.shape[:2]
    top, left = y + (height - h) // 2, x + (width - w) // 2
    out[top : top + h, left : left + w] = image
  return out
