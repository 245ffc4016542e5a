# SPDX-License-Identifier: Apache-2.0
"""A profiler trace of a few steps, for TensorBoard or Perfetto."""

import jax
from absl import logging


class ProfileWindow:
  """Traces `[start, start + count)` of a run's steps into a folder.

  A run that resumes inside the window traces the rest of it.
  """

  def __init__(self, folder: str, start: int, count: int):
    """Nothing is traced with `count` 0."""
    self._folder, self._steps = folder, range(start, start + count)
    self._active = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._active:
      self._stop()

  def before(self, step: int, state) -> None:
    """Starts or stops the trace; call it before every step.

    Args:
      step: completed steps.
      state: what the last step returned; waited for at the end of the window.
    """
    if step in self._steps and not self._active:
      jax.profiler.start_trace(self._folder)
      self._active = True
    elif self._active and step not in self._steps:
      jax.block_until_ready(state)
      self._stop()

  def _stop(self) -> None:
    self._active = False
    jax.profiler.stop_trace()
    logging.info("wrote a profile to %s", self._folder)
