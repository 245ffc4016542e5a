# SPDX-License-Identifier: Apache-2.0
"""What the bytes of an image say without decoding its pixels."""

import contextlib
import hashlib
import io
import struct
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION, _EXIF_IFD = 0x0112, 0x8769
_EXIF_WIDTH, _EXIF_HEIGHT = 0xA002, 0xA003
# What Pillow raises for damaged metadata; pixels may be fine all the same.
_DAMAGED = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  KeyError,
  TypeError,
  struct.error,
)

# The luminance table of ITU-T T.81 (JPEG), Annex K.1; libjpeg scales it.
_LUMINANCE = np.array([
  16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
  14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
  18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
  49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
])  # fmt: skip


def file_metrics(data: bytes) -> dict[str, Any]:
  """Metrics of encoded bytes that could be decoded.

  Args:
    data: PNG, JPEG or WebP bytes.

  Returns:
    `format`; `source_mode`, Pillow's name before any conversion; `frames`;
    `orientation`, the EXIF tag (1 if absent); `orientation_conflict`, see
    `orientation_conflicts`; `jpeg_quality` (None unless JPEG); `bytes` and
    `sha256` of the file.
  """
  with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
    orientation, conflict = _orientation(image)
    jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
    return {
      "format": "JPEG" if jpeg else image.format,  # not MPO, a JPEG with more
      "source_mode": image.mode,
      "frames": 1 if jpeg else getattr(image, "n_frames", 1),
      "orientation": orientation,
      "orientation_conflict": conflict,
      "jpeg_quality": jpeg_quality(image) if jpeg else None,
      "bytes": len(data),
      "sha256": hashlib.sha256(data).hexdigest(),
    }


def _orientation(image: Image.Image) -> tuple[int, bool]:
  """(EXIF orientation or 1, whether the file contradicts it)."""
  tag, declared = 1, None
  if image.format == "PNG" and "exif" not in image.info:
    return tag, False  # getexif() would decode all pixels in search of it
  with contextlib.suppress(*_DAMAGED):
    exif = image.getexif()
    found = exif.get(_ORIENTATION)
    tag = found if found in range(1, 9) else 1
    ifd = exif.get_ifd(_EXIF_IFD)
    declared = (int(ifd[_EXIF_WIDTH]), int(ifd[_EXIF_HEIGHT]))
  return tag, orientation_conflicts(tag, image.size, declared)


def orientation_conflicts(
  orientation: int,
  stored: tuple[int, int],
  declared: tuple[int, int] | None,
) -> bool:
  """Whether a program turned the pixels but left the orientation tag.

  The camera's own size (EXIF PixelXDimension, PixelYDimension) is that of the
  stored pixels. If a tag asks for a quarter turn and the stored pixels have
  the camera's sides swapped, they have been turned already, and applying the
  tag turns them once too often.

  Args:
    orientation: EXIF tag, 1 to 8.
    stored: width and height of the pixels as stored.
    declared: width and height that the camera wrote, if any.
  """
  if orientation < 5 or declared is None or min(declared) < 1:
    return False
  # Programs that scale the image keep its shape, so sizes may differ. The
  # product is negative if one is upright and the other wide.
  return (stored[0] - stored[1]) * (declared[0] - declared[1]) < 0


def jpeg_quality(image: JpegImagePlugin.JpegImageFile) -> float | None:
  """The libjpeg quality, 1 to 100, whose luminance table is nearest.

  Exact for tables made by libjpeg; for others the quality of equal mean step.
  A file saved again at a higher quality shows only the last one, which is why
  `pixels.blockiness` exists.
  """
  table = image.quantization.get(0)
  if not table:
    return None
  # The order of a table's entries differs between Pillow's versions; the sum
  # does not.
  qualities = np.arange(1, 101)
  scale = np.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)
  steps = (_LUMINANCE[None] * scale[:, None] + 50) // 100
  sums = steps.clip(1, 255).sum(axis=1)  # falls with the quality
  return float(np.interp(-float(sum(table)), -sums, qualities))
