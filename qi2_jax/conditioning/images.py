# SPDX-License-Identifier: Apache-2.0
"""Reference images and output sizes, as the public pipeline has them."""

import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from qi2_jax.conditioning.vl_layout import over_white
from qi2_jax.errors import InputError

# One encoder slot is 32 px wide, so references snap to multiples of it.
SLOT = 32


MAX_REFERENCES = 10  # of the public model

# (width, height) in pixels at resolution 2048, as the public model names
# them (model card of Qwen-Image-2.1).
OFFICIAL_SIZES = {
  "1:1": (2048, 2048),
  "4:3": (2400, 1792),
  "3:4": (1792, 2400),
  "3:2": (2528, 1696),
  "2:3": (1696, 2528),
  "16:9": (2752, 1536),
  "9:16": (1536, 2752),
}


def check_count(count: int) -> None:
  """Raises InputError for more references than the model takes."""
  if count > MAX_REFERENCES:
    raise InputError(
      f"{count} reference images are too many; the model takes at most "
      f"{MAX_REFERENCES}."
    )


def area_size(ratio: float, side: int, step: int = SLOT) -> tuple[int, int]:
  """(height, width) of about `side`^2 pixels at `ratio` = width / height."""
  width = math.sqrt(side * side * ratio)
  height = width / ratio
  snap = lambda x: max(step, round(x / step) * step)  # noqa: E731
  return snap(height), snap(width)


def open_image(path: str) -> Image.Image:
  """Reads an image file, turned as its EXIF says.

  Raises:
    InputError: the file is missing or no readable image.
  """
  try:
    with Image.open(path) as file:
      image = ImageOps.exif_transpose(file)
      if image.mode.startswith("I;16"):
        # Pillow's own conversion would clip 16 bits instead of scaling them.
        image = Image.fromarray(np.uint8(np.asarray(image) // 257))
      return image.convert("RGBA")
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
    raise InputError(
      f"cannot read image {path} ({e}); pass a PNG, JPEG or WebP file."
    ) from e


def load_reference(source, side: int, channels: int) -> np.ndarray:
  """An image, resized once to the area `side`^2 for encoder and VAE alike.

  Args:
    source: path, PIL image, or uint8 array `[H, W, 3 or 4]`.
    side: side of the square of equal area, in pixels.
    channels: 4 keeps alpha (opaque where there is none), 3 composites over
      white.

  Returns:
    uint8 `[h, w, channels]`, sides multiples of 32.

  Raises:
    InputError: the file is missing or no readable image, or has no pixels.
  """
  if isinstance(source, np.ndarray):
    if source.dtype != np.uint8 or source.ndim != 3 or not source.size:
      raise InputError(
        f"a reference array has dtype {source.dtype} and shape "
        f"{source.shape}; pass uint8 [H, W, 3 or 4]."
      )
    source = Image.fromarray(source)
  if isinstance(source, Image.Image):
    image = source.convert("RGBA")
  else:
    image = open_image(source)
  if not image.width or not image.height:
    raise InputError("a reference image has no pixels; pass another.")
  height, width = area_size(image.width / image.height, side)
  # Pillow premultiplies alpha when it resizes RGBA.
  image = image.resize((width, height), Image.Resampling.LANCZOS)
  pixels = np.asarray(image)
  return pixels if channels == 4 else over_white(pixels)


def with_alpha(image: np.ndarray, channels: int) -> np.ndarray:
  """uint8 RGB to opaque RGBA where a VAE has four channels."""
  if image.shape[-1] == channels:
    return image
  opaque = np.full((*image.shape[:2], 1), 255, np.uint8)
  return np.concatenate([image[..., :3], opaque], axis=-1)


def named_size(name: str, side: int) -> tuple[int, int]:
  """(height, width) of `16:9` (a ratio) or `1280x768` (width x height).

  An official ratio at resolution 2048 has the official size; any other has
  about the area `side`^2.

  Raises:
    InputError: the name has neither form.
  """
  match = re.fullmatch(r"(\d+)([:x])(\d+)", name)
  if not match or not int(match[1]) or not int(match[3]):
    raise InputError(
      f"size {name!r} is neither a ratio such as 16:9 nor WIDTHxHEIGHT such "
      "as 1280x768."
    )
  width, height = int(match[1]), int(match[3])
  if match[2] == "x":
    return height, width
  if side == 2048 and name in OFFICIAL_SIZES:
    return OFFICIAL_SIZES[name][::-1]
  return area_size(width / height, side)


def explicit_size(
  size: str | None, height: int | None, width: int | None, side: int
) -> tuple[int | None, int | None]:
  """(height, width) as asked for by name or by numbers, or (None, None).

  Raises:
    InputError: both are given, or the name has no meaning.
  """
  if size is None:
    return height, width
  if height is not None or width is not None:
    raise InputError("give either a size or height and width, not both.")
  return named_size(size, side)


def target_size(
  height: int | None, width: int | None, references: Sequence[np.ndarray],
  side: int, factor: int,
) -> tuple[int, int]:  # fmt: skip
  """Explicit size, else the last reference's, else a square of `side`.

  Raises:
    InputError: only one of height and width is given, or they are no
      multiples of two latents.
  """
  if (height is None) != (width is None):
    raise InputError("give both --height and --width, or neither.")
  if height is None:
    if references:
      return references[-1].shape[0], references[-1].shape[1]
    return area_size(1.0, side)
  step = 2 * factor
  if height <= 0 or width <= 0 or height % step or width % step:
    raise InputError(
      f"size {height} x {width} (height x width) is not a multiple of "
      f"{step} px on both sides; choose another."
    )
  return height, width
