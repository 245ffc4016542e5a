# SPDX-License-Identifier: Apache-2.0
"""The one training loop, for every objective.

Fixed order: preview -> save -> next batch -> step -> log. A checkpoint of
step n therefore holds everything after n updates and resumes with batch n.
"""

import collections
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.parallel.sharding import put_batch
from qi2_jax.training.checkpoints import CheckpointStore
from qi2_jax.training.metrics import Writers

# Steps dispatched ahead of the device; bounds the host's memory.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """When to do what; all counts are steps, 0 means never.

  Attributes:
    num_steps: length of the run.
    batch_size: global batch, for images per second.
    log_every: scalars and progress line.
    save_every: checkpoints; one is always written at the end.
    preview_every: sample grids.
    seed: root of the step's randomness.
  """

  num_steps: int
  batch_size: int
  log_every: int
  save_every: int
  preview_every: int
  seed: int


class StopRequest:
  """Turns the first SIGINT/SIGTERM into a flag; a second SIGINT raises."""

  def __init__(self):
    self.signal = 0
    self._previous = {}

  def __enter__(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number, _):
    if self.signal:
      raise KeyboardInterrupt
    self.signal = number
    logging.warning("stopping after this step; the state will be saved")


class _Meter:
  """Images per second and share of time spent waiting for data."""

  def __init__(self, step: int):
    self.reset(step)

  def reset(self, step: int) -> None:
    self.step, self.start, self.waited = step, time.perf_counter(), 0.0

  def rates(self, step: int, config: LoopConfig) -> dict:
    elapsed = time.perf_counter() - self.start
    per_step = elapsed / max(1, step - self.step)
    return {
      "images_per_second": config.batch_size / per_step,
      "data_wait_fraction": self.waited / elapsed,
      "eta_seconds": (config.num_steps - step) * per_step,
    }


def _progress_line(step: int, values: dict, config: LoopConfig) -> str:
  eta = int(values["eta_seconds"])
  parts = [f"step {step}/{config.num_steps}", f"loss {values['loss']:.4f}"]
  parts += [f"psnr {values['psnr']:.2f}"] if "psnr" in values else []
  parts += [
    f"{values['images_per_second']:.1f} img/s",
    f"data wait {100 * values['data_wait_fraction']:.1f} %",
    f"ETA {eta // 60}:{eta % 60:02d}",
  ]
  return "  ".join(parts)


def _log(step, metrics, meter, writers, config) -> None:
  """Fetches one step's metrics, writes them, stops the run on NaN."""
  values = {k: float(v) for k, v in jax.device_get(metrics).items()}
  values |= meter.rates(step, config)
  writers.scalars(step, values)
  logging.info(_progress_line(step, values, config))
  if not np.isfinite(values["loss"]):
    raise InputError(
      f"the loss is {values['loss']} at step {step}; resume from the last "
      "checkpoint with a lower learning rate."
    )


def run(
  state, step_fn: Callable, encode_fn: Callable, batches: Iterator,
  config: LoopConfig, *, mesh, store: CheckpointStore, writers: Writers,
  meta: Callable[[int], dict],
  preview: Callable[[object, int], dict[str, np.ndarray]],
):  # fmt: skip
  """Trains from `state.step` to `config.num_steps`.

  Args:
    state: the train state, on the mesh.
    step_fn: jitted, donating `step(state, features, key)`.
    encode_fn: jitted `encode(host batch) -> features` (frozen models).
    batches: host batches from `state.step` on.
    config: see `LoopConfig`.
    mesh: where batches go.
    store: checkpoints.
    writers: metrics.
    meta: JSON to store beside the state of a step.
    preview: `(state, step) -> {name: uint8 grid}`.

  Returns:
    `(state, signal number or 0)`.

  Raises:
    InputError: the loss is not finite.
  """
  step = int(state.step)
  start = step
  key = jax.random.key(config.seed)
  meter, in_flight = _Meter(step), collections.deque()

  def due(every):
    return every and step % every == 0 and step > start

  with StopRequest() as stop:
    while True:
      finished = step >= config.num_steps or stop.signal
      if due(config.preview_every) and not stop.signal:
        for name, grid in preview(state, step).items():
          logging.info("wrote %s", writers.image(step, name, grid))
        meter.reset(step)
      if due(config.save_every) or (finished and step > start):
        store.save(step, state, meta(step))
      if finished:
        return state, stop.signal
      waited = time.perf_counter()
      batch = next(batches)
      meter.waited += time.perf_counter() - waited
      features = encode_fn(put_batch(batch, mesh))
      with jax.transfer_guard("disallow"):
        state, metrics = step_fn(state, features, key)
      step += 1
      in_flight.append(metrics["loss"])
      if len(in_flight) > _IN_FLIGHT:
        in_flight.popleft().block_until_ready()
      # Always before a save, so that no checkpoint holds a NaN.
      saving = config.save_every and step % config.save_every == 0
      if step % config.log_every == 0 or saving or step == config.num_steps:
        _log(step, metrics, meter, writers, config)
        meter.reset(step)
