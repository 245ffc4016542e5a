# SPDX-License-Identifier: Apache-2.0
"""A feature cache in the loader: the same batches, or one clear sentence."""

import itertools
import pathlib

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.errors import InputError
from data_pipelines.features import check
from data_pipelines.loader.config import LoaderConfig, Phase, Resolution
from data_pipelines.loader.loader import Loader
from tests.tiny_cache import (
  BUCKETS,
  DAMAGED,
  MODELS,
  write_cache,
  write_source,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return write_source(tmp_path_factory.mktemp("source") / "data")


@pytest.fixture(scope="module")
def cache(source, tmp_path_factory):
  return write_cache(source, tmp_path_factory.mktemp("cache") / "cache")


def tagged(sample, rng):
  """Record number, size and a draw, from pixels or from features."""
  image = sample.get("image")
  size = image.shape[:2] if image is not None else sample["size"]
  return {
    "id": np.int64(sample["id"]),
    "size": np.asarray(size),
    "draw": np.float64(rng.random()),
  }


def take(path, steps=40, buckets=BUCKETS, **changes):
  config = LoaderConfig(
    (path,), {"px32": Resolution(buckets, 4)}, (Phase(0, {"px32": 1.0}),),
    threads=2, repeat_small=True, **changes,
  )  # fmt: skip
  loader = Loader(config, tagged)
  batches = list(itertools.islice(loader.iterate(), steps))
  loader.close()
  return batches, loader


def same(first, second):
  for a, b in zip(first, second, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_the_loader_draws_the_same_batches(source, cache, tmp_path, capfd):
  images, one = take(str(source))
  listed = tmp_path / "quarantine.jsonl"
  features, other = take(cache, quarantine_path=str(listed))
  same(images, features)
  assert one.fingerprint == other.fingerprint
  # The record that was damaged as an image is replaced in both.
  assert one.corrupt_count == other.corrupt_count == 1
  assert DAMAGED not in np.concatenate([b["id"] for b in features])
  assert "Unreadable image" in listed.read_text()
  capfd.readouterr()


def test_rows_damaged_on_disk_are_replaced(source, tmp_path, capfd):
  path = write_cache(source, tmp_path / "cache")
  before, _ = take(path)
  victim = np.full((4, 3), 11, np.float32).tobytes()
  for shard in records.load_manifest(path)["shards"]:
    file = pathlib.Path(path, shard["path"])
    data = bytearray(file.read_bytes())
    at = data.find(victim)
    if at >= 0:
      data[at + 3] ^= 1
      file.write_bytes(data)
  after, loader = take(path)
  assert loader.corrupt_count == 2
  changed = 0
  for a, b in zip(before, after):
    for x, y in zip(a["id"].tolist(), b["id"].tolist()):
      assert x == y or x == 11
      changed += x == 11
  assert changed and "damaged on disk" in capfd.readouterr().err


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"buckets": BUCKETS[:1]}, "was made for the buckets"),
    ({"buckets": BUCKETS[::-1]}, "was made for the buckets"),
    ({"max_enlarge": 1.4}, "max_enlarge 1.5, not 1.4"),
    ({"max_references": 5}, "max_references 4, less than 5"),
    ({"channels": 3}, "channels 4, not 3"),
  ],
)
def test_other_shapes_are_refused(cache, changes, message):
  with pytest.raises(InputError, match=message):
    take(cache, **changes)


def test_a_part_of_the_records_is_fine(source, cache):
  changes = {"max_references": 0}
  same(take(str(source), **changes)[0], take(cache, **changes)[0])


def models_are(paths, models=MODELS, caption=0.1, reference=0.1):
  check.check_models(
    paths, models and (lambda: models), caption, reference
  )  # fmt: skip


def test_runs_are_checked(source, cache, tmp_path):
  models_are([cache])
  models_are([str(source)], models=None)
  for arguments, message in (
    (([cache, str(source)],), "use folders of one kind"),
    (([cache], None), "this objective needs pixels"),
    (([cache], MODELS | {"vae": "x"}), r"another vae \(abc there, x here\)"),
    (([cache], MODELS | {"new": 1}), "another new"),
  ):
    with pytest.raises(InputError, match=message):
      models_are(*arguments)
  poor = write_cache(
    source, tmp_path / "poor", empty_captions=False, white_references=False
  )
  models_are([poor], caption=0.0, reference=0.0)
  with pytest.raises(InputError, match="holds no empty captions"):
    models_are([cache, poor], reference=0.0)
  with pytest.raises(InputError, match="holds no white references"):
    models_are([poor], caption=0.0)
