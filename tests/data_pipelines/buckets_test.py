# SPDX-License-Identifier: Apache-2.0
"""Buckets: areas, nearest shape, and pixels against Pillow's own fit."""

import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipelines.errors import InputError
from data_pipelines.loader import buckets as lib
from data_pipelines.loader.buckets import Bucket, Program
from data_pipelines.loader.programs import Part, ProgramInfo, check_sizes
from data_pipelines.loader.report import bucket_report, source_report


@pytest.mark.parametrize("side,step", [(256, 32), (512, 32), (1024, 16)])
def test_made_buckets(side, step):
  made = lib.make_buckets(side, step, 4.0)
  assert Bucket(side, side) in made and list(made) == sorted(made)
  ratios = [b.width / b.height for b in made]
  assert len(set(ratios)) == len(made)
  for bucket, ratio in zip(made, ratios):
    assert bucket.height % step == 0 and bucket.width % step == 0
    assert 1 / 4 <= ratio <= 4
    assert Bucket(bucket.width, bucket.height) in made
    area = bucket.height * bucket.width
    assert abs(area / side**2 - 1) <= step / (2 * side)


def test_known_small_lists():
  assert lib.make_buckets(64, 32, 2) == ((64, 64),)
  assert lib.make_buckets(64, 32, 4) == ((32, 128), (64, 64), (128, 32))
  assert lib.check_buckets([(64, 96)]) == (Bucket(height=64, width=96),)


@pytest.mark.parametrize(
  "call",
  [
    lambda: lib.make_buckets(100, 32, 2),
    lambda: lib.make_buckets(0, 32, 2),
    lambda: lib.make_buckets(64, 32, 0.5),
    lambda: lib.check_buckets([]),
    lambda: lib.check_buckets([(0, 64)]),
    lambda: lib.check_buckets([(64, 64), (64, 64)]),
  ],
)
def test_unusable_buckets(call):
  with pytest.raises(InputError):
    call()


def test_assignment_agrees_with_a_plain_search():
  made = lib.make_buckets(256, 32, 3.0)
  rng = np.random.default_rng(0)
  sizes = rng.integers(40, 900, (2000, 2))
  found = lib.assign_many(sizes, made, 1.25)
  for (width, height), got in zip(sizes.tolist(), found.tolist()):
    distances = [
      abs(math.log(width / height) - math.log(b.width / b.height)) for b in made
    ]
    nearest = made[int(np.argmin(distances))]
    enlarge = max(nearest.width / width, nearest.height / height)
    assert (got >= 0) == (enlarge <= 1.25)
    assert got < 0 or distances[got] == pytest.approx(min(distances))
    assert got == lib.assign(width, height, made, 1.25)


def test_enlargement_limit_is_inclusive():
  square = (Bucket(60, 60),)
  assert lib.assign(40, 40, square, 1.5) == 0
  assert lib.assign(39, 40, square, 1.5) == -1
  assert lib.assign(60, 59, square, 1.0) == -1


def test_equal_ratio_prefers_the_largest_that_fits():
  sizes = (Bucket(64, 64), Bucket(256, 256), Bucket(128, 128))
  assert lib.assign(1000, 1000, sizes, 1.0) == 1
  assert lib.assign(130, 130, sizes, 1.0) == 2
  assert lib.assign(70, 70, sizes, 1.0) == 0
  assert lib.assign(60, 60, sizes, 1.0) == -1


@pytest.mark.parametrize("size", [(64, 64), (200, 100), (90, 301), (33, 40)])
def test_fit_equals_pillow_fit(size):
  pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
  image = Image.fromarray(pixels)
  bucket = Bucket(48, 64)
  wanted = ImageOps.fit(image, (64, 48), Image.Resampling.LANCZOS)
  got = lib.fit(image, bucket, 3)
  assert got.shape == (48, 64, 3) and got.dtype == np.uint8
  assert np.abs(got.astype(int) - np.asarray(wanted)).max() <= 1
  opaque = lib.fit(image, bucket, 4)
  np.testing.assert_array_equal(opaque[..., :3], got)
  assert (opaque[..., 3] == 255).all()


