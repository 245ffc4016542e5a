# SPDX-License-Identifier: Apache-2.0
"""Rewards that need to know a data set: handed to the stages that use them."""

import numpy as np

from data_pipelines.shapes import checker
from data_pipelines.shapes.atoms import atoms_of
from qi2_jax.training import rollout_rewards


def _check(image: np.ndarray, prompt: str) -> dict[str, bool] | None:
  """The rules of shapes and glyphs; None for a prompt of another language."""
  atoms = atoms_of(prompt)
  return None if atoms is None else checker.check(image, atoms)


def arguments(config) -> dict:
  """Keyword arguments of a task's factory, beside config, workdir and mesh."""
  if "rewards" not in config:
    return {}
  return {
    "rewards": rollout_rewards.built_in(_check, checker.edit_scores)
  }  # fmt: skip
