# SPDX-License-Identifier: Apache-2.0
"""Metrics files: rows of a resumed run, TensorBoard, full disks."""

import json
import resource
import time

import numpy as np
import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event

from qi2_jax.errors import InputError
from qi2_jax.training.metrics import Writers


def rows(workdir) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def write(workdir, steps, resume=0):
  writers = Writers(str(workdir), resume)
  for step in steps:
    writers.scalars(step, {"loss": 1 / step, "count": np.float32(step)})
  writers.close()


def events(folder):
  """Events of the one file there, without their times (TFRecord framing)."""
  (path,) = folder.iterdir()
  data, out = path.read_bytes(), []
  while data:
    size = int.from_bytes(data[:8], "little")
    out.append(Event.FromString(data[12 : 12 + size]))
    out[-1].ClearField("wall_time")
    data = data[16 + size :]
  return out


def test_a_resumed_run_continues_the_file(tmp_path):
  write(tmp_path, range(1, 8))
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 8, "lo')
  write(tmp_path, range(6, 10), resume=5)
  found = rows(tmp_path)
  assert [r["step"] for r in found] == list(range(1, 10))
  assert [r["loss"] for r in found] == [1 / s for s in range(1, 10)]


def test_tensorboard_gets_what_tensorboardx_would_write(tmp_path):
  pytest.importorskip("tensorboardX")
  grid = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)
  writers = Writers(str(tmp_path / "."))
  writers.scalars(1, {"loss": 0.5, "psnr": 2})
  path = writers.image(1, "grid", grid)
  writers.close()
  assert path == str(tmp_path / "samples" / "grid_0000001.png")
  plain = SummaryWriter(str(tmp_path / "plain"))
  plain.add_scalar("loss", np.asarray(0.5), 1)
  plain.add_scalar("psnr", np.asarray(2.0), 1)
  plain.add_image("grid", grid, 1, dataformats="HWC")
  plain.close()
  ours, theirs = events(tmp_path / "tensorboard"), events(tmp_path / "plain")
  assert len(ours) == 4
  assert ours == theirs


def test_a_full_disk_is_one_sentence_and_keeps_what_is_there(
  tmp_path, monkeypatch
):
  write(tmp_path, range(1, 4))
  size = (tmp_path / "metrics.jsonl").stat().st_size
  writers = Writers(str(tmp_path), 3)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  # No file may grow beyond this: the same failure as that of a full disk.
  resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
  try:
    with pytest.raises(InputError, match=r"cannot write .*metrics.jsonl \("):
      writers.scalars(4, {"loss": 1.0})
    with pytest.raises(InputError, match=r"cannot write .*tensorboard \("):
      # Written by clu's thread; the error comes with a later call.
      monkeypatch.setattr(writers._jsonl, "write", lambda *_: None)
      for step in range(4, 400):
        writers.scalars(step, {str(i): 0.5 for i in range(99)})
        time.sleep(0.01)
    with pytest.raises(InputError, match=r"cannot write .*grid_0000004.png \("):
      grid = np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)
      writers.image(4, "grid", grid)
    with pytest.raises(InputError, match=r"cannot write .*tensorboard \("):
      writers.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  write(tmp_path, range(4, 6), resume=3)
  assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / "tensorboard").write_text("a file is in the way")
  with pytest.raises(InputError, match="cannot write"):
    Writers(str(tmp_path))
  with pytest.raises(InputError, match=r"cannot write .*metrics.jsonl"):
    Writers(str(tmp_path / "nowhere"))
