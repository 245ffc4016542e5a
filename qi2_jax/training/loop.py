# SPDX-License-Identifier: Apache-2.0
"""The one training loop, for every objective.

Fixed order: preview -> save -> next batch -> step -> log. A checkpoint of
step n therefore holds everything after n updates and resumes with batch n.
"""

import dataclasses
import signal
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging

from qi2_jax.parallel.distributed import StopVote
from qi2_jax.parallel.sharding import put_batch
from qi2_jax.training import progress
from qi2_jax.training.checkpoints import CheckpointStore
from qi2_jax.training.health import Health
from qi2_jax.training.metrics import Writers
from qi2_jax.training.profile import ProfileWindow


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """When to do what; all counts are steps, 0 means never.

  Attributes:
    num_steps: length of the run.
    log_every: scalars and progress line; the last step always has one.
    save_every: checkpoints; one is always written at the end.
    preview_every: sample grids.
    validate_every: losses on held-out data.
    seed: root of the step's randomness.
  """

  num_steps: int
  log_every: int
  save_every: int
  preview_every: int
  validate_every: int
  seed: int


class StopRequest:
  """Turns the first SIGINT/SIGTERM into a flag; a second one raises."""

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


def _log(step, metrics, meter, health, writers, num_steps: int) -> None:
  """Fetches one step's metrics and writes them."""
  health.settle()
  values = {k: float(v) for k, v in jax.device_get(metrics).items()}
  values |= {"skipped_steps": health.skipped, "loss_spikes": health.spikes}
  values |= meter.rates(step) | progress.device_memory()
  writers.scalars(step, values)
  logging.info("%s", progress.line(step, num_steps, values))
  meter.reset(step)


def _save(step, state, store, health, meta: dict) -> None:
  health.settle()
  store.save(step, state, meta | {"health": health.record()})


def _size(batch) -> int:
  """Rows of a batch of all hosts; a step may have more than the next."""
  return jax.tree.leaves(batch)[0].shape[0]


def _preview(step, grids: dict[str, np.ndarray], writers, meter) -> None:
  for name, grid in grids.items():
    logging.info("wrote %s", writers.image(step, name, grid))
  meter.reset(step)


def _validate(step, values: dict[str, float], writers, meter) -> None:
  writers.scalars(step, values)
  for name, value in values.items():
    logging.info("step %d  %s %.4f", step, name, value)
  meter.reset(step)


def run(
  state, step_fn: Callable, encode_fn: Callable, batches: Iterator,
  config: LoopConfig, *, mesh, store: CheckpointStore, writers: Writers,
  health: Health, window: ProfileWindow, meta: Callable[[int], dict],
  preview: Callable[[object, int], dict[str, np.ndarray]],
  validate: Callable[[object, int], dict[str, float]],
  work: Callable[[dict], progress.Work],
):  # fmt: skip
  """Trains from `state.step` to `config.num_steps`.

  Args:
    state: the train state, on the mesh.
    step_fn: jitted, donating, made by `health.skip_nonfinite`.
    encode_fn: `encode(state, host batch) -> features`, see `task.Task`.
    batches: host batches from `state.step` on.
    config, mesh: when to do what; where batches go.
    store, writers: of checkpoints and metrics.
    health: judges every step; stored as `health` in a checkpoint's meta.
    window: which steps to profile.
    meta: JSON to store beside the state of a step.
    preview, validate: `(state, step) -> {name: uint8 grid, or value}`.
    work: `features -> progress.Work` of a step.

  Returns:
    `(state, signal number or 0)`.

  Raises:
    InputError: the run is lost (`Health`) or a file cannot be written.
  """
  step = start = int(state.step)
  key = jax.random.key(config.seed)
  meter = progress.Meter(step, config.num_steps, mesh)
  vote = StopVote(mesh)

  def due(every):
    return every and step % every == 0 and step > start

  with StopRequest() as stop, window:
    while True:
      stopped = vote(stop.signal)
      finished = step >= config.num_steps or stopped
      if due(config.preview_every) and not stopped:
        _preview(step, preview(state, step), writers, meter)
      if due(config.validate_every) and not stopped:
        _validate(step, validate(state, step), writers, meter)
      if due(config.save_every) or (finished and step > start):
        _save(step, state, store, health, meta(step))
      if finished:
        return state, stopped
      window.before(step, state)
      with meter.waiting():
        batch = next(batches)
      features = encode_fn(state, rows := put_batch(batch, mesh))
      with jax.transfer_guard("disallow"):
        state, metrics = step_fn(state, features, key)
      step += 1
      meter.add(_size(rows), work(features))
      health.watch(step, metrics, batch)
      if due(config.log_every) or step == config.num_steps:
        _log(step, metrics, meter, health, writers, config.num_steps)
