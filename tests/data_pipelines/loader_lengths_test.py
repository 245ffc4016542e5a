# SPDX-License-Identifier: Apache-2.0
"""Captions counted once, and batches of captions of one padded length."""

import collections
import dataclasses
import itertools
import os
import pathlib
import threading

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.errors import InputError
from data_pipelines.features.dataset import FeatureDataset
from data_pipelines.loader import lengths as lib
from data_pipelines.loader.config import LoaderConfig, Phase, Resolution
from data_pipelines.loader.loader import Loader
from tests.tiny_cache import BUCKETS, COUNT, DAMAGED, write_cache, write_source

LENGTHS = (4, 8, 12)


def words(caption, references):
  """Stands for a tokenizer: record i has i tokens, an edit one more."""
  return int(caption.removeprefix("caption ")) + references


COUNTER = lib.TokenCounter(words, "words")


@pytest.fixture
def source(tmp_path):
  return write_source(tmp_path / "source")


def expected(i):
  return i + (i % 4 == 0)  # every fourth record is an edit


def counts_of(dataset):
  return [expected(int(dataset[i].id)) for i in range(len(dataset))]


def test_the_first_length_that_holds_a_caption():
  found = lib.padded_lengths(np.arange(12), (2, 4, 8))
  assert found.tolist() == [2, 2, 2, 4, 4, 8, 8, 8, 8, 8, 8, 8]


@pytest.mark.parametrize("threads", [0, 3])
def test_captions_are_counted_once_and_stored(source, threads):
  calls = collections.Counter()
  lock = threading.Lock()

  def count(caption, references):
    with lock:
      calls[caption] += 1
    return words(caption, references)

  counter = lib.TokenCounter(count, "words")
  dataset = records.open_dataset(source)
  found = lib.token_counts(dataset, counter, threads)
  assert found.dtype == np.int32 and found.tolist() == counts_of(dataset)
  assert len(calls) == COUNT and set(calls.values()) == {1}
  again = lib.token_counts(records.open_dataset(source), counter, threads)
  assert again.tolist() == found.tolist() and calls.total() == COUNT
  # Another tokenizer has a file of its own.
  other = lib.TokenCounter(lambda caption, references: 1, "other")
  assert set(lib.token_counts(dataset, other, threads).tolist()) == {1}
  assert len(list(source.glob("caption_tokens-*.npy"))) == 2
  assert not list(source.glob("*.tmp*"))


@pytest.mark.parametrize("damage", ["cut", "other length", "other type"])
def test_a_useless_file_is_counted_anew(source, damage):
  dataset = records.open_dataset(source)
  before = lib.token_counts(dataset, COUNTER, 0)
  (path,) = source.glob("caption_tokens-*.npy")
  good = path.read_bytes()
  if damage == "cut":
    path.write_bytes(good[:-5])
  elif damage == "other length":
    np.save(path, before[:-1])
  else:
    np.save(path, before.astype(float))
  assert lib.token_counts(dataset, COUNTER, 0).tolist() == before.tolist()
  assert path.read_bytes() == good


