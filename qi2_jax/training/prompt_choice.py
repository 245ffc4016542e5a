# SPDX-License-Identifier: Apache-2.0
"""Prompts that teach are drawn more often than solved and hopeless ones.

A prompt whose images all have one reward gives no advantage. The loader
brings more prompts than a step needs; which of them are used depends on the
spread of rewards that each had the last time (Qwen-Image-2.0-RL filters by
that range; thresholds are not public, this rule is ours). What was never
tried counts as promising, and nothing is ever ruled out.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from qi2_jax.errors import InputError


def name_of(prompt: str, references: Sequence[np.ndarray]) -> str:
  """A short name of a prompt and its references, the same on every run."""
  digest = hashlib.sha256(prompt.encode())
  for image in references:
    digest.update(np.ascontiguousarray(image).tobytes())
  return digest.hexdigest()[:12]


class PromptChoice:
  """The spread of rewards of every prompt that was tried."""

  def __init__(self, floor: float, saved: Mapping[str, float] | None = None):
    """Starts from nothing or from `record()`.

    Args:
      floor: weight of a prompt without spread, relative to 1 for one whose
        rewards span their whole range.
      saved: of the checkpoint that the run resumes from.

    Raises:
      InputError: a floor outside (0, 1].
    """
    if not 0 < floor <= 1:
      raise InputError(
        f"config.rl.prompt_floor={floor} must be in (0, 1]; 1 draws all "
        "prompts alike."
      )
    self._floor, self._spread = floor, dict(saved or {})

  def choose(
    self, names: Sequence[str], count: int, rng: np.random.Generator
  ) -> np.ndarray:
    """Which of the prompts to use: `count` of their numbers, rising.

    Args:
      names: of the prompts that there are.
      count: how many are needed.
      rng: of this step.
    """
    weights = [max(self._floor, self._spread.get(n, 1.0)) for n in names]
    # Keys whose largest are a weighted sample without replacement
    # (Efraimidis & Spirakis 2006).
    keys = np.log(rng.random(len(names))) / np.asarray(weights)
    return np.sort(np.argsort(-keys, kind="stable")[:count])

  def learn(self, names: Sequence[str], rewards_RGK: np.ndarray) -> None:
    """Notes the spread of each group, relative to that of the batch.

    Args:
      names: of the groups.
      rewards_RGK: of several rewards the mean spread counts; NaN is missing.
    """
    with np.errstate(invalid="ignore"):
      low, high = (
        f(rewards_RGK, axis=2, initial=start, where=np.isfinite(rewards_RGK))
        for f, start in ((np.min, np.inf), (np.max, -np.inf))
      )
      span_RG = np.maximum(high - low, 0.0)
      whole_R1 = high.max(axis=1, keepdims=True) - low.min(
        axis=1, keepdims=True
      )
      share_RG = span_RG / np.where(whole_R1 > 0, whole_R1, 1.0)
    for name, share in zip(names, share_RG.mean(axis=0)):
      self._spread[name] = round(float(share), 4)

  def record(self) -> dict[str, float]:
    """What a checkpoint must hold, as JSON."""
    return dict(self._spread)
