# SPDX-License-Identifier: Apache-2.0
"""The best weights of a run, kept beside its checkpoints.

Distillation drifts late, so the last checkpoint is seldom the best. `best` in
the workdir is itself a workdir, with the averaged weights of the best step so
far: sampling, evaluation and export take it as they take the run.
"""

import json
import os
import shutil
from collections.abc import Sequence

import numpy as np
from absl import logging

from qi2_jax.evaluation.store import write_json
from qi2_jax.parallel import distributed
from qi2_jax.training import checkpoints

_FILES = ("config.json", "base.json")


def energy_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Energy distance of two sets of samples (Szekely & Rizzo 2013).

  `2 E|x - y| - E|x - x'| - E|y - y'|` over different samples, without bias:
  0 in the mean where both sets come from one distribution.

  Args:
    ours: `[n, ...]`, n at least 2.
    theirs: `[m, ...]`, m at least 2.
  """
  x, y = (np.float64(a).reshape(len(a), -1) for a in (ours, theirs))
  # Per element, so that the number does not depend on the image's size.
  scale = x.shape[1] ** -0.5

  def mean(a, b, pairs):
    gaps = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return scale * gaps.sum() / pairs

  n, m = len(x), len(y)
  return (
    2 * mean(x, y, n * m) - mean(x, x, n * (n - 1)) - mean(y, y, m * (m - 1))
  )


def mean_distance(
  ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]
) -> float:
  """Mean over prompts of the energy distance of their samples."""
  return float(np.mean([energy_distance(a, b) for a, b in zip(ours, theirs)]))


def keep(workdir: str, step: int, ema, value: float) -> bool:
  """Writes `<workdir>/best` if no earlier step had a lower value.

  All processes must call it, with one value.

  Args:
    workdir: of the run.
    step: of the weights.
    ema: averaged parameters.
    value: lower is better.

  Returns:
    Whether these are the best so far.
  """
  folder = os.path.join(workdir, "best")
  record = os.path.join(folder, "best.json")
  old = None
  if os.path.isfile(record):
    with open(record, encoding="utf-8") as file:
      old = json.load(file)
  # The step that the record speaks of may be trained again after a kill.
  if old and not value < old["value"]:
    return False
  store = checkpoints.CheckpointStore(folder, keep=1)
  store.save(step, {"ema": ema}, {"value": value})
  store.close()
  distributed.on_first(lambda: _complete(workdir, folder, step, value))
  logging.info("step %d is the best so far: held-out distance %.5f", step,
               value)  # fmt: skip
  return True


def _complete(workdir: str, folder: str, step: int, value: float) -> None:
  """What makes a workdir of the folder, and last its record."""
  if not os.path.isdir(os.path.join(folder, "vae")):
    temporary = os.path.join(folder, "vae.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(os.path.join(workdir, "vae"), temporary)
    os.rename(temporary, os.path.join(folder, "vae"))
  for name in _FILES:
    if os.path.isfile(os.path.join(workdir, name)):
      shutil.copy(os.path.join(workdir, name), os.path.join(folder, name))
  write_json(os.path.join(folder, "best.json"), {"step": step, "value": value})
