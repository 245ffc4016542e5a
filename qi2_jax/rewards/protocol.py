# SPDX-License-Identifier: Apache-2.0
"""What every reward is: a function from images to named numbers.

    score(images, prompts, references) -> {name: float64 [B]}

NaN says that an image could not be judged. It is not 0: a failed judge must
not teach that the image was bad. Higher is better; units do not matter, for
every reward is divided by its own spread among the images of a prompt.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from qi2_jax.errors import InputError

Image = np.ndarray  # uint8 [H, W, 3]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """What was asked for.

  Attributes:
    text: prompt or instruction.
    kind: category of the prompt; rewards are weighted by it.
    target: the image that the data has for the prompt, if it means anything
      to a reward: of an edit, the one right result.
  """

  text: str
  kind: str = "t2i"
  target: Image | None = None


# `(images, prompts, references of each) -> {name: [B]}`.
Score = Callable[
  [Sequence[Image], Sequence[Prompt], Sequence[tuple[Image, ...]]],
  dict[str, np.ndarray],
]


def score_all(
  scores: Mapping[str, Score], images: Sequence[Image],
  prompts: Sequence[Prompt], references: Sequence[tuple[Image, ...]],
) -> dict[str, np.ndarray]:  # fmt: skip
  """Values of several rewards, by name.

  A reward that raises anything but InputError has failed for all its images.

  Args:
    scores: by name; only used to say who failed.
    images: what was made.
    prompts: of each image.
    references: of each image.

  Raises:
    InputError: two rewards share a name, or a reward gave another number of
      values than images.
  """
  out: dict[str, np.ndarray] = {}
  for name, score in scores.items():
    for key, values in _guarded(name, score, images, prompts, references):
      values = np.asarray(values, np.float64)
      if key in out or values.shape != (len(images),):
        raise InputError(
          f"the reward {name!r} gave {key!r} with shape {values.shape} for "
          f"{len(images)} images; names must differ and every image needs one "
          "value."
        )
      out[key] = values
  return out


def _guarded(name, score, images, prompts, references):
  try:
    return score(images, prompts, references).items()
  except InputError:
    raise
  except Exception as error:
    logging.warning("reward %s failed: %r", name, error)
    return {name: np.full(len(images), np.nan)}.items()


class Failures:
  """Counts images without a reward; ends a run that has too many."""

  def __init__(self, highest_rate: float, saved: Mapping | None = None):
    """Starts from nothing or from `record()`.

    Args:
      highest_rate: share of failed images that is still accepted.
      saved: of the checkpoint that the run resumes from.
    """
    saved = saved or {"failed": 0, "judged": 0}
    self._highest = highest_rate
    self.failed, self.judged = saved["failed"], saved["judged"]

  def count(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which images have all their rewards, bool `[B]`.

    Args:
      values: of one batch, by name.

    Raises:
      InputError: more than the accepted share of this batch failed.
    """
    missing = {name: ~np.isfinite(v) for name, v in values.items()}
    bad = np.any(list(missing.values()), axis=0)
    self.failed += int(bad.sum())
    self.judged += len(bad)
    if bad.mean() > self._highest:
      counts = {name: int(m.sum()) for name, m in missing.items() if m.any()}
      raise InputError(
        f"{int(bad.sum())} of {len(bad)} images have no reward ({counts}), "
        f"more than rewards.max_failures={self._highest}; see the warnings "
        "above, mend the reward and start again."
      )
    return ~bad

  def record(self) -> dict:
    """What a checkpoint must hold, as JSON."""
    return {"failed": self.failed, "judged": self.judged}
