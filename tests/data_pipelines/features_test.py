# SPDX-License-Identifier: Apache-2.0
"""Feature caches on disk: rows, conditions, damage, resume."""

import dataclasses
import json
import pathlib

import ml_dtypes
import msgpack
import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.errors import InputError
from data_pipelines.features import check, codec, writer
from data_pipelines.features.dataset import (
  SHARED_FILE,
  FeatureDataset,
  read_shared,
)
from data_pipelines.loader.buckets import Bucket, Program
from tests.tiny_cache import (
  COUNT,
  DAMAGED,
  LAST_BY_ONE,
  SHARED,
  description,
  members_of,
  rng_array,
  row,
  write_cache,
  write_shards,
  write_source,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("references", [0, 2])
def test_rows_survive(dtype, references):
  empty = codec.States(rng_array(9, 0, 2, dtype=dtype), 5, "full")
  before = row(3, references, dtype, empty=empty)
  after = codec.decode_row(codec.encode_row(before))
  for field in dataclasses.fields(before):
    a, b = getattr(before, field.name), getattr(after, field.name)
    if field.name == "latents":
      np.testing.assert_array_equal(a, b)
    elif field.name == "references":
      assert len(a) == len(b) == references
      for x, y in zip(a, b):
        np.testing.assert_array_equal(x, y)
    elif field.name == "states":
      for name, x in a.items():
        y = b[name]
        assert (x.skip, x.base, x.rows.dtype) == (y.skip, y.base, y.rows.dtype)
        np.testing.assert_array_equal(x.rows, y.rows)
    else:
      assert a == b


@pytest.mark.parametrize(
  "data", [b"", b"\xff" * 20, msgpack.packb([1]), msgpack.packb({"id": "a"})]
)
def test_foreign_bytes_are_refused(data):
  with pytest.raises(InputError, match="make the cache again"):
    codec.decode_row(data)


def test_a_damaged_record_says_why():
  with pytest.raises(InputError, match=r"^the old reason$"):
    codec.decode_row(codec.encode_damaged("the old reason"))


def test_common_rows_are_equal_to_the_bit():
  a = rng_array(0, 6, 4)
  assert codec.common_rows(a, a) == 6
  assert codec.common_rows(a, a[:3]) == codec.common_rows(a[:3], a) == 3
  assert codec.common_rows(a, a[:0]) == 0
  b = a.copy()
  b[4, 2] = np.nextafter(b[4, 2], 9)
  assert codec.common_rows(a, b) == 4
  zero = np.zeros((2, 2), np.float32)
  assert codec.common_rows(zero, -zero) == 0  # equal numbers, other bits
  found = codec.after(b, a, "shared")
  assert (found.skip, found.base, len(found.rows)) == (4, "shared", 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return write_source(tmp_path_factory.mktemp("source") / "data")


@pytest.fixture(scope="module")
def cache(source, tmp_path_factory):
  return write_cache(source, tmp_path_factory.mktemp("cache") / "cache")


def test_records_keep_their_numbers(source, cache):
  dataset, features = records.open_dataset(source), FeatureDataset(cache)
  assert len(features) == len(dataset) == COUNT
  for program, numbers in members_of(dataset).items():
    for i in numbers.tolist():
      record = dataset[i]
      if record.id == str(DAMAGED):
        with pytest.raises(InputError, match="Unreadable image"):
          features.sample(i, program)
        continue
      sample = features.sample(i, program)
      for name in ("id", "caption", "kind", "task"):
        assert sample[name] == getattr(record, name)
      assert (sample["latents"] == int(record.id)).all()
      assert sample["size"] == program.target
      assert sample["reference_sizes"] == program.references
  other = Program("t2i", Bucket(64, 32), ())
  with pytest.raises(LookupError, match="record 1 in the shapes t2i 64x32;"):
    features.sample(1, other)
  features.close()
  assert features.sample(i, program)["id"] == record.id  # opens it again


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("white", [False, True])
def test_every_condition_is_put_together_again(source, cache, empty, white):
  dataset, features = records.open_dataset(source), FeatureDataset(cache)
  seen = set()
  for program, numbers in members_of(dataset).items():
    i = next(n for n in numbers.tolist() if dataset[n].id != str(DAMAGED))
    record = dataset[i]
    states, references = features.sample(i, program)["condition"](empty, white)
    full = np.concatenate(
      [SHARED.states[:2], rng_array(int(record.id), 3, 2)]
    )  # fmt: skip
    edit = bool(record.references)
    if empty and (white or not edit):
      expected = SHARED.states
    elif empty:
      expected = full[:4] + LAST_BY_ONE
    else:
      expected = full + np.float32(white and edit)
    np.testing.assert_array_equal(states, expected)
    assert [r.max() for r in references] == [
      255 if white else 100 + int(record.id)
    ] * edit
    seen.add(edit)
  assert seen == {False, True}


def test_damaged_folders_are_refused(source, tmp_path):
  path = pathlib.Path(write_cache(source, tmp_path / "cache"))
  shard = records.load_manifest(path)["shards"][0]["path"]
  for name, message in (
    (shard, "holds 0 records, its manifest says"),
    (shard.replace("array_record", "npz"), "Sidecar .* missing or damaged"),
    (SHARED_FILE, "holds 0 records"),
  ):
    moved = tmp_path / "moved"
    (path / name).rename(moved)
    with pytest.raises(InputError, match=message):
      FeatureDataset(path)
    moved.rename(path / name)
  assert len(read_shared(path)) == 1
  manifest = json.loads((path / "manifest.json").read_text())
  manifest["features"]["version"] += 1
  (path / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(InputError, match="has version 2, this code reads 1"):
    FeatureDataset(path)


def test_interrupted_work_is_gone_on_with(source, tmp_path):
  whole = pathlib.Path(write_cache(source, tmp_path / "whole"))
  dataset = records.open_dataset(source)
  members = members_of(dataset)
  programs = sorted(members)
  about = description(dataset, programs)
  out = tmp_path / "broken"
  folder = writer.prepare(str(out), about)
  names = [s["path"] for s in dataset.manifest["shards"]]
  write_shards(dataset, folder, members, programs, names[:1])
  sidecar = (dataset.path / names[1]).with_suffix(".npz")
  with pytest.raises(KeyboardInterrupt):
    with writer.ShardWriter(folder, names[1], sidecar, 1) as shard:
      shard.add(b"half", 0, 0, 0, False)
      raise KeyboardInterrupt
  (folder / "preview.tmp-1").mkdir()  # of a process that was killed
  assert sorted(f.name for f in folder.glob("part*")) == [
    names[0], *(names[0].replace("array_record", e) for e in ("json", "npz")),
  ]  # fmt: skip
  assert [writer.is_finished(folder, n) for n in names] == [True, False, False]
  assert not out.exists() and not writer.is_complete(str(out), about)

  with pytest.raises(InputError, match=r"another cache \(models differs\)"):
    writer.prepare(str(out), description(dataset, programs, models={}))
  assert writer.prepare(str(out), about) == folder
  with records.DatasetWriter(folder / "preview", 1, {}) as preview:
    preview.add(dataset[0])
  writer.write_shared(folder, [codec.encode_shared(SHARED)])
  write_shards(dataset, folder, members, programs, names[1:])
  writer.commit(str(out), names, about)
  assert not folder.exists()

  def files(path):
    return {
      f.relative_to(path): f.read_bytes()
      for f in path.rglob("*")
      if f.suffix in (".array_record", ".json")
    }

  assert files(out) == files(whole)
  assert writer.is_complete(str(out), about)
  with pytest.raises(InputError, match=r"not this cache \(storage differs\)"):
    writer.is_complete(str(out), about | {"storage": "bfloat16"})
  with pytest.raises(InputError, match="not this cache"):
    writer.is_complete(str(source), about)


def test_images_are_in_the_preview(source, cache):
  with pytest.raises(InputError, match="holds no images"):
    records.open_dataset(cache)
  preview = records.open_dataset(check.image_folder(cache))
  assert preview[0] == records.open_dataset(source)[0]
  assert check.image_folder(str(source)) == str(source)
