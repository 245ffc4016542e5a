# SPDX-License-Identifier: Apache-2.0
"""Foreign bytes become pixels within limits, or a reason; nothing else."""

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from pictures import encoded, jpeg, picture
from PIL import Image

from data_pipelines import images
from data_pipelines.engine import decoding
from data_pipelines.sources.items import Limits, Unusable

LIMITS = Limits()


def _png(width, height, *chunks):
  """A PNG header, chunks, and a little of the pixels."""
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  body = [(b"IHDR", header), *chunks]
  body += [(b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in body)


def _chunk(kind, data):
  check = struct.pack(">I", zlib.crc32(kind + data))
  return struct.pack(">I", len(data)) + kind + data + check


def _rotated(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encoded(picture(1, (40, 20)), exif=exif)


def _grey16():
  values = np.linspace(0, 65535, 40 * 20).reshape(20, 40).astype(np.uint16)
  return encoded(Image.fromarray(values), "PNG")


def _palette():
  image = picture(2, (40, 20)).quantize(16)
  return encoded(image, "PNG", transparency=0)


def _animated(fmt):
  frames = [picture(i, (40, 20), "RGBA") for i in range(3)]
  return encoded(frames[0], fmt, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
  "data",
  [
    jpeg(), encoded(picture(), "WEBP"), encoded(picture(mode="RGBA"), "PNG"),
    encoded(picture(mode="RGBA"), "WEBP"), encoded(picture(mode="CMYK")),
    encoded(picture(mode="L")), encoded(picture(mode="LA"), "PNG"),
    encoded(picture(mode="1"), "PNG"), _grey16(), _palette(), _rotated(3),
    _rotated(6), _rotated(8), _animated("PNG"), _animated("WEBP"),
  ],
)  # fmt: skip
def test_a_header_promises_what_decoding_gives(data):
  """The same as `images.from_bytes`, which decodes everything."""
  probed = decoding.probe(data, LIMITS)
  assert probed == images.from_bytes(data)
  pixels = decoding.decode(probed, LIMITS)
  assert pixels.size == (probed.width, probed.height)
  assert pixels.mode == probed.mode
  assert pixels.tobytes() == images.decode_image(probed).tobytes()


def _zip():
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr("bomb", bytes(10_000_000))
  return buffer.getvalue()


@pytest.mark.parametrize(
  "data, reason",
  [
    (b"", "empty file"),
    (b"not an image", "not a PNG, JPEG or WebP image ("),
    (_zip(), "not a PNG, JPEG or WebP image ("),
    (encoded(picture(), "GIF"), "not a PNG, JPEG or WebP image ("),
    (encoded(picture(), "TIFF"), "not a PNG, JPEG or WebP image ("),
    (_png(50_000, 50_000), "image over 64000000 pixels"),
    (_png(12_000, 12_000), "image over 64000000 pixels (12000 x 12000; "),
    (_png(0, 7), "not a PNG, JPEG or WebP image ("),
    (
      _png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(99_000_000)))),
      "not a PNG, JPEG or WebP image (",
    ),
  ],
)
def test_what_has_no_usable_header(data, reason):
  with pytest.raises(Unusable) as error:
    decoding.probe(data, LIMITS)
  assert str(error.value).startswith(reason)
  assert " at 0x" not in str(error.value)


@pytest.mark.parametrize(
  "data", [jpeg()[:-900], encoded(picture(), "PNG")[:-3000], _png(64, 64)]
)
def test_what_is_damaged_behind_the_header(data):
  probed = decoding.probe(data, LIMITS)
  with pytest.raises(Unusable, match=r"^damaged image \("):
    decoding.decode(probed, LIMITS)


def test_limits_hold_when_they_are_small():
  small = Limits(pixels=80 * 72 - 1)
  with pytest.raises(Unusable, match="image over 5759 pixels"):
    decoding.probe(jpeg(), small)
  with pytest.raises(Unusable, match="image over 5759 pixels"):
    decoding.decode(images.from_bytes(jpeg()), small)
  assert decoding.probe(jpeg(), Limits(pixels=80 * 72)).width == 80


def test_exif_behind_the_pixels_of_a_png_does_not_decode_them():
  """Pillow would, to look for it; what decoding finds is what counts."""
  exif = Image.Exif()
  exif[0x0112] = 6
  plain = encoded(picture(1, (40, 20)), "PNG")
  end = plain[-12:]
  data = plain[:-12] + _chunk(b"eXIf", exif.tobytes()[6:]) + end
  probed = decoding.probe(data, LIMITS)
  assert (probed.width, probed.height) == (40, 20)
  assert decoding.decode(probed, LIMITS).size == (20, 40)


def test_flipped_bytes_give_pixels_or_a_reason():
  rng = np.random.default_rng(0)
  originals = [
    _rotated(6), encoded(picture(mode="RGBA"), "PNG"), _palette(),
    encoded(picture(mode="RGBA"), "WEBP"), _animated("WEBP"),
  ]  # fmt: skip
  outcomes = {True: 0, False: 0}
  for number in range(400):
    data = bytearray(originals[number % len(originals)])
    # Headers and metadata are at the front.
    for _ in range(3):
      end = len(data) if number % 2 else min(120, len(data))
      data[rng.integers(end)] = rng.integers(256)
    try:
      probed = decoding.probe(bytes(data), LIMITS)
      decoding.decode(probed, LIMITS)
      outcomes[True] += 1
    except Unusable as error:
      outcomes[False] += 1
      assert str(error).encode("utf-8")
  assert min(outcomes.values()) > 50, outcomes
