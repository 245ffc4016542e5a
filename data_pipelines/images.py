# SPDX-License-Identifier: Apache-2.0
"""Encoded images: what a record stores, and the one way to read it back.

Bytes stay as the source wrote them (PNG, JPEG or WebP); pixels exist only
between `decode_image` and the end of a loader thread.
"""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageOps

from data_pipelines.errors import InputError

# Of files that hold such bytes, in lower case.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# What Pillow raises for damaged bytes, by format: OSError (all), SyntaxError
# (PNG chunks), ValueError (JPEG markers), struct-like EOFError, and its own
# refusal of decompression bombs, which is not an OSError.
_DAMAGED = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  Image.DecompressionBombError,
)


@dataclasses.dataclass(frozen=True)
class EncodedImage:
  """An image as stored in a record.

  Attributes:
    data: PNG, JPEG or WebP bytes.
    width: pixels, after EXIF orientation is applied.
    height: pixels, after EXIF orientation is applied.
    mode: 'RGB' or 'RGBA', the mode `decode_image` returns.
  """

  data: bytes
  width: int
  height: int
  mode: str


def encode_png(array: np.ndarray) -> EncodedImage:
  """Encodes uint8 pixels [H, W, 3 or 4] losslessly."""
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4):
    raise InputError(
      "encode_png needs uint8 [H, W, 3 or 4], not "
      f"{array.dtype} {list(array.shape)}; convert the array first."
    )
  image = Image.fromarray(np.ascontiguousarray(array))
  buffer = io.BytesIO()
  image.save(buffer, format="PNG")
  return EncodedImage(buffer.getvalue(), *image.size, image.mode)


def from_bytes(data: bytes) -> EncodedImage:
  """Wraps PNG, JPEG or WebP bytes unchanged, after decoding them once.

  Raises:
    InputError: the bytes are empty, truncated or not such an image.
  """
  image = decode(data)
  return EncodedImage(data, *image.size, image.mode)


def decode_image(image: EncodedImage) -> Image.Image:
  """Decodes to a Pillow image in RGB or RGBA, EXIF orientation applied.

  Raises:
    InputError: the bytes are empty, truncated or not an image.
  """
  return decode(image.data)


def decode(data: bytes) -> Image.Image:
  """`decode_image` of PNG, JPEG or WebP bytes.

  Raises:
    InputError: see `decode_image`.
  """
  if not data:
    raise InputError("Empty image (0 bytes); restore the file.")
  try:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
      # exif_transpose returns a copy, which decodes every pixel.
      return _to_rgb_or_rgba(ImageOps.exif_transpose(image))
  except _DAMAGED as error:
    # Pillow's texts for unknown bytes carry an object address.
    reason = str(error).split("<_io")[0].strip() or type(error).__name__
    raise InputError(
      f"Unreadable image ({reason}); replace the file."
    ) from error


def _to_rgb_or_rgba(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I"):
    # 16-bit grey PNG: Pillow's own conversion clips at 255 (all white).
    grey = np.asarray(image).astype(np.int32) >> 8
    image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
  # Covers RGBA, LA, and the tRNS transparency of P, L and RGB files, which a
  # plain convert("RGB") would turn into arbitrary opaque colours.
  mode = "RGBA" if image.has_transparency_data else "RGB"
  return image if image.mode == mode else image.convert(mode)


def on_white(image: Image.Image) -> Image.Image:
  """RGB pixels of an RGB or RGBA image, composited on white."""
  if image.mode != "RGBA":
    return image
  white = Image.new("RGBA", image.size, "white")
  return Image.alpha_composite(white, image).convert("RGB")
