# SPDX-License-Identifier: Apache-2.0
"""Masks: compact, exact, and true after resizing."""

import json

import msgpack
import numpy as np
import pytest
from pictures import picture
from PIL import Image

from data_pipelines.edit_pairs import masks
from data_pipelines.errors import InputError
from data_pipelines.loader.buckets import Bucket, fit
from data_pipelines.records import Record, encode_png


def blob(rng, height, width):
  """A random ellipse, now and then with noise around it."""
  y, x = np.mgrid[:height, :width]
  cy, cx = rng.uniform((0, 0), (height, width))
  ry, rx = rng.uniform(2, 0.3 * min(height, width), 2)
  inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
  return inside | (rng.random((height, width)) < rng.choice([0, 0.002]))


@pytest.mark.parametrize("seed", range(12))
def test_masks_come_back_from_json_and_msgpack(seed):
  rng = np.random.default_rng(seed)
  height, width = rng.integers(1, 90, 2)
  change = rng.random((height, width)) < rng.choice([0.02, 0.5, 1.0])
  change.flat[int(rng.integers(change.size))] = True
  mask = masks.encode(change, reference=1)
  assert mask["size"] == [width, height] and mask["reference"] == 1
  for plain in (
    json.loads(json.dumps(mask)), msgpack.unpackb(msgpack.packb(mask)),
  ):  # fmt: skip
    np.testing.assert_array_equal(masks.decode(plain), change)


def test_an_object_takes_a_few_bytes_per_row():
  y, x = np.mgrid[:512, :512]
  disc = (y - 200) ** 2 + (x - 300) ** 2 < 150**2
  assert len(msgpack.packb(masks.encode(disc))) < 6 * 300
  assert masks.encode(np.ones((3, 4), bool))["runs"] == [0, 12]


def test_other_scopes_promise_nothing():
  assert masks.decode({"scope": "whole"}) is None
  assert masks.decode({"scope": "redrawn"}) is None
  with pytest.raises(InputError, match="changes nothing"):
    masks.encode(np.zeros((4, 4), bool))


@pytest.mark.parametrize("mask", [
  {}, {"scope": "part"}, {"scope": "other", "size": [2, 2], "runs": [4]},
  {"scope": "part", "size": [2, 2], "runs": [3]},
  {"scope": "part", "size": [2, 2], "runs": [5, -1]},
  {"scope": "part", "size": 4, "runs": [4]},
])  # fmt: skip
def test_bad_masks_are_refused(mask):
  with pytest.raises(InputError, match="build its dataset again"):
    masks.decode(mask)


@pytest.mark.parametrize("seed", range(20))
def test_what_stays_stays_when_images_are_resized(seed):
  """Against the resizing of the pipeline itself, in all modes."""
  rng = np.random.default_rng(seed)
  width, height = (int(v) for v in rng.integers(90, 260, 2))
  modes = [("RGB", "RGB"), ("RGBA", "RGBA"), ("RGB", "RGBA")][seed % 3]
  source = picture(seed, (width, height), modes[0])
  change = blob(rng, height, width)
  change.flat[0] = True
  pixels = np.array(source.convert(modes[1]))
  pixels[change] = rng.integers(0, 256, (int(change.sum()), pixels.shape[2]))
  target = Image.fromarray(pixels)
  bucket = Bucket(*(int(v) for v in rng.integers(40, 200, 2)))
  first, second = (
    Image.fromarray(fit(image, bucket, len(image.mode)))
    for image in (source, target)
  )
  small = masks.fit(change, bucket)
  assert small.shape == tuple(bucket)
  assert not (masks.differing(first, second) & ~small).any()
  # It is no empty promise either.
  if change.mean() < 0.02 and bucket.height > height / 2:
    assert small.mean() < 0.9


def test_a_record_knows_its_mask_at_its_present_size():
  change = np.zeros((80, 100), bool)
  change[20:30, 40:60] = True

  def record(width, height, **provenance):
    image = encode_png(np.zeros((height, width, 3), np.uint8))
    return Record("a", "ti2i", "c", "k", image, (image,), provenance)

  mask = masks.encode(change)
  same = masks.of(record(100, 80, mask=mask))
  np.testing.assert_array_equal(same, change)
  half = masks.of(record(50, 40, mask=mask))
  assert half[10:15, 20:30].all() and half.mean() < 0.25
  assert masks.of(record(50, 40, mask={"scope": "whole"})) is None
  with pytest.raises(InputError, match="no mask"):
    masks.of(record(50, 40))
