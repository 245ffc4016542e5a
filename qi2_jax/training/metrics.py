# SPDX-License-Identifier: Apache-2.0
"""clu metric writers with and without TensorFlow, plus JSON lines.

`clu.metric_writers` imports TensorFlow for one of its writers. Where it is
absent, that one module is replaced by a stub before the import and the
TensorBoard file is written by tensorboardX instead.
"""

import importlib.util
import json
import os
import sys
import types

import numpy as np


def _clu_writers():
  """Imports `clu.metric_writers`, stubbing its TensorFlow module if needed."""
  name = "clu.metric_writers.summary_writer"
  has_tf = all(
    importlib.util.find_spec(m) for m in ("tensorflow", "tensorboard")
  )
  if not has_tf and name not in sys.modules:
    stub = types.ModuleType(name)
    stub.SummaryWriter = None
    sys.modules[name] = stub
  from clu import metric_writers

  return metric_writers, has_tf


class JsonlWriter:
  """Appends one JSON object per step to `<workdir>/metrics.jsonl`."""

  def __init__(self, path: str, resume_step: int):
    """Drops rows after `resume_step`: those steps are trained again."""
    rows = []
    if os.path.exists(path):
      with open(path) as file:
        rows = [line for line in file if _step_of(line) <= resume_step]
    temporary = path + ".tmp"
    with open(temporary, "w") as file:
      file.writelines(rows)
    os.replace(temporary, path)
    self._file = open(path, "a", buffering=1)  # noqa: SIM115 (until close)

  def write(self, step: int, scalars: dict) -> None:
    """Writes one row."""
    row = {"step": step} | {k: float(v) for k, v in scalars.items()}
    self._file.write(json.dumps(row) + "\n")

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _step_of(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):
    return float("inf")  # A line cut off by a kill.


class _TensorboardX:
  """The two clu writer methods we use, on tensorboardX."""

  def __init__(self, logdir: str):
    from tensorboardX import SummaryWriter

    self._writer = SummaryWriter(logdir)

  def write_scalars(self, step, scalars):
    for key, value in scalars.items():
      self._writer.add_scalar(key, np.asarray(value), step)

  def write_images(self, step, images):
    for key, value in images.items():
      self._writer.add_image(key, value, step, dataformats="HWC")

  def flush(self):
    self._writer.flush()

  def close(self):
    self._writer.close()


class Writers:
  """Scalars to JSON lines and TensorBoard, images to PNG and TensorBoard."""

  def __init__(self, workdir: str, resume_step: int = 0):
    """Opens all files under `workdir`."""
    self._workdir = workdir
    self._jsonl = JsonlWriter(
      os.path.join(workdir, "metrics.jsonl"), resume_step
    )
    logdir = os.path.join(workdir, "tensorboard")
    writers, has_tf = _clu_writers()
    board = writers.SummaryWriter(logdir) if has_tf else _TensorboardX(logdir)
    # Asynchronous, so that the loop never waits for a file system.
    self._board = writers.AsyncMultiWriter([board])

  def scalars(self, step: int, values: dict) -> None:
    """Writes scalars of one step."""
    values = {k: float(v) for k, v in values.items()}
    self._jsonl.write(step, values)
    self._board.write_scalars(step, values)

  def image(self, step: int, name: str, image: np.ndarray) -> str:
    """Writes one uint8 `[H, W, 3]` grid; returns the PNG's path."""
    from PIL import Image

    folder = os.path.join(self._workdir, "samples")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}_{step:07d}.png")
    Image.fromarray(image).save(path)
    self._board.write_images(step, {name: image})
    return path

  def close(self) -> None:
    """Flushes and closes everything."""
    self._board.flush()
    self._board.close()
    self._jsonl.close()
