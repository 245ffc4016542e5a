# SPDX-License-Identifier: Apache-2.0
"""Decoding of images that nobody has looked at yet.

Limits are checked on the header, before any pixel is unpacked. What may crash
or hang all the same runs in the processes of `pool`.
"""

import io
import warnings

from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.images import EncodedImage, decode_image
from data_pipelines.sources.items import Limits, Unusable, printable

_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def probe(data: bytes, limits: Limits) -> EncodedImage:
  """Wraps the bytes of an image after reading its header only.

  Args:
    data: PNG, JPEG or WebP.
    limits: of the pixels.

  Raises:
    Unusable: not such an image, or too large. Pixels may still be damaged.
  """
  if not data:
    raise Unusable("empty file")
  try:
    with warnings.catch_warnings():
      # Pillow warns where our own limit is what counts.
      warnings.simplefilter("ignore")
      with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_pixels(*image.size, limits)
        width, height = image.size
        if _orientation(image) in _TRANSPOSED:
          width, height = height, width
        mode = "RGBA" if image.has_transparency_data else "RGB"
  except Image.DecompressionBombError as error:
    raise Unusable(f"image over {limits.pixels} pixels") from error
  except Unusable:
    raise
  except Exception as error:  # foreign bytes raise many types in Pillow
    raise Unusable(_reason("not a PNG, JPEG or WebP image", error)) from error
  return EncodedImage(data, width, height, mode)


def decode(image: EncodedImage, limits: Limits) -> Image.Image:
  """Decodes to RGB or RGBA, EXIF orientation applied.

  Raises:
    Unusable: the bytes are damaged or the image is too large.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      with Image.open(io.BytesIO(image.data), formats=_FORMATS) as header:
        _check_pixels(*header.size, limits)
      return decode_image(image)
  except Unusable:
    raise
  except InputError as error:
    detail = str(error).partition("(")[2].rpartition(")")[0]
    raise Unusable(f"damaged image ({printable(detail)})") from error
  except Exception as error:  # damaged metadata raises many types in Pillow
    raise Unusable(_reason("damaged image", error)) from error


def _check_pixels(width: int, height: int, limits: Limits) -> None:
  if width * height > limits.pixels:
    raise Unusable(
      f"image over {limits.pixels} pixels ({width} x {height}; limits.pixels)"
    )


def _orientation(image: Image.Image) -> int:
  # getexif() of a PNG without EXIF so far would decode all of its pixels.
  if image.format == "PNG" and "exif" not in image.info:
    return 1
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # damaged metadata; `decode` judges it
    return 1


def _reason(category: str, error: Exception) -> str:
  # Pillow's texts for unknown bytes carry an object address.
  text = str(error).split("<_io")[0].strip() or type(error).__name__
  return f"{category} ({printable(text.splitlines()[0])})"
