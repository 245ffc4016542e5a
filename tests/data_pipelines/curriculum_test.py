# SPDX-License-Identifier: Apache-2.0
"""Steps -> resolutions, and the loader across the phases of a schedule."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.loader.config import (
  LoaderConfig,
  Phase,
  Resolution,
  check_schedule,
)
from data_pipelines.loader.curriculum import (
  WINDOW,
  Curriculum,
  leading,
  schedule_report,
)
from data_pipelines.loader.loader import Loader
from tests import flat_data
from tests.flat_data import assert_equal, tagged

NAMES = ("low", "mid", "high")
RESOLUTIONS = {
  "low": Resolution(((16, 16), (16, 32)), 8),
  "high": Resolution(((48, 48), (32, 64)), 4),
}
# Borders on no multiple of the window; 40 steps hold all three phases.
SCHEDULE = (
  Phase(0, {"low": 1.0}),
  Phase(7, {"low": 0.5, "high": 0.5}),
  Phase(23, {"low": 1, "high": 3}),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Large records fit both resolutions, small ones `low` alone."""
  small = flat_data.random_sizes(60, 0, low=16, high=20)
  large = flat_data.random_sizes(140, 1, low=64, high=90)
  path = tmp_path_factory.mktemp("flat") / "data"
  return flat_data.write(path, small + large)


def config_of(path, **changes):
  config = LoaderConfig((path,), RESOLUTIONS, SCHEDULE, threads=2)
  return dataclasses.replace(config, **changes)


def take(config, steps, start=0, **hosts):
  loader = Loader(config, tagged, **hosts)
  batches = list(itertools.islice(loader.iterate(start), steps))
  loader.close()
  return batches


def random_schedule(rng):
  starts = np.sort(rng.choice(np.arange(1, 2000), rng.integers(0, 4), False))
  phases = []
  for start in (0, *starts.tolist()):
    shares = rng.random(3) * (rng.random(3) < 0.7)
    shares[rng.integers(3)] += 0.01
    phases.append(Phase(start, dict(zip(NAMES, shares.tolist()))))
  return tuple(phases)


@pytest.mark.parametrize("seed", range(20))
def test_every_resolution_is_read_without_a_gap(seed):
  schedule = random_schedule(np.random.default_rng(seed))
  found = Curriculum(schedule, NAMES, seed)
  steps = [found[step] for step in range(3000)]
  for i in range(3):
    own = [ordinal for which, ordinal in steps if which == i]
    assert own == list(range(len(own)))
  again = Curriculum(schedule, NAMES, seed)
  order = np.random.default_rng(seed).permutation(3000).tolist()
  assert [again[step] for step in order] == [steps[step] for step in order]


@pytest.mark.parametrize("seed", range(20))
def test_shares_hold_in_every_window_and_over_a_phase(seed):
  schedule = random_schedule(np.random.default_rng(seed))
  found = Curriculum(schedule, NAMES, 0)
  ends = [phase.start for phase in schedule[1:]]
  ends.append(schedule[-1].start + 20 * WINDOW)  # no window is cut
  for phase, end in zip(schedule, ends):
    shares = np.array([phase.shares[name] for name in NAMES])
    shares /= shares.sum()
    which = np.array([found[step][0] for step in range(phase.start, end)])
    for first in range(0, len(which), WINDOW):
      window = which[first : first + WINDOW]
      counts = np.bincount(window, minlength=3)
      assert np.abs(counts - len(window) * shares).max() <= 2
      so_far = np.bincount(which[: first + WINDOW], minlength=3)
      assert np.abs(so_far - so_far.sum() * shares).max() <= 1.01
    assert set(which[shares[which] == 0]) == set()


def test_the_order_within_a_window_is_mixed_and_seeded():
  schedule = (Phase(0, {"low": 1, "high": 1}),)
  runs = [
    [Curriculum(schedule, ("low", "high"), seed)[k][0] for k in range(300)]
    for seed in (0, 1)
  ]
  assert runs[0] != runs[1] and runs[0][:100] != runs[0][100:200]
  # Not in turn: the gaps between steps of one resolution vary.
  assert len(set(np.diff(np.flatnonzero(runs[0])).tolist())) > 3


