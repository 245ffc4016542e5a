# SPDX-License-Identifier: Apache-2.0
"""Resizing to buckets: the loader's rule, alpha kept, no needless loss."""

import dataclasses
import io

import numpy as np
import pytest
from pictures import encoded, jpeg, picture
from PIL import Image

from data_pipelines import codec
from data_pipelines.engine import decoding, materialise
from data_pipelines.engine.config import Encoding
from data_pipelines.images import decode_image
from data_pipelines.loader.buckets import Bucket, assign, fit, make_buckets
from data_pipelines.sources.items import Limits, Unusable

SMALL = make_buckets(64, 32, 2.0)
LARGE = make_buckets(128, 32, 2.0)
SETTINGS = materialise.Settings(
  stage="s",
  resolutions=(LARGE, SMALL),
  max_enlarge=1.0,
  encoding=Encoding("auto", "png", 90),
  limits=Limits(),
)


def _record(target, *references):
  images = [decoding.probe(data, Limits()) for data in (target, *references)]
  task = "ti2i" if references else "t2i"
  return codec.Record(
    "a", task, "c", "k", images[0], tuple(images[1:]), {"where": "w"}
  )


def _resize(target, *references, **changes):
  settings = dataclasses.replace(SETTINGS, **changes)
  record = _record(target, *references)
  data, row = materialise.resize_record(codec.encode(record), settings)
  return codec.decode(data), row


def _format(image):
  return Image.open(io.BytesIO(image.data)).format


@pytest.mark.parametrize(
  "size", [(200, 150), (150, 200), (129, 128), (128, 128), (300, 140)]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pixels_are_those_of_the_loader(size, mode):
  image = picture(0, size, mode)
  record, row = _resize(encoded(image, "PNG"))
  bucket = LARGE[assign(*size, LARGE, 1.0)]
  assert row["bucket"] == str(bucket)
  assert (record.target.width, record.target.height) == bucket[::-1]
  assert record.target.mode == mode and _format(record.target) == "PNG"
  expected = fit(image, bucket, len(mode))
  np.testing.assert_array_equal(decode_image(record.target), expected)
  assert record.provenance == {
    "where": "w", "stage": "s", "original_size": list(size),
  }  # fmt: skip


def test_a_record_goes_to_the_largest_resolution_that_all_images_fill():
  large, small = jpeg(0, (160, 160)), jpeg(1, (70, 70))
  record, row = _resize(large, large)
  assert row["bucket"] == "128x128"
  record, row = _resize(large, small)
  assert [i.width for i in (record.target, *record.references)] == [64, 64]
  assert row["bucket"] == "64x64"
  assert (row["width"], row["height"]) == (160, 160)


def test_what_fills_no_bucket_is_left_out_unless_enlarging_is_allowed():
  with pytest.raises(Unusable, match=r"target needs enlarging .*63 x 70"):
    _resize(jpeg(0, (63, 70)))
  with pytest.raises(Unusable, match=r"reference needs enlarging"):
    _resize(jpeg(0, (100, 100)), jpeg(0, (63, 70)))
  record, _ = _resize(jpeg(0, (63, 70)), max_enlarge=1.1)
  assert (record.target.width, record.target.height) == (64, 64)


@pytest.mark.parametrize(
  "data, kept",
  [
    (jpeg(0, (128, 128)), True),
    (encoded(picture(0, (128, 128)), "PNG"), True),
    (encoded(picture(0, (128, 128), "RGBA"), "PNG"), True),
    (jpeg(0, (128, 130)), False),
    (encoded(picture(0, (128, 128)), "WEBP"), False),
    (encoded(picture(0, (128, 128), "CMYK")), False),
    (encoded(picture(0, (128, 128), "L"), "PNG"), False),
    (encoded(picture(0, (128, 128), "RGBA"), "WEBP"), False),
    (
      encoded(
        picture(0, (128, 128)), "PNG", save_all=True,
        append_images=[picture(1, (128, 128))],
      ),
      False,
    ),
  ],
)  # fmt: skip
def test_an_image_that_fits_keeps_its_bytes(data, kept):
  record, _ = _resize(data)
  assert (record.target.data == data) == kept
  again = Image.open(io.BytesIO(record.target.data))
  assert getattr(again, "n_frames", 1) == 1


def test_a_turned_image_that_fits_is_turned():
  exif = Image.Exif()
  exif[0x0112] = 3
  data = encoded(picture(0, (128, 128)), quality=95, exif=exif)
  record, _ = _resize(data)
  assert record.target.data != data
  image = Image.open(io.BytesIO(record.target.data))
  assert image.getexif().get(0x0112, 1) == 1
  upright = np.asarray(picture(0, (128, 128)).rotate(180)).astype(int)
  assert np.abs(np.asarray(image).astype(int) - upright).mean() < 12


@pytest.mark.parametrize(
  "encoding, source, mode, expected",
  [
    (Encoding("auto", "png", 90), "PNG", "RGB", "PNG"),
    (Encoding("auto", "png", 90), "WEBP", "RGB", "JPEG"),
    (Encoding("jpeg", "png", 90), "PNG", "RGB", "JPEG"),
    (Encoding("webp", "png", 90), "PNG", "RGB", "WEBP"),
    (Encoding("jpeg", "png", 90), "PNG", "RGBA", "PNG"),
    (Encoding("jpeg", "webp", 90), "PNG", "RGBA", "WEBP"),
  ],
)
def test_formats(encoding, source, mode, expected):
  image = picture(0, (150, 150), mode)
  record, _ = _resize(encoded(image, source), encoding=encoding)
  assert _format(record.target) == expected
  assert record.target.mode == mode
  original = decode_image(_record(encoded(image, source)).target)
  pixels = fit(original, Bucket(128, 128), len(mode))
  got = np.asarray(decode_image(record.target)).astype(int)
  visible = got[..., 3] > 0 if mode == "RGBA" else np.ones(got.shape[:2], bool)
  limit = 0 if mode == "RGBA" or expected == "PNG" else 6
  assert np.abs(got - pixels)[visible].mean() <= limit


def test_damage_is_a_reason():
  with pytest.raises(Unusable, match="damaged image"):
    _resize(jpeg(0, (200, 200))[:-3000])