def test_a_folder_that_cannot_be_written_is_no_obstacle(
  source, monkeypatch, capfd
):
  def refuse(*_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(os, "replace", refuse)
  dataset = records.open_dataset(source)
  found = lib.token_counts(dataset, COUNTER, 0)
  assert found.tolist() == counts_of(dataset)
  assert "Permission denied" in capfd.readouterr().err
  assert not list(source.glob("caption_tokens-*"))


def test_a_record_that_cannot_be_read_counts_nothing(source, monkeypatch):
  dataset = records.open_dataset(source)
  before = counts_of(dataset)
  original = records.Dataset.__getitem__

  def read(self, i):
    if i == 5:
      raise InputError("damaged on disk")
    return original(self, i)

  monkeypatch.setattr(records.Dataset, "__getitem__", read)
  found = lib.token_counts(dataset, COUNTER, 2).tolist()
  assert before[5] and found == [*before[:5], 0, *before[6:]]


def test_progress_is_shown(source, monkeypatch, capfd):
  monkeypatch.setattr(lib, "_REPORT_SECONDS", -1.0)
  monkeypatch.setattr(lib, "_CHUNK", 10)
  lib.token_counts(records.open_dataset(source), COUNTER, 0)
  error = capfd.readouterr().err
  assert f"measured 10 of {COUNT} captions" in error
  assert f"measured {COUNT} of {COUNT} captions" in error


def transform(sample, rng):
  """Record number, a draw, and a text of the padded length."""
  return {
    "id": np.int64(sample["id"]),
    "draw": np.float64(rng.random()),
    "text": np.zeros(sample["text_length"] or 99),
  }


def config_of(path, **changes):
  return dataclasses.replace(
    LoaderConfig(
      (str(path),), {"px32": Resolution(BUCKETS, 4)},
      (Phase(0, {"px32": 1.0}),), text_lengths=LENGTHS, threads=2,
      repeat_small=True,
    ),
    **changes,
  )  # fmt: skip


def take(path, steps=60, counter=COUNTER, **changes):
  loader = Loader(config_of(path, **changes), transform, counter=counter)
  batches = list(itertools.islice(loader.iterate(), steps))
  loader.close()
  return batches, loader


def test_a_batch_holds_captions_of_one_length(source, capfd):
  batches, loader = take(source, 150)
  seen = collections.defaultdict(set)
  for batch in batches:
    seen[batch["text"].shape[1]] |= set(batch["id"].tolist())
  assert {k: min(len(v), 3) for k, v in seen.items()} == dict.fromkeys(
    LENGTHS, 3
  )
  for length, ids in seen.items():
    below = {4: -1, 8: 4, 12: 8}[length]
    for i in ids:
      # The last one takes what is longer as well.
      assert below < expected(i) and (expected(i) <= length or length == 12)
  shapes = {(info.key, info.text_length) for info in loader.programs}
  assert len(shapes) == len(loader.programs)
  assert f"of {len(loader.programs)} programs" in loader.report()
  assert sum(info.count for info in loader.programs) == COUNT
  capfd.readouterr()


def test_one_length_leaves_the_order_as_it_was(source, capfd):
  plain, loader = take(source, text_lengths=())
  assert {batch["text"].shape[1] for batch in plain} == {99}
  assert {info.text_length for info in loader.programs} == {0}
  # Nothing is counted, with or without a counter.
  again, _ = take(source, text_lengths=(), counter=None)
  assert [b["id"].tolist() for b in plain] == [b["id"].tolist() for b in again]
  assert not list(source.glob("caption_tokens-*"))
  capfd.readouterr()


def test_lengths_need_a_counter_and_rise(source):
  with pytest.raises(InputError, match="Nothing here reads captions"):
    take(source, counter=None)
  for bad in ((4, 2), (2, 2), (0, 4)):
    with pytest.raises(InputError, match="give rising numbers of tokens"):
      take(source, text_lengths=bad)


def test_the_fingerprint_covers_what_the_lengths_do(source):
  first = take(source, 0)[1].fingerprint
  assert first == take(source, 0, threads=0)[1].fingerprint
  others = [
    take(source, 0, text_lengths=())[1].fingerprint,
    take(source, 0, text_lengths=(4, 9, 12))[1].fingerprint,
    take(source, 0, counter=lib.TokenCounter(lambda *_: 3, "x"))[1].fingerprint,
  ]
  assert len({first, *others}) == 4


def test_a_feature_cache_draws_the_same_batches(source, tmp_path, capfd):
  folder = pathlib.Path(write_cache(source, tmp_path / "cache"))
  with pytest.raises(InputError, match=r"does not know .*make the cache again"):
    take(folder)
  dataset = records.open_dataset(source)
  counts = lib.count_captions(dataset, COUNTER, 0)
  lib.store_counts(folder, dataset.manifest, COUNTER, counts)
  cached = lib.token_counts(FeatureDataset(folder), COUNTER, 0)
  assert cached.tolist() == counts.tolist()
  images, one = take(source, 100)
  features, other = take(folder, 100)
  for a, b in zip(images, features, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
  assert one.fingerprint == other.fingerprint
  # The damaged image is in the same bucket in both, and replaced alike.
  assert one.corrupt_count == other.corrupt_count == 1
  assert DAMAGED not in np.concatenate([b["id"] for b in features])
  capfd.readouterr()
