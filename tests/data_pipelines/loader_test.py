# SPDX-License-Identifier: Apache-2.0
"""The loader's promises: fixed shapes, exact resume, equal global batches."""

import collections
import dataclasses
import itertools
import json
import pathlib
import threading

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.errors import InputError
from data_pipelines.loader.config import LoaderConfig, Phase, Resolution
from data_pipelines.loader.loader import Loader
from data_pipelines.loader.rows import Passes
from tests import flat_data
from tests.flat_data import assert_equal, tagged

BUCKETS = ((32, 32), (32, 48), (48, 32))
COUNT = 10_000


def _write(path, count, seed, low=8, high=90, edits=0.2, draw=flat_data.flat):
  sizes = flat_data.random_sizes(count, seed, low, high, edits)
  return flat_data.write(path, sizes, draw, seed, shards=3)


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
  """Random sizes and ratios, many too small for any bucket."""
  return _write(tmp_path_factory.mktemp("wild") / "data", COUNT, 0)


@pytest.fixture(scope="module")
def tame(tmp_path_factory):
  """Every record is usable."""
  return _write(tmp_path_factory.mktemp("tame") / "data", 300, 1, low=48)


def _config(path, buckets=BUCKETS, batch_size=8, **changes):
  """One resolution, named `all`."""
  resolutions = {"all": Resolution(buckets, batch_size)}
  always = (Phase(0, {"all": 1.0}),)
  config = LoaderConfig(
    (path,), resolutions, always, threads=2, repeat_small=True
  )
  return dataclasses.replace(config, **changes)


def _take(config, steps, start=0, transform=tagged, **hosts):
  loader = Loader(config, transform, **hosts)
  batches = list(itertools.islice(loader.iterate(start), steps))
  loader.close()
  return batches


def _shape(batch):
  sizes = [x.shape[1:3] for x in (batch["image"], *batch["references"])]
  return bool(batch["edit"][0]), tuple(sizes)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_every_pass_is_complete_and_differs(count):
  order = Passes(count, seed=5)
  rows = [order[i] for i in range(20 * count)]
  passes = [tuple(rows[i : i + count]) for i in range(0, len(rows), count)]
  assert all(sorted(p) == list(range(count)) for p in passes)
  assert len(set(passes)) == {1: 1, 2: 2, 50: 20}[count]


def test_only_bucket_shapes_and_bounded_enlargement(wild):
  config = _config(wild, batch_size=50, max_references=2)
  loader = Loader(config, tagged)
  index = loader._datasets[0].index
  sizes = {}
  for i in range(COUNT):
    own = ((int(index.width[i]), int(index.height[i])),)
    sizes[int(loader._datasets[0][i].id)] = own + index.reference_sizes(i)
  allowed = {
    (info.key.task == "ti2i", (info.key.target, *info.key.references))
    for info in loader.programs
  }
  seen = set()
  for batch in itertools.islice(loader.iterate(), 110):
    edit, shapes = _shape(batch)
    assert (edit, shapes) in allowed
    assert set(shapes) <= set(BUCKETS)
    assert len(shapes) - 1 <= 2 and edit == (len(shapes) > 1)
    for array in (batch["image"], *batch["references"]):
      assert array.dtype == np.uint8 and array.shape[::3] == (50, 4)
    for name in batch["id"].tolist():
      assert len(sizes[name]) == len(shapes)
      for (width, height), (bucket_height, bucket_width) in zip(
        sizes[name], shapes
      ):
        assert bucket_width <= 1.5 * width and bucket_height <= 1.5 * height
      seen.add(name)
  loader.close()
  assert len(seen) > 2500 and loader.corrupt_count == 0


