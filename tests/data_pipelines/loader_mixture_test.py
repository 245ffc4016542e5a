# SPDX-License-Identifier: Apache-2.0
"""Shares of tasks and of dataset folders, and that hosts and resumes agree."""

import collections
import itertools

import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.loader.config import LoaderConfig, Phase, Resolution
from data_pipelines.loader.lengths import TokenCounter
from data_pipelines.loader.loader import Loader
from data_pipelines.loader.mixture import Mixture
from data_pipelines.loader.programs import Part
from tests import flat_data
from tests.flat_data import assert_equal, tagged

STEPS = 10_000
BUCKETS = ((32, 32), (32, 48), (48, 32))
COUNTS = (600, 250, 400)
# Captions are "caption 0" to "caption 599": by the last digit, short or long.
COUNTER = TokenCounter(
  lambda caption, references: 9 if caption[-1] in "012" else 3, "last digit"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Three folders of very different sizes, edits in two of them."""
  folder = tmp_path_factory.mktemp("folders")
  return tuple(
    flat_data.write(
      folder / name, flat_data.random_sizes(count, seed, 48, 90, edits),
      seed=seed, shards=2,
    )
    for name, count, seed, edits in zip("abc", COUNTS, (1, 2, 3), (0.4, 0.3, 0))
  )  # fmt: skip


def config_of(paths, batch_size=10, **changes):
  fields = {"threads": 2, "repeat_small": True, "max_references": 1} | changes
  return LoaderConfig(
    paths, {"all": Resolution(BUCKETS, batch_size)},
    (Phase(0, {"all": 1.0}),), **fields,
  )  # fmt: skip


def counted(loader, steps=STEPS):
  """Share of the steps by task; of the rows of each task by folder."""
  tasks, rows = collections.Counter(), collections.defaultdict(list)
  for step in range(steps):
    info, numbers = loader.peek(step)
    tasks[info.key.task] += 1
    rows[info.key.task].append(numbers)
  ends = np.cumsum(COUNTS)
  folders = {
    task: np.bincount(np.searchsorted(ends, np.concatenate(own), "right"))
    for task, own in rows.items()
  }
  return (
    {task: count / steps for task, count in tasks.items()},
    {task: count / count.sum() for task, count in folders.items()},
  )


@pytest.mark.parametrize("task_weights", [(0.9, 0.1), (7, 3)])
def test_shares_of_tasks_and_of_three_folders(folders, task_weights):
  weights = dict(zip(("t2i", "ti2i"), task_weights))
  # Two folders of photographs and one of renderings, 7:3.
  loader = Loader(
    config_of(
      folders, weights=(5, 2, 3), task_weights=weights, text_lengths=(4, 16)
    ),
    counter=COUNTER,
  )  # fmt: skip
  assert len(loader.programs) == 2 * (3 + 9)
  tasks, found = counted(loader)
  for task, weight in weights.items():
    share = weight / sum(task_weights)
    assert tasks[task] == pytest.approx(share, rel=0.01)
  np.testing.assert_allclose(found["t2i"], [0.5, 0.2, 0.3], rtol=0.01)
  # No edits in the third: the others share them, 5:2.
  np.testing.assert_allclose(found["ti2i"], [5 / 7, 2 / 7], rtol=0.01)
  text = loader.report()
  assert "each of 24 programs is compiled" in text
  for path in folders:
    assert f"of the rows: {path}" in text


def test_without_weights_every_record_counts_alike(folders):
  loader = Loader(config_of(folders, task_weights={"t2i": 1, "ti2i": 0}))
  _, found = counted(loader)
  edits = [len(loader._datasets[i].index.references.nonzero()[0])
           for i in range(3)]  # fmt: skip
  count = np.subtract(COUNTS, edits)
  np.testing.assert_allclose(found["t2i"], count / count.sum(), rtol=0.02)


def test_folders_are_mixed_within_batches(folders):
  loader = Loader(config_of(folders, 20, weights=(5, 2, 3)))
  ends, seen = np.cumsum(COUNTS), set()
  for step in range(100):
    info, numbers = loader.peek(step)
    if info.key.task == "t2i":
      which = np.searchsorted(ends, numbers, "right")
      assert len(set(which.tolist())) == 3
      seen.add(tuple(which.tolist()))
  assert len(seen) > 50  # in another order each time


def test_parts_are_read_in_passes_of_their_own():
  parts = (Part(30, 0.3), Part(0, 0.0), Part(7, 0.7))
  rows = Mixture(parts, (1, 2, 3), 4)
  taken = np.array([rows[i] for i in range(1000)])
  for low, high, count in ((0, 30, 300), (30, 37, 700)):
    own = taken[(low <= taken) & (taken < high)]
    assert len(own) == count
    for first in range(0, count, high - low):
      one = own[first : first + high - low].tolist()
      assert sorted(one) == list(range(low, high))
  assert (taken[:100] < 30).sum() == 30


def transform(sample, rng):
  """Makes an array of the text's padded length."""
  return tagged(sample, rng) | {
    "text": np.full(sample["text_length"], len(sample["caption"]))
  }


def take(config, steps, start=0, **hosts):
  loader = Loader(config, transform, counter=COUNTER, **hosts)
  batches = list(itertools.islice(loader.iterate(start), steps))
  fingerprint = loader.fingerprint
  loader.close()
  return batches, fingerprint


def full(folders, **changes):
  """Everything at once."""
  return config_of(folders, 8, weights=(5, 2, 3), text_lengths=(4, 16),
                   **changes)  # fmt: skip


def test_other_threads_and_hosts_resume_the_same_stream(folders):
  stream, fingerprint = take(full(folders), 60)
  for start, threads, hosts in ((0, 0, 2), (17, 4, 4), (41, 1, 2)):
    parts = []
    for host in range(hosts):
      own, other = take(
        full(folders, threads=threads), 15, start,
        host_index=host, host_count=hosts,
      )  # fmt: skip
      assert other == fingerprint
      parts.append(own)
    for step, rows in enumerate(zip(*parts)):
      # One program, whatever the host: every shape is the same.
      shapes = {
        tuple(x.shape for x in (r["image"], *r["references"], r["text"]))
        for r in rows
      }
      assert len(shapes) == 1
      assert_equal(flat_data.joined(rows), stream[start + step])


def test_peek_tells_what_a_batch_holds(folders):
  loader = Loader(full(folders), transform, counter=COUNTER)
  names = np.concatenate(
    [[int(d[i].id) for i in range(len(d))] for d in loader._datasets]
  )
  for step, batch in enumerate(itertools.islice(loader.iterate(), 40)):
    info, numbers = loader.peek(step)
    assert names[numbers].tolist() == batch["id"].tolist()
    assert batch["text"].shape == (8, info.text_length)
    assert batch["image"].shape[1:3] == info.key.target
  loader.close()


def test_within_a_pass_hosts_read_disjoint_records(tmp_path):
  paths = tuple(
    flat_data.write(tmp_path / name, [[(40, 40)]] * 400) for name in "ab"
  )
  config = config_of(paths, 8, weights=(1, 1))
  hosts = [Loader(config, host_index=h, host_count=2) for h in range(2)]
  seen = [set(), set()]
  for step in range(100):  # one pass over 800 records, one whole window
    (info, numbers), other = (loader.peek(step) for loader in hosts)
    assert other[0] == info and other[1].tolist() == numbers.tolist()
    for host, own in enumerate(np.split(numbers, 2)):
      seen[host] |= set(own.tolist())
  assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 800


def test_weights_are_part_of_the_fingerprint(folders):
  configs = [
    config_of(folders),
    config_of(folders, weights=(5, 2, 3)),
    config_of(folders, weights=(5, 2, 4)),
    full(folders, threads=0),
    config_of(folders, 8, weights=(5, 2, 3), text_lengths=(2, 16)),
  ]
  loaders = [Loader(config, counter=COUNTER) for config in configs]
  assert len({loader.fingerprint for loader in loaders}) == len(configs)
  strict = config_of(folders, repeat_small=False, min_bucket_records=20)
  loose = config_of(folders, repeat_small=True, min_bucket_records=20)
  assert Loader(strict).fingerprint == Loader(loose).fingerprint


@pytest.mark.parametrize(
  "weights, message",
  [
    ((1, 2), "2 weights for 3 dataset folders"),
    ((1, 0, 2), r"Weight 0 of dataset .*b is unusable"),
    ((1, 2, float("inf")), r"Weight inf of dataset .*c is unusable"),
    ((-1, 2, 2), r"Weight -1 of dataset .*a is unusable"),
  ],
)
def test_unusable_weights(folders, weights, message):
  with pytest.raises(InputError, match=message):
    Loader(config_of(folders, weights=weights))


def test_small_buckets_and_small_folders_are_refused(folders):
  with pytest.raises(InputError, match=r"all ti2i .* records for 64 of"):
    Loader(config_of(folders, 64, repeat_small=False))
  # Enough records in the bucket, but not in the folder that must fill it.
  small = config_of(folders, 64, repeat_small=False, min_bucket_records=64)
  Loader(small)
  heavy = {"weights": (1, 500, 1), "repeat_small": False}
  with pytest.raises(InputError, match="weigh a small folder less"):
    Loader(config_of(folders, 64, min_bucket_records=64, **heavy))
