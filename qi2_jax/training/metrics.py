# SPDX-License-Identifier: Apache-2.0
"""clu metric writers with and without TensorFlow, plus JSON lines.

`clu.metric_writers` imports TensorFlow for one of its writers. Where it is
absent, that one module is replaced by a stub before the import and the
TensorBoard file is written by tensorboardX instead.
"""

import contextlib
import importlib.util
import json
import os
import sys
import time
import types

import numpy as np

from qi2_jax.errors import InputError


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


@contextlib.contextmanager
def _writing(path: str):
  """Turns a full disk or a read-only folder into a sentence."""
  try:
    yield
  except Exception as error:
    cause = error  # clu wraps what its thread met.
    while cause is not None and not isinstance(cause, OSError):
      cause = cause.__cause__
    if cause is None:
      raise
    raise InputError(
      f"cannot write {path} ({cause.strerror}); free space or make it "
      "writable and run the same command to go on from the last checkpoint."
    ) from error


class JsonlWriter:
  """Appends one JSON object per step to `<workdir>/metrics.jsonl`."""

  def __init__(self, path: str, resume_step: int):
    """Drops rows after `resume_step`: those steps are trained again.

    Raises:
      InputError: the file cannot be written.
    """
    self._path, rows = path, []
    if os.path.exists(path):
      with open(path) as file:
        rows = [line for line in file if _step_of(line) <= resume_step]
    temporary = path + ".tmp"
    with _writing(path):
      with open(temporary, "w") as file:
        file.writelines(rows)
      os.replace(temporary, path)
      # Unbuffered: what a full disk refuses must not come again at the end.
      self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (until close)

  def write(self, step: int, scalars: dict) -> None:
    """Writes one row.

    Raises:
      InputError: the file cannot be written.
    """
    row = {"step": step} | {k: float(v) for k, v in scalars.items()}
    with _writing(self._path):
      line = (json.dumps(row) + "\n").encode()
      while line:  # A short write says nothing; the next one says why.
        line = line[self._file.write(line) :]

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _step_of(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):
    return float("inf")  # A line cut off by a kill.


class _TensorboardX:
  """The clu writer methods we use, on tensorboardX.

  Events go straight to the file: clu's thread is enough, and tensorboardX's
  own would let the run hang on a full disk.
  """

  def __init__(self, logdir: str):
    from tensorboardX.event_file_writer import EventsWriter

    os.makedirs(logdir, exist_ok=True)
    self._writer = EventsWriter(os.path.join(logdir, "events"))

  def _write(self, step, summary):
    from tensorboardX.proto.event_pb2 import Event

    event = Event(wall_time=time.time(), step=step, summary=summary)
    self._writer.write_event(event)

  def write_scalars(self, step, scalars):
    from tensorboardX import summary

    for key, value in scalars.items():
      self._write(step, summary.scalar(key, np.asarray(value)))
    self._writer.flush()

  def write_images(self, step, images):
    from tensorboardX import summary

    for key, value in images.items():
      self._write(step, summary.image(key, value, dataformats="HWC"))

  def flush(self):
    self._writer.flush()

  def close(self):
    self._writer.close()


class Silent:
  """Stands for `Writers` on all processes but the first."""

  def scalars(self, step: int, values: dict) -> None:
    """Writes nothing."""

  def image(self, step: int, name: str, image: np.ndarray) -> str:
    """Writes nothing; returns ''."""
    del step, name, image
    return ""

  def close(self) -> None:
    """Nothing is open."""


class Writers:
  """Scalars to JSON lines and TensorBoard, images to PNG and TensorBoard."""

  def __init__(self, workdir: str, resume_step: int = 0):
    """Opens all files under `workdir`.

    Raises:
      InputError: they cannot be written.
    """
    self._workdir = workdir
    self._jsonl = JsonlWriter(
      os.path.join(workdir, "metrics.jsonl"), resume_step
    )
    self._logdir = os.path.join(workdir, "tensorboard")
    writers, has_tf = _clu_writers()
    new_board = writers.SummaryWriter if has_tf else _TensorboardX
    with _writing(self._logdir):
      board = new_board(self._logdir)
    # Asynchronous, so that the loop never waits for a file system.
    self._board = writers.AsyncMultiWriter([board])

  def scalars(self, step: int, values: dict) -> None:
    """Writes scalars of one step.

    Raises:
      InputError: these, or some before them, cannot be written.
    """
    values = {k: float(v) for k, v in values.items()}
    self._jsonl.write(step, values)
    with _writing(self._logdir):
      self._board.write_scalars(step, values)

  def image(self, step: int, name: str, image: np.ndarray) -> str:
    """Writes one uint8 `[H, W, 3]` grid; returns the PNG's path.

    Raises:
      InputError: it cannot be written.
    """
    from PIL import Image

    folder = os.path.join(self._workdir, "samples")
    path = os.path.join(folder, f"{name}_{step:07d}.png")
    with _writing(path):
      os.makedirs(folder, exist_ok=True)
      Image.fromarray(image).save(path)
    with _writing(self._logdir):
      self._board.write_images(step, {name: image})
    return path

  def close(self) -> None:
    """Flushes and closes everything.

    Raises:
      InputError: the last values cannot be written.
    """
    self._jsonl.close()
    with _writing(self._logdir):
      self._board.flush()
      self._board.close()
