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
# `(instruction, source, target, result) -> (as Check, share of the rest that
# is unchanged)`, or None for an edit without rules.
CheckEdit = Callable[
  [str, Image, Image, Image], tuple[dict[str, bool], float] | None
]
# `(image, prompt text) -> [0, 1]`, or None for a prompt without rules.
Grade = Callable[[Image, str], float | None]
# `(instruction, source, target, result) -> [0, 1]`, None as above.
GradeEdit = Callable[[str, Image, Image, Image], float | None]

# Beyond this an image is as good as equal, in dB.
_HIGHEST_PSNR = 50.0
# A pixel whose largest channel differs by more was meant to change.
_CHANGED = 24


def rules(check: Check, check_edit: CheckEdit) -> Score:
  """The reward `rules` in [0, 1].

  Half for the share of right properties, which a model that knows little can
  climb, and half for all of them; for edits times the share of pixels that
  are as they should be among those that had to stay. Ours.

  Args:
    check: rules of text to image.
    check_edit: of edits with a known result.

  Returns:
    A reward that fails (NaN) for prompts without rules.
  """

  def of_text(image: Image, text: str) -> float | None:
    passed = check(image, text)
    return None if passed is None else _marks(passed)

  def of_edit(text: str, source: Image, target: Image, result: Image):
    found = check_edit(text, source, target, result)
    return None if found is None else _marks(found[0]) * found[1]

  return _by_task("rules", of_text, of_edit)


def _marks(passed: dict[str, bool]) -> float:
  parts = [right for name, right in passed.items() if name != "all"]
  return 0.5 * float(np.mean(parts)) + 0.5 * float(passed["all"])


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
    elif prompt.target is None:
      value = None
    else:
      value = of_edit(prompt.text, references[0], prompt.target, image)
    return np.nan if value is None else value

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
