# SPDX-License-Identifier: Apache-2.0
"""Whatever the images: only planned shapes come out, every record is counted.

Seeded random datasets with 1-pixel images, ratios of 1:20 and more, images
far larger than any bucket, and up to seven references, against rules written
a second time here, record by record.
"""

import collections
import itertools
import math

import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.loader.config import LoaderConfig, Phase, Resolution
from data_pipelines.loader.loader import Loader
from tests import flat_data

RECORDS, STEPS = 80, 120


def random_size(rng):
  """(width, height), a third of them extreme."""
  kind = rng.integers(6)
  if kind == 0:
    return (1, 1)
  if kind == 1:  # a strip of at least 1:20
    short = int(rng.integers(1, 60))
    long = int(short * rng.uniform(20, 40))
    return (short, long) if rng.random() < 0.5 else (long, short)
  if kind == 2 and rng.random() < 0.1:
    return tuple(rng.integers(1500, 2500, 2).tolist())
  side = np.exp(rng.uniform(np.log(4), np.log(200)))
  ratio = np.exp(rng.normal(0, 0.5))
  return (max(1, round(side * ratio)), max(1, round(side / ratio)))


def random_records(rng):
  records = []
  for _ in range(RECORDS):
    references = rng.integers(0, 8) if rng.random() < 0.3 else 0
    records.append([random_size(rng) for _ in range(1 + references)])
  # One that fits every resolution, so that none is empty.
  return [*records, [(500, 500)]]


def random_config(rng, path):
  resolutions, shares = {}, {}
  for i in range(rng.integers(1, 4)):
    side = (16, 32, 64)[i]
    extra = rng.integers(1, 7, (6, 2)) * side // 4
    buckets = ((side, side), *map(tuple, extra.tolist()))
    resolutions[f"px{side}"] = Resolution(
      tuple(dict.fromkeys(buckets)), int(rng.integers(1, 7))
    )
    shares[f"px{side}"] = float(rng.uniform(0.1, 1))
  first = next(iter(resolutions))
  return LoaderConfig(
    (path,), resolutions, (Phase(0, {first: 1.0}), Phase(17, shares)),
    task_weights={"t2i": 1.0, "ti2i": float(rng.integers(2))},
    channels=int(rng.integers(3, 5)), max_enlarge=float(rng.uniform(1, 2)),
    min_bucket_records=int(rng.integers(1, 3)),
    max_references=int(rng.integers(0, 6)), seed=int(rng.integers(99)),
    threads=int(rng.integers(0, 3)), repeat_small=True,
  )  # fmt: skip


def bucket_of(size, buckets, max_enlarge):
  """The nearest shape by aspect ratio, or None if it enlarges too much."""
  width, height = size

  def distance(bucket):
    return abs(math.log(width / height) - math.log(bucket[1] / bucket[0]))

  def enlarges(bucket):
    return max(bucket[1] / width, bucket[0] / height)

  nearest = min(map(distance, buckets))
  fits = [
    b
    for b in buckets
    if distance(b) < nearest + 1e-9 and enlarges(b) <= max_enlarge
  ]
  return max(fits, key=math.prod, default=None)


def expected(records, config, resolution):
  """Record numbers by (task, shapes), and counts of what is left out."""
  groups, dropped = collections.defaultdict(set), collections.Counter()
  for i, sizes in enumerate(records):
    task = "ti2i" if len(sizes) > 1 else "t2i"
    shapes = [
      bucket_of(size, resolution.buckets, config.max_enlarge) for size in sizes
    ]
    if shapes[0] is None:
      dropped[task, "target"] += 1
    elif len(sizes) - 1 > config.max_references:
      dropped[task, "more than"] += 1
    elif None in shapes:
      dropped[task, "reference"] += 1
    else:
      groups[task, tuple(shapes)].add(i)
  for key in list(groups):
    if not config.task_weights[key[0]]:
      dropped[key[0], "the weight"] += len(groups.pop(key))
    elif len(groups[key]) < config.min_bucket_records:
      dropped[key[0], "fewer than"] += len(groups.pop(key))
  return dict(groups), dropped


def check_plan(loader, records, config):
  """Every record of every resolution is used or dropped, with a reason."""
  plans = {}
  for name, resolution in config.resolutions.items():
    groups, dropped = expected(records, config, resolution)
    plan = loader._plans[name]
    found = {
      (p.task, (p.target, *p.references)): set(members.tolist())
      for p, members in zip(plan.programs, plan.members)
    }
    assert found == groups
    assert sum(map(len, groups.values())) + dropped.total() == len(records)
    reasons = collections.Counter()
    for (task, reason), count in plan.dropped.items():
      (start,) = (s for t, s in dropped if t == task and reason.startswith(s))
      reasons[task, start] += count
    assert reasons == dropped
    plans[name] = groups
  return plans


@pytest.mark.parametrize("seed", range(12))
def test_only_planned_shapes_and_every_record_counted(seed, tmp_path):
  rng = np.random.default_rng(seed)
  records = random_records(rng)
  # Numbering through the shards: one keeps it equal to the order written.
  path = flat_data.write(tmp_path / "data", records, seed=seed)
  config = random_config(rng, path)
  try:
    loader = Loader(config, flat_data.tagged)
  except InputError as error:
    # The small programs were left out, and nothing else was there.
    assert "No record is left" in str(error) and config.min_bucket_records > 1
    return
  plans = check_plan(loader, records, config)
  for batch in itertools.islice(loader.iterate(), STEPS):
    arrays = (batch["image"], *batch["references"])
    shapes = tuple(x.shape[1:3] for x in arrays)
    task = "ti2i" if batch["edit"][0] else "t2i"
    ids = set(batch["id"].tolist())
    sources = [
      name
      for name, groups in plans.items()
      if ids <= groups.get((task, shapes), set())
      and len(batch["id"]) == config.resolutions[name].batch_size
    ]
    assert sources, (task, shapes, ids)
    assert {x.shape[::3] for x in arrays} == {
      (len(batch["id"]), config.channels)
    }
  loader.close()
  assert loader.corrupt_count == 0
