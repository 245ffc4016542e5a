# SPDX-License-Identifier: Apache-2.0
"""`config.rewards` to the rewards of a run, for the stages that use them.

What needs to know a data set (the rules of shapes and glyphs, and the reader
of their font) or a folder of weights is put together here.
"""

import functools
from collections.abc import Callable

import numpy as np
from absl import logging

from data_pipelines.shapes import checker, grader
from data_pipelines.shapes.atoms import atoms_of, atoms_of_edit
from qi2_jax import evaluate_vae
from qi2_jax.errors import InputError
from qi2_jax.evaluation import image_metrics
from qi2_jax.interop import aesthetic as heads
from qi2_jax.interop import image_text, patch_features
from qi2_jax.rewards import aesthetic, clip, consistency, ocr, rules
from qi2_jax.rewards.protocol import Score
from qi2_jax.training import rollout_rewards


def _check(image: np.ndarray, prompt: str) -> dict[str, bool] | None:
  """The rules of shapes and glyphs; None for a prompt of another language."""
  atoms = atoms_of(prompt)
  return None if atoms is None else checker.check(image, atoms)


# All images of a group have one target, and both rewards ask about it.
@functools.lru_cache(maxsize=256)
def _edit_atoms(
  instruction: str, pixels: bytes, size: tuple[int, ...]
) -> dict | None:
  target = np.frombuffer(pixels, np.uint8).reshape(size)
  return atoms_of_edit(instruction, target)


def _check_edit(
  instruction: str, source: np.ndarray, target: np.ndarray, result: np.ndarray
) -> tuple[dict[str, bool], float] | None:
  """Rules of an edit's result, and how much of the rest was left alone."""
  atoms = _edit_atoms(instruction, target.tobytes(), target.shape)
  if atoms is None:
    return None
  _, kept, _ = checker.edit_scores(source, target, result)
  return checker.check(result, atoms), kept


def _grade(image: np.ndarray, prompt: str) -> float | None:
  """How near an image is to the rules; None as `_check`."""
  atoms = atoms_of(prompt)
  return None if atoms is None else grader.grade(image, atoms)


def _grade_edit(
  instruction: str, source: np.ndarray, target: np.ndarray, result: np.ndarray
) -> float | None:
  """How near a result is to the rules and to the one that is right."""
  atoms = _edit_atoms(instruction, target.tobytes(), target.shape)
  if atoms is None:
    return None
  near = grader.grade_edit(source, target, result)
  return 0.5 * (near + grader.grade(result, atoms))


def _wanted(prompt: str) -> str | None:
  """The text that a prompt asks for: rendered task, else what is quoted."""
  atoms = atoms_of(prompt)
  return atoms.get("text") if atoms else ocr.quoted(prompt)


def _folder(section, name: str) -> str:
  path = section.models[name].path
  if not path:
    raise InputError(
      f"config.rewards.use names {name!r}, but "
      f"config.rewards.models.{name}.path is empty; give the folder of a model."
    )
  return path


def _clip(section, load: Callable) -> Score:
  scorer = load(_folder(section, clip.NAME))
  make = clip.scaled_alignment if section.models.clip.scaled else clip.alignment
  return make(scorer)


def _aesthetic(section, load: Callable) -> Score:
  if not section.models.aesthetic.head:
    raise InputError(
      "config.rewards.use names 'aesthetic', but "
      "config.rewards.models.aesthetic.head is empty; give the file of a head, "
      "see qi2_jax/interop/aesthetic.py."
    )
  scorer = load(_folder(section, aesthetic.NAME))
  head = heads.load(section.models.aesthetic.head, scorer.width)
  return aesthetic.aesthetic(scorer, head)


def _ocr(section, load: Callable) -> Score:
  name = section.models.ocr.reader
  try:
    read = evaluate_vae.text_reader(name)
  except InputError as error:
    raise InputError(
      f"config.rewards.models.ocr.reader={name!r}: {error}"
    ) from error
  if read is None:
    raise InputError(
      "config.rewards.use names 'ocr', so config.rewards.models.ocr.reader "
      "must not be 'none'."
    )
  if name == "shapes":
    logging.warning(
      "the reward 'ocr' reads by template matching of the rendered task's own "
      "font, not by an OCR engine"
    )
  return ocr.text_accuracy(read, _wanted, image_metrics.text_similarity)


def _consistency(section, load: Callable) -> Score:
  path = _folder(section, consistency.NAME)
  return consistency.consistency(patch_features.load(path))


_LOADED = {
  clip.NAME: _clip, aesthetic.NAME: _aesthetic, ocr.NAME: _ocr,
  consistency.NAME: _consistency,
}  # fmt: skip


def rewards(section) -> dict[str, Score]:
  """The rewards of `config.rewards.use`, and those that cost nothing.

  Args:
    section: `config.rewards`.

  Raises:
    InputError: an unknown name, or a model that is missing or damaged.
  """
  known = (*rollout_rewards.BUILT_IN, *_LOADED)
  for name in section.use:
    if name not in known:
      raise InputError(
        f"config.rewards.use names {name!r}; use some of {sorted(known)}, and "
        "config.rewards.judges for VLM judges."
      )
  scorers = {}

  def load(path: str):
    if path not in scorers:
      scorers[path] = image_text.load(path)
    return scorers[path]

  found = rollout_rewards.built_in(
    rules.rules(_check, _check_edit),
    rules.grades(_grade, _grade_edit),
  )
  for name in section.use:
    if name in _LOADED:
      found[name] = _LOADED[name](section, load)
  return found


def arguments(config) -> dict:
  """Keyword arguments of a task's factory, beside config, workdir and mesh."""
  return {"rewards": rewards(config.rewards)} if "rewards" in config else {}
