# SPDX-License-Identifier: Apache-2.0
"""Reference images and output sizes, as the public pipeline has them."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qi2_jax.errors import InputError

# One encoder slot is 32 px wide, so references snap to multiples of it.
SLOT = 32


def area_size(ratio: float, side: int, step: int = SLOT) -> tuple[int, int]:
  """(height, width) of about `side`^2 pixels at `ratio` = width / height."""
  width = math.sqrt(side * side * ratio)
  height = width / ratio
  snap = lambda x: max(step, round(x / step) * step)  # noqa: E731
  return snap(height), snap(width)


def load_reference(path: str, side: int, channels: int) -> np.ndarray:
  """Reads an image and resizes it once to the area `side`^2.

  Args:
    path: image file.
    side: side of the square of equal area, in pixels.
    channels: 4 keeps alpha (opaque where there is none), 3 composites over
      white.

  Returns:
    uint8 `[h, w, channels]`, sides multiples of 32.

  Raises:
    InputError: the file is missing or no readable image.
  """
  try:
    with Image.open(path) as file:
      image = file.convert("RGBA")
  except (OSError, SyntaxError, ValueError) as error:
    raise InputError(
      f"cannot read image {path} ({error}); pass a PNG, JPEG or WebP file."
    ) from error
  height, width = area_size(image.width / image.height, side)
  # Pillow premultiplies alpha when it resizes RGBA.
  image = image.resize((width, height), Image.Resampling.LANCZOS)
  if channels == 3:
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
  return np.asarray(image)


def target_size(
  height: int | None, width: int | None, references: Sequence[np.ndarray],
  side: int, factor: int,
) -> tuple[int, int]:  # fmt: skip
  """Explicit size, else the last reference's, else a square of `side`.

  Raises:
    InputError: only one of height and width is given, or they are no
      multiples of the VAE's factor.
  """
  if (height is None) != (width is None):
    raise InputError("give both --height and --width, or neither.")
  if height is None:
    if references:
      return references[-1].shape[0], references[-1].shape[1]
    return area_size(1.0, side)
  if height <= 0 or width <= 0 or height % factor or width % factor:
    raise InputError(
      f"size {height} x {width} is not a multiple of {factor} px; choose "
      "another --height and --width."
    )
  return height, width