def test_a_tiny_share_is_not_lost_and_far_steps_are_exact():
  found = Curriculum(
    (Phase(0, {"low": 1.0, "high": 1e-9}),), ("low", "high"), 0
  )
  seen = [found[2_000_000 * i + j] for i in (1, 2) for j in range(100)]
  assert {which for which, _ in seen} <= {0, 1}
  done = [found[10**9 + j] for j in range(2000)]
  # A millionth is the smallest share: about 1,000 of a billion steps.
  lows = [ordinal for which, ordinal in done if which == 0]
  assert 10**9 - 1001 <= lows[0] <= 10**9 - 999
  assert lows == list(range(lows[0], lows[0] + len(lows)))


def test_the_leading_resolution_and_the_report():
  assert [leading(SCHEDULE, step) for step in (0, 6, 7, 22, 23, 10**6)] == [
    "low", "low", "high", "high", "high", "high"
  ]  # fmt: skip
  text = schedule_report(SCHEDULE)
  assert "step         7: low 50.00%, high 50.00%" in text
  assert text.splitlines()[2].endswith("low 25.00%, high 75.00%")


def test_every_step_has_the_shapes_and_size_of_its_resolution(data):
  loader = Loader(config_of(data), tagged)
  batches = list(itertools.islice(loader.iterate(), 223))
  loader.close()
  names = []
  for batch in batches:
    arrays = (batch["image"], *batch["references"])
    (name,) = {
      name
      for name, resolution in RESOLUTIONS.items()
      if all(x.shape[1:3] in resolution.buckets for x in arrays)
    }
    assert {len(x) for x in arrays} == {RESOLUTIONS[name].batch_size}
    names.append(name)
  assert set(names[:7]) == {"low"}
  assert collections.Counter(names[7:23]) == {"low": 8, "high": 8}
  for window in (names[23:123], names[123:223]):
    assert collections.Counter(window) == {"low": 25, "high": 75}
  # Small records are used where they are large enough, and only there.
  seen = collections.defaultdict(set)
  for name, batch in zip(names, batches):
    seen[name] |= set(batch["id"].tolist())
  assert seen["low"] & set(range(60)) and not seen["high"] & set(range(60))
  assert seen["low"] & set(range(60, 200)) and seen["high"]


def test_a_pass_goes_on_over_a_border(tmp_path):
  # One program per resolution, 20 records, batches of 4: five steps a pass.
  path = flat_data.write(tmp_path / "data", [[(64, 64)]] * 20)
  resolutions = {
    "low": Resolution(((16, 16),), 4),
    "high": Resolution(((48, 48),), 4),
  }
  schedule = (
    Phase(0, {"low": 1}), Phase(33, {"high": 1}), Phase(50, {"low": 1}),
  )  # fmt: skip
  batches = take(
    config_of(path, resolutions=resolutions, schedule=schedule), 117
  )
  low = [b["id"] for b in batches if b["image"].shape[1] == 16]
  assert len(low) == 33 + 67
  # The window shuffle mixes whole windows of 100 steps, that is 20 passes.
  assert collections.Counter(np.concatenate(low).tolist()) == dict.fromkeys(
    range(20), 20
  )


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_global_batch_in_every_phase(data, hosts):
  whole = take(config_of(data), 40)
  parts = [
    take(config_of(data), 40, host_index=h, host_count=hosts)
    for h in range(hosts)
  ]
  for step, batch in enumerate(whole):
    rows = [part[step] for part in parts]
    assert_equal(flat_data.joined(rows), batch)


def test_resuming_before_at_and_after_a_border_equals_the_stream(data):
  stream = take(config_of(data), 40)
  assert len({len(batch["id"]) for batch in stream}) == 2
  for start, threads in ((6, 0), (7, 4), (8, 1), (22, 2), (23, 3), (30, 0)):
    resumed = take(config_of(data, threads=threads), 9, start)
    for offset, batch in enumerate(resumed):
      assert_equal(batch, stream[start + offset])