def test_alpha_is_kept_or_composited_over_white():
  # Opaque red beside transparent pixels that hide green.
  image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
  image.paste((255, 0, 0, 255), (0, 0, 30, 64))
  kept = lib.fit(image, Bucket(16, 16), 4).astype(int)
  visible = kept[..., 3] > 16
  assert kept[visible][:, 1].max() <= 8  # no green bleeds into the edge
  # Lanczos rings by a few levels beside the edge.
  assert kept[:, :6, 3].min() >= 250 and kept[:, 10:, 3].max() <= 5
  flat = lib.fit(image, Bucket(16, 16), 3).astype(int)
  assert flat[:, 10:].min() >= 250
  over_white = kept[..., :3] * kept[..., 3:] / 255 + 255 - kept[..., 3:]
  assert np.abs(flat - over_white).max() <= 2


def info(key, count, weight, text_length=0, batch_size=32, parts=None):
  """A program of the resolution `px64`."""
  return ProgramInfo(
    "px64", batch_size, key, text_length, count, weight,
    parts or (Part(count, 1.0),),
  )  # fmt: skip


def test_report_accounts_for_everything():
  square, wide = Bucket(64, 64), Bucket(64, 96)
  programs = [
    info(Program("t2i", square, ()), 70, 0.9),
    info(Program("ti2i", wide, (square, wide)), 10, 0.1),
  ]
  dropped = {("t2i", "target too small"): 15, ("ti2i", "few"): 5}
  text = bucket_report(programs, dropped)
  assert "80 of 100 records in 2 programs" in text
  assert "about 3 steps of 32" in text
  rows = [" ".join(line.split()) for line in text.splitlines()]
  assert "t2i 64x64 - 70 70.00% 90.00%" in rows
  assert "ti2i 64x96 64x64 64x96 10 10.00% 10.00%" in rows
  assert "t2i dropped 15 15.00% target too small" in rows
  assert any(row.startswith("1 programs have fewer") for row in rows)
  assert "text" not in text


def test_report_names_text_lengths_and_folders():
  square = Bucket(64, 64)
  programs = [
    info(Program("t2i", square, ()), 70, 0.5, length,
         parts=(Part(40, 0.8), Part(30, 0.2)))
    for length in (64, 512)
  ]  # fmt: skip
  rows = [" ".join(r.split()) for r in bucket_report(programs, {}).split("\n")]
  assert "target references text records share steps" in rows[1]
  assert "t2i 64x64 - 512 70 50.00% 50.00%" in rows
  assert source_report(programs, ("A", "B")).split("\n") == [
    "       80 records,  80.00% of the rows: A",
    "       60 records,  20.00% of the rows: B",
  ]


def test_buckets_smaller_than_a_batch_are_refused():
  program = Program("t2i", Bucket(64, 64), ())
  edit = Program("ti2i", Bucket(64, 96), (Bucket(64, 64),))
  mixed = (Part(26, 0.8), Part(6, 0.2))  # 25.6 and 6.4 rows of 32
  check_sizes([info(program, 32, 0.5), info(edit, 33, 0.5)])
  check_sizes([info(program, 33, 1, parts=(Part(26, 0.8), Part(7, 0.2)))])
  for bad, message in (
    (info(program, 31, 0.5), r"px64 t2i 64x64: 31 records for 32 of 32 rows"),
    (info(edit, 9, 0.5, 128), r"ti2i 64x96\+64x64, 128 tokens: 9 records"),
    (info(program, 32, 0.5, parts=mixed), "6 records for 6.4 of 32 rows"),
  ):
    with pytest.raises(InputError, match=message) as raised:
      check_sizes([info(program, 99, 0.5), bad])
    assert "99 records" not in str(raised.value)
    for remedy in ("min_bucket_records=32", "batch_size", "repeat_small=True"):
      assert remedy in str(raised.value)
  with pytest.raises(InputError, match="and 3 more"):
    check_sizes([info(program, n, 0.1) for n in range(11)])
