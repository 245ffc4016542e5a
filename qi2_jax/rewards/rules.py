# SPDX-License-Identifier: Apache-2.0
"""Exact rules as a reward, and an unchanged background for edits.

What is right arrives as callables: rules of a task belong to its data
pipeline, which this package does not know.
"""

from collections.abc import Callable

import numpy as np

from qi2_jax.rewards.protocol import Image, Prompt, Score

# `(image, prompt text) -> {property: right or not, "all": ...}`, or None for
# a prompt without rules.
Check = Callable[[Image, str], dict[str, bool] | None]
# `(source, target, result) -> (E, P, O)`: changed and kept shares, and the
# root of their product.
EditScores = Callable[[Image, Image, Image], tuple[float, float, float]]
# `(image, prompt text) -> [0, 1]`, or None for a prompt without rules.
Grade = Callable[[Image, str], float | None]
# `(source, target, result) -> [0, 1]`.
GradeEdit = Callable[[Image, Image, Image], float]

# Beyond this an image is as good as equal, in dB.
_HIGHEST_PSNR = 50.0
# A pixel whose largest channel differs by more was meant to change.
_CHANGED = 24


def rules(check: Check, edit_scores: EditScores) -> Score:
  """The reward `rules` in [0, 1].

  Text to image: half for the share of right properties, which a model that
  knows little can climb, and half for all of them. Edits: O. Ours.

  Args:
    check: rules of text to image.
    edit_scores: of edits with a known result.

  Returns:
    A reward that fails (NaN) for prompts without rules.
  """

  def share(image: Image, text: str) -> float | None:
    passed = check(image, text)
    if passed is None:
      return None
    parts = [right for name, right in passed.items() if name != "all"]
    return 0.5 * float(np.mean(parts)) + 0.5 * float(passed["all"])

  return _by_task("rules", share, lambda *given: edit_scores(*given)[2])


def grades(grade: Grade, grade_edit: GradeEdit) -> Score:
  """The reward `grades` in [0, 1]: how near an image is to being right.

  Most prompts are solved always or never, and then `rules` alone says the
  same of all images of a group.

  Args:
    grade: of text to image.
    grade_edit: of edits with a known result.

  Returns:
    A reward that fails (NaN) for prompts without rules.
  """

  return _by_task("grades", grade, grade_edit)


def _by_task(name: str, of_text: Grade, of_edit: GradeEdit) -> Score:
  """A reward that is another function for edits; NaN where it has none."""

  def one(image: Image, prompt: Prompt, references) -> float:
    if not references:
      value = of_text(image, prompt.text)
      return np.nan if value is None else value
    if prompt.target is None:
      return np.nan
    return of_edit(references[0], prompt.target, image)

  def score(images, prompts, references):
    values = [one(*given) for given in zip(images, prompts, references)]
    return {name: np.asarray(values, np.float64)}

  return score


def edited_region(source: Image, target: Image) -> np.ndarray:
  """Pixels that the edit is about: bool `[H, W]`."""
  gap = np.abs(source.astype(np.int16) - target.astype(np.int16))
  return gap.max(axis=-1) > _CHANGED


def masked_psnr(image: Image, reference: Image, mask: np.ndarray) -> float:
  """PSNR in dB over the pixels of the mask, at most 50."""
  gap = (image.astype(np.float64) - reference.astype(np.float64))[mask]
  error = np.mean(np.square(gap))
  highest = 255.0**2 * 10 ** (-_HIGHEST_PSNR / 10)
  return float(10 * np.log10(255.0**2 / max(error, highest)))


def background(
  images: list[Image], prompts: list[Prompt], references
) -> dict[str, np.ndarray]:
  """The reward `background` in dB: what an edit must not touch.

  PSNR to the source outside the region in which source and target differ;
  the same number for every image without a source, which teaches nothing.
  """

  def one(image: Image, prompt: Prompt, sources) -> float:
    if not sources:
      return 0.0
    if prompt.target is None or prompt.target.shape != sources[0].shape:
      return np.nan
    kept = ~edited_region(sources[0], prompt.target)
    return masked_psnr(image, sources[0], kept) if kept.any() else 0.0

  values = [one(*given) for given in zip(images, prompts, references)]
  return {"background": np.asarray(values, np.float64)}
