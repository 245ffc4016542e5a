# SPDX-License-Identifier: Apache-2.0
"""The loader benchmark's bookkeeping, on a clock that the test turns."""

import itertools
import json
import pathlib
import types

import benchmark_program
import numpy as np
import pytest

from data_pipelines import records
from qi2_jax.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def program():
  with benchmark_program.loaded("loader_throughput") as module:
    yield module


class Clock:
  """Stands for the module `time`."""

  def __init__(self):
    self.now = 0.0

  def perf_counter(self):
    return self.now

  def process_time(self):
    return self.now

  def sleep(self, seconds):
    self.now += seconds


class SlowLoader:
  """Batch k takes k seconds; 4 bytes in two arrays."""

  def __init__(self, clock):
    self._clock = clock

  def iterate(self):
    for k in itertools.count(5):
      self._clock.now += k
      yield {"a": np.zeros(2, np.uint8), "b": (np.zeros(1, np.uint16),)}


def test_waits_are_counted_after_the_first_batch(program, monkeypatch):
  clock = Clock()
  monkeypatch.setattr(program, "time", clock)
  first, waits, size = program.take(SlowLoader(clock), 3, 10.0)
  assert (first, waits, size) == (5.0, [6.0, 7.0, 8.0], 12)
  assert clock.now == 5 + 3 * 10 + 6 + 7 + 8


def test_the_default_step_is_the_roofline_of_one_host(program):
  # 16 hosts share 16,384 images per 50 s; 1,024 rows of a host take as long.
  assert program.step_seconds(512, 1024) == 50.0
  assert program.step_seconds(512, 32) == pytest.approx(32 * 50 / 1024)
  assert program.step_seconds(1024, 512) == 88.4
  with pytest.raises(InputError, match="give --step_seconds"):
    program.step_seconds(2048, 1)
  text = (ROOT / "docs/scale.md").read_text()
  for side in program.ROOFLINE_S:
    assert program.common.BATCH_SIZES[side] % program.HOSTS == 0
    assert f"{program.common.BATCH_SIZES[side]:,}" in text


def test_textures_are_a_dataset_of_photographs_size(program, tmp_path):
  path = str(tmp_path / "data")
  program.write_textures(path, 10, ((256, 256), (192, 352)))
  dataset = records.open_dataset(path)
  assert dataset.index.references.sum() == 1 and len(dataset) == 10
  for i in range(10):
    image = dataset[i].target
    bits = 8 * len(image.data) / (image.width * image.height)
    assert image.width >= 256 and 1.5 < bits < 4
  dataset.close()


def test_images_are_counted_with_their_references(program):
  class Planned:
    def peek(self, step):
      references = (None,) * (step % 3)
      key = types.SimpleNamespace(references=references)
      return types.SimpleNamespace(key=key), None

  assert program.images_per_row(Planned(), 6) == 2.0  # 1, 2, 3, 1, 2, 3
  assert program.images_per_row(Planned(), 1) == 1.0


def test_the_program_measures_and_writes(
  program, tmp_path, monkeypatch, capsys
):
  out = tmp_path / "loader.json"
  values = types.SimpleNamespace(
    data=None, photos=False, records=20, side=256, batch_size=2, steps=2,
    step_seconds=0.01, threads=1, max_wait=1.0, json=str(out),
  )  # fmt: skip
  monkeypatch.setattr(program, "flags", types.SimpleNamespace(FLAGS=values))
  assert program.main() == 0
  found = json.loads(out.read_text())
  assert found["data"] == "shapes" and found["batch_size"] == 2
  assert found["needed_rows_per_second"] == 200
  assert found["needed_cores"] == pytest.approx(
    found["cpu_ms_per_row"] / 1000 * 200
  )
  # An edit has two images or more; most steps have none.
  for ratio in (
    found["images_per_second"] / found["rows_per_second"],
    found["cpu_ms_per_row"] / found["cpu_ms_per_image"],
  ):
    assert 1 <= ratio <= 2
  assert 0 <= found["wait_share"] < 1 and found["mb_per_second"] > 0
  assert "waiting for data" in capsys.readouterr().out
  values.max_wait = -1.0
  assert program.main() == 1
  values.side = 300
  with pytest.raises(InputError, match="--side=300 is unknown"):
    program.main()