def test_counts_add_up(wild):
  loader = Loader(_config(wild, max_references=2, min_bucket_records=20))
  kept = sum(info.count for info in loader.programs)
  dropped = loader._plans["all"].dropped
  assert kept + sum(dropped.values()) == COUNT
  assert min(info.count for info in loader.programs) >= 20
  assert sum(info.weight for info in loader.programs) == pytest.approx(1)
  text = loader.report()
  for part in ("enlarging over 1.5x", "more than 2 ref", "fewer than 20"):
    assert part in text
  assert f"{kept} of {COUNT}" in text


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_global_batch(tame, hosts):
  config = _config(tame)
  whole = _take(config, 60)
  parts = [
    _take(config, 60, host_index=h, host_count=hosts) for h in range(hosts)
  ]
  for step, batch in enumerate(whole):
    rows = [part[step] for part in parts]
    assert len({_shape(r) for r in rows}) == 1
    assert_equal(flat_data.joined(rows), batch)


def test_hosts_are_disjoint(tmp_path):
  # Within an epoch no record may go to two hosts.
  path = _write(tmp_path / "data", 800, 2, low=48, edits=0)
  config = _config(path, buckets=((32, 32),))
  ids = [
    {
      i
      for batch in _take(config, 100, host_index=h, host_count=2)
      for i in batch["id"].tolist()
    }
    for h in range(2)
  ]
  # 100 steps of 8 are one pass over the 800 records and one whole window.
  assert not ids[0] & ids[1]
  assert len(ids[0] | ids[1]) == 800


def test_resume_with_other_threads_equals_the_stream(tame):
  stream = _take(_config(tame), 150)
  for start, threads in ((0, 0), (1, 1), (37, 4), (130, 3)):
    resumed = _take(_config(tame, threads=threads), 20, start)
    for offset, batch in enumerate(resumed):
      assert_equal(batch, stream[start + offset])
  draws = np.concatenate([batch["draw"] for batch in stream])
  assert len(set(draws.tolist())) == len(draws)


def test_closing_leaves_no_thread(tame):
  loader = Loader(_config(tame, threads=3), tagged)
  next(loader.iterate())
  own = [t for t in threading.enumerate() if t.name.startswith("loader")]
  loader.close()
  assert own and not any(thread.is_alive() for thread in own)


def test_seed_changes_the_order(tame):
  first = _take(_config(tame), 5)
  second = _take(_config(tame, seed=1), 5)
  assert any(
    a["id"].tolist() != b["id"].tolist() for a, b in zip(first, second)
  )


def test_mixture_holds(tame):
  for weights, share in (
    ({"t2i": 0.9, "ti2i": 0.1}, 0.1),
    ({"t2i": 7, "ti2i": 3}, 0.3),
  ):
    config = _config(tame, batch_size=1, task_weights=weights)
    edits = [bool(b["edit"][0]) for b in _take(config, 1000)]
    assert abs(np.mean(edits) - share) < 0.02
    # Not in lockstep: the gaps between edits vary.
    assert len(set(np.diff(np.flatnonzero(edits)).tolist())) > 3


def test_zero_weight_and_absent_tasks(tame, tmp_path):
  loader = Loader(_config(tame, task_weights={"t2i": 1, "ti2i": 0}))
  assert {info.key.task for info in loader.programs} == {"t2i"}
  assert "weight of this task is 0" in loader.report()
  path = _write(tmp_path / "data", 20, 0, low=48, edits=0)
  loader = Loader(_config(path))  # the default weights name ti2i as well
  assert sum(info.weight for info in loader.programs) == pytest.approx(1)