def test_resolutions_do_not_read_in_the_same_order(tmp_path):
  path = flat_data.write(tmp_path / "data", [[(16, 16)]] * 400)
  resolutions = {
    name: Resolution(((16, 16),), size) for name, size in (("a", 4), ("b", 8))
  }
  schedule = (Phase(0, {"a": 1, "b": 1}),)
  batches = [
    set(batch["id"].tolist())
    for batch in take(
      config_of(path, resolutions=resolutions, schedule=schedule), 200
    )
  ]
  # In one order, a batch of 8 would be two of the batches of 4.
  small, large = ([b for b in batches if len(b) == n] for n in (4, 8))
  assert len(small) == len(large) == 100
  assert not any(few <= many for few in small for many in large)


def test_the_fingerprint_covers_the_schedule(data):
  first = Loader(config_of(data)).fingerprint
  later = (SCHEDULE[0], dataclasses.replace(SCHEDULE[1], start=8), SCHEDULE[2])
  shares = (*SCHEDULE[:2], Phase(23, {"low": 1, "high": 4}))
  small = RESOLUTIONS | {"low": Resolution(((16, 16), (16, 32)), 4)}
  others = [
    config_of(data, schedule=later),
    config_of(data, schedule=shares),
    config_of(data, schedule=SCHEDULE[:2]),
    config_of(data, resolutions=small),
  ]
  prints = {Loader(config).fingerprint for config in others}
  assert len(prints | {first}) == len(others) + 1


def test_the_report_shows_phases_resolutions_and_batch_sizes(data):
  loader = Loader(config_of(data))
  text = loader.report()
  used = {name: 0 for name in RESOLUTIONS}
  for info in loader.programs:
    used[info.resolution] += info.count
    assert info.batch_size == RESOLUTIONS[info.resolution].batch_size
  assert "from step        23: low 25.00%, high 75.00%" in text
  assert f"low: {used['low']} of 200 records" in text
  assert f"high: {used['high']} of 200 records" in text
  assert "steps of 8" in text and "steps of 4" in text
  assert used["high"] < 140 + 1 <= used["low"]
  members = np.concatenate(loader._members)
  assert f"{len(set(members.tolist()))} of 200 records are used" in text
  assert f"each of {len(loader.programs)} programs" in text


@pytest.mark.parametrize(
  "schedule, message",
  [
    ((), r"start at steps \[\]"),
    ((Phase(1, {"low": 1, "high": 1}),), r"start at steps \[1\]"),
    ((*SCHEDULE[:2], Phase(7, {"low": 1})), r"\[0, 7, 7\]"),
    ((*SCHEDULE, Phase(9, {"low": 1})), "every other after"),
    ((Phase(0, {"low": 1, "huge": 1}),), "'huge': 1 from step 0"),
    ((*SCHEDULE[:1], Phase(9, {"high": -1})), "'high': -1 from step 9"),
    ((Phase(0, {"low": float("nan")}),), "nan"),
    ((*SCHEDULE, Phase(99, {"low": 0})), "no share above 0 from step 99"),
    (SCHEDULE[:1], r"\['high'\] are in no phase"),
    ((Phase(0, {"low": 1, "high": 0}),), r"\['high'\] are in no phase"),
  ],
)
def test_unusable_schedules(schedule, message):
  with pytest.raises(InputError, match=message):
    check_schedule(schedule, RESOLUTIONS)


def test_a_resolution_without_records_is_named(tmp_path):
  path = flat_data.write(tmp_path / "data", [[(20, 20)]] * 8)
  with pytest.raises(InputError, match=r"at high .*enlarging over 1\.5x"):
    Loader(config_of(path))
  with pytest.raises(InputError, match=r"Batch size 4 .* 8 hosts"):
    Loader(config_of(path), host_count=8)
