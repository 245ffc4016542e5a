# SPDX-License-Identifier: Apache-2.0
"""The colours of images that may be transparent, apart from their alpha.

Shapes: H height, W width, C 3 colours.
"""

import numpy as np
from PIL import Image


def visible(image: Image.Image) -> np.ndarray:
  """uint8 [H, W, 3]; transparent pixels get the mean of the others.

  What they hold is arbitrary, and blurring would draw it into sight.
  """
  if image.mode == "RGB":
    return np.asarray(image)
  rgba = np.asarray(image)
  rgb_HWC, alpha_HW = rgba[..., :3].copy(), rgba[..., 3]
  shown = alpha_HW > 0
  if shown.any():
    rgb_HWC[~shown] = rgb_HWC[shown].mean(axis=0)
  return rgb_HWC


def replaced(image: Image.Image, rgb_HWC: np.ndarray) -> Image.Image:
  """The image in other colours; transparent pixels keep theirs.

  Args:
    image: RGB or RGBA.
    rgb_HWC: uint8.

  Returns:
    An image of the same mode with the same alpha.
  """
  if image.mode == "RGB":
    return Image.fromarray(np.ascontiguousarray(rgb_HWC))
  rgba = np.array(image)
  shown = rgba[..., 3] > 0
  rgba[shown, :3] = rgb_HWC[shown]
  return Image.fromarray(rgba)


def shown(image: Image.Image) -> np.ndarray | None:
  """bool [H, W]: pixels that are not transparent; None if all are opaque."""
  if image.mode == "RGB":
    return None
  alpha_HW = np.asarray(image.getchannel("A"))
  return None if alpha_HW.min() == 255 else alpha_HW > 0


def to_bytes(values: np.ndarray) -> np.ndarray:
  """uint8 of floats from 0 to 255; others are clipped."""
  return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def grey(luma_HW: np.ndarray) -> np.ndarray:
  """[H, W, 3] of one channel."""
  return np.repeat(luma_HW[..., None], 3, axis=-1)