def _damage(path, name):
  """Flips a byte inside the target image of one record."""
  dataset = records.open_dataset(path)
  found = (dataset[i] for i in range(len(dataset)))
  image = next(r.target.data for r in found if r.id == str(name))
  for shard in records.read_manifest(path)["shards"]:
    file = f"{path}/{shard['path']}"
    data = bytearray(pathlib.Path(file).read_bytes())
    at = data.find(image[len(image) // 2 :][:16])
    if at >= 0:
      data[at] ^= 1
      pathlib.Path(file).write_bytes(data)
      return
  raise AssertionError(f"no record {name}")


def test_damaged_record_is_replaced_and_listed(tmp_path, capfd):
  path = _write(tmp_path / "data", 40, 3, low=48, edits=0, draw=flat_data.noise)
  listed = tmp_path / "quarantine.jsonl"
  config = _config(path, quarantine_path=str(listed))
  before = _take(config, 60)
  _damage(path, 17)
  loader = Loader(config, tagged)
  after = list(itertools.islice(loader.iterate(), 60))
  replaced = collections.Counter()
  for old, new in zip(before, after):
    for a, b in zip(old["id"].tolist(), new["id"].tolist()):
      assert a == b or a == 17
      replaced[b] += a == 17
  assert 17 not in +replaced and len(+replaced) == 1  # always the same one
  assert loader.corrupt_count == 1
  # Two threads may meet it at the same time.
  loader._note_corrupt(next(iter(loader._corrupt)), "again", "again")
  (row,) = map(json.loads, listed.read_text().splitlines())
  assert row["where"] == "loader" and "damaged on disk" in row["reason"]
  assert capfd.readouterr().err.count("Replaced damaged record") == 1
  for a, b in zip(after, _take(_config(path, threads=1), 60)):
    assert_equal(a, b)  # replacement depends on nothing but the data


def test_image_of_another_size_counts_as_damaged(tmp_path):
  good = flat_data.flat(np.random.default_rng(0), 60, 60)
  lying = dataclasses.replace(good, width=61)
  with records.DatasetWriter(tmp_path / "data", 1, {}) as writer:
    for i, image in enumerate([good, lying]):
      writer.add(records.Record(str(i), "t2i", "c", "k", image, (), {}))
  loader = Loader(_config(str(tmp_path / "data")), tagged)
  assert set(next(loader.iterate())["id"].tolist()) == {0}
  assert loader.corrupt_count == 1


def test_all_damaged_is_an_error(tmp_path):
  lying = dataclasses.replace(
    flat_data.flat(np.random.default_rng(0), 60, 60), width=61
  )
  with records.DatasetWriter(tmp_path / "data", 1, {}) as writer:
    writer.add(records.Record("0", "t2i", "c", "k", lying, (), {}))
  loader = Loader(_config(str(tmp_path / "data")))
  with pytest.raises(InputError, match="All 1 records"):
    next(loader.iterate())


@pytest.mark.parametrize(
  "transform",
  [
    lambda sample, rng: {"text": sample["caption"]},
    lambda sample, rng: None,
    lambda sample, rng: {"x": np.zeros(int(sample["id"]) % 3)},
  ],
)
def test_transform_must_keep_shapes(tame, transform):
  with pytest.raises(InputError, match=r"^The transform"):
    _take(_config(tame), 5, transform=transform)


def test_fingerprint(tame, wild):
  first = Loader(_config(tame)).fingerprint
  assert first == Loader(_config(tame, threads=7)).fingerprint
  assert first == Loader(_config(tame), host_index=1, host_count=2).fingerprint
  others = [
    _config(tame, seed=1),
    _config(tame, batch_size=16),
    _config(tame, buckets=BUCKETS[:2]),
    _config(tame, task_weights={"t2i": 1.0}),
    _config(wild),
  ]
  prints = {Loader(config).fingerprint for config in others}
  assert len(prints | {first}) == len(others) + 1


@pytest.mark.parametrize(
  "changes,hosts,message",
  [
    ({"batch_size": 9}, 2, "Batch size 9 .* 2 hosts"),
    ({"batch_size": 0}, 1, "Batch size 0"),
    ({"paths": ()}, 1, "no dataset"),
    ({"channels": 1}, 1, "channels"),
    ({"task_weights": {"edit": 1}}, 1, "'edit'"),
    ({"task_weights": {"t2i": 0}}, 1, "No record is left"),
    ({"buckets": ((4096, 4096),)}, 1, "No record is left .*enlarging"),
    ({"buckets": ()}, 1, "at least one"),
  ],
)
def test_unusable_configs(tame, changes, hosts, message):
  with pytest.raises(InputError, match=message):
    Loader(_config(tame, **changes), host_count=hosts)


def test_several_datasets_and_three_channels(tame, tmp_path):
  other = _write(tmp_path / "more", 50, 9, low=48, edits=0)
  both = Loader(_config(tame, paths=(tame, other), channels=3))
  one = Loader(_config(tame))
  total = [sum(i.count for i in loader.programs) for loader in (both, one)]
  assert total == [350, 300]
  batch = next(both.iterate())
  assert batch["image"].shape[3] == 3
