# SPDX-License-Identifier: Apache-2.0
"""Runs that hurt themselves: non-finite steps and loss spikes.

The first half runs inside the jitted step, the second half on the host, a few
steps later, when the values are there without waiting for them.
"""

import collections
import os
import statistics
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.parallel.sharding import path_name

# Steps dispatched ahead of the device; bounds the host's memory.
_IN_FLIGHT = 2
# A spike is measured against the median of so many losses, at least so few.
_WINDOW = 101
_MIN_WINDOW = 20


def skip_nonfinite(step: Callable) -> Callable:
  """Wraps a pure step so that a non-finite one changes nothing.

  Where the loss or the gradient norm is not finite, parameters, EMA and
  optimizer state keep their values; only the step number goes on, and with it
  the data and the noise.

  Args:
    step: `step(state, batch, key) -> (state, metrics)` with the metrics
      `loss` and `grad_norm`.

  Returns:
    The same signature; the metrics gain `skipped`, 0 or 1.
  """

  # optax.apply_if_finite guards the optimizer alone: the EMA would still move.
  def guarded(state, batch, key):
    new, metrics = step(state, batch, key)
    fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, state)
    skipped = 1.0 - fine.astype(jnp.float32)
    return kept.replace(step=new.step), {**metrics, "skipped": skipped}

  return guarded


class Health:
  """Counts skipped steps and loss spikes; stops a run that is lost.

  What it knows is stored beside the state, so that a resumed run counts as
  if it had never stopped.
  """

  def __init__(
    self, workdir: str, max_skipped: int, spike_factor: float,
    saved: Mapping | None = None,
  ):  # fmt: skip
    """Starts from nothing or from `record()` of an earlier run.

    Args:
      workdir: where the batch of a lost run is saved.
      max_skipped: skipped steps in a row that end the run; 0: never.
      spike_factor: a loss above this times its running median is a spike;
        0: none is.
      saved: `record()` of the checkpoint that the run resumes from.
    """
    saved = saved or {"skipped": 0, "in_row": 0, "spikes": 0, "losses": ()}
    self._workdir = workdir
    self._max_skipped, self._spike_factor = max_skipped, spike_factor
    self.skipped, self._in_row = saved["skipped"], saved["in_row"]
    self.spikes = saved["spikes"]
    self._losses = collections.deque(saved["losses"], _WINDOW)
    self._in_flight = collections.deque()

  def watch(self, step: int, metrics: Mapping, batch) -> None:
    """Takes note of a dispatched step; waits for the one two steps before.

    Args:
      step: completed steps, this one included.
      metrics: of this step, on the device.
      batch: its host batch, kept until the step is judged.

    Raises:
      InputError: too many steps in a row were skipped.
    """
    values = {k: metrics[k] for k in ("loss", "grad_norm", "skipped")}
    self._in_flight.append((step, values, batch))
    self._settle(_IN_FLIGHT)

  def settle(self) -> None:
    """Judges every step so far.

    Raises:
      InputError: too many steps in a row were skipped.
    """
    self._settle(0)

  def record(self) -> dict:
    """What a checkpoint must hold, as JSON."""
    return {
      "skipped": self.skipped, "in_row": self._in_row, "spikes": self.spikes,
      "losses": list(self._losses),
    }  # fmt: skip

  def _settle(self, leave: int) -> None:
    while len(self._in_flight) > leave:
      step, values, batch = self._in_flight.popleft()
      values = {k: float(v) for k, v in jax.device_get(values).items()}
      if values["skipped"]:
        self._count_skipped(step, values, batch)
      else:
        self._in_row = 0
        self._compare(step, values["loss"])

  def _count_skipped(self, step: int, values: Mapping, batch) -> None:
    self.skipped += 1
    self._in_row += 1
    what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
    logging.warning("step %d was skipped: %s", step, what)
    if self._in_row == self._max_skipped:
      raise InputError(
        f"{self._in_row} steps in a row were not finite (step {step}: {what}; "
        f"{save_batch(self._workdir, step, batch)}); look at that batch, or "
        "resume from the last checkpoint with a lower learning rate."
      )

  def _compare(self, step: int, loss: float) -> None:
    if self._spike_factor and len(self._losses) >= _MIN_WINDOW:
      median = statistics.median(self._losses)
      if loss > self._spike_factor * median:
        self.spikes += 1
        logging.warning(
          "loss spike at step %d: %.4f, %.1f times the running median %.4f",
          step, loss, loss / median, median,
        )  # fmt: skip
    self._losses.append(loss)


def save_batch(workdir: str, step: int, batch) -> str:
  """Writes a host batch to `<workdir>/nonfinite_batch_STEP.npz`.

  Every process has rows of its own, so all but the first add their number to
  the name.

  Returns:
    A clause that says where it is, or why it is not there.
  """
  suffix = f"_{jax.process_index()}" if jax.process_index() else ""
  path = os.path.join(workdir, f"nonfinite_batch_{step}{suffix}.npz")
  leaves = jax.tree_util.tree_leaves_with_path(batch)
  arrays = {path_name(k): np.asarray(v) for k, v in leaves}
  try:
    with open(path + ".tmp", "wb") as file:
      np.savez(file, **arrays)
    os.replace(path + ".tmp", path)
  except OSError as error:
    return f"its batch could not be saved: {error.strerror}"
  return f"its batch is in {path}"
