# SPDX-License-Identifier: Apache-2.0
"""Several rewards as one advantage, with weights that keep a balance.

Weights belong to categories of prompts, since a portrait and a poster are
judged by different things (Qwen-Image-2.0-RL, arXiv 2606.27608, as reviews of
it report; its weights are not public). They adapt slowly and within bounds
(ours): a reward whose share of the advantage runs ahead of its configured
weight loses weight, so that none dominates.

Shapes: R rewards, G groups, K images of a group.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.objectives import advantages

DEFAULT = "default"


class Weights:
  """Category weights times an adapted factor per reward."""

  def __init__(
    self, table: Mapping[str, Mapping[str, float]], rate: float, bound: float,
    saved: Mapping[str, float] | None = None,
  ):  # fmt: skip
    """Starts at the table or at `record()`.

    Args:
      table: category to reward to weight; `default` serves every category
        that is not named.
      rate: of the adaptation, 0 for none.
      bound: a factor stays in [1 / bound, bound].
      saved: factors of the checkpoint that the run resumes from.

    Raises:
      InputError: no default, or a negative weight.
    """
    if DEFAULT not in table:
      raise InputError(
        f"rewards.weights has the categories {sorted(table)} but no "
        f"{DEFAULT!r}; add it."
      )
    if any(w < 0 for row in table.values() for w in row.values()):
      raise InputError("rewards.weights must not be negative.")
    if not 0 <= rate <= 1 or bound < 1:
      raise InputError(
        f"rewards need 0 <= adapt_rate <= 1 and adapt_bound >= 1, not {rate} "
        f"and {bound}."
      )
    self._table, self._rate, self._bound = table, rate, bound
    self.factors = dict(saved or {})

  def of(self, names: Sequence[str], kinds: Sequence[str]) -> np.ndarray:
    """Weights `[R, G]`; a reward that its category does not name has 0."""
    rows = [self._table.get(kind, self._table[DEFAULT]) for kind in kinds]
    return np.asarray(
      [[row.get(n, 0.0) * self.factors.get(n, 1.0) for row in rows]
       for n in names],
    )  # fmt: skip

  def adapt(self, names: Sequence[str], kinds: Sequence[str], z_RGK) -> None:
    """Moves the factors towards equal influence per configured weight.

    Args:
      names: of the rewards.
      kinds: of the groups.
      z_RGK: `advantages.standardised` rewards; how much a reward says is its
        mean absolute value here (0 in groups where it does not vary).
    """
    influence = np.abs(np.asarray(z_RGK)).mean(axis=2)
    # What a reward adds per unit of the weight that the table gave it.
    given = self.of(names, kinds)
    base = np.asarray([self.factors.get(n, 1.0) for n in names])[:, None]
    configured = np.sum(given / base, axis=1)
    used = np.sum(given * influence, axis=1)
    live = (configured > 0) & (used > 0)
    if self._rate == 0 or live.sum() < 2:
      return
    share = np.log(used[live] / configured[live])
    step = self._rate * (share.mean() - share)
    for name, change in zip(np.asarray(names)[live], step):
      factor = self.factors.get(str(name), 1.0) * float(np.exp(change))
      self.factors[str(name)] = min(max(factor, 1 / self._bound), self._bound)

  def record(self) -> dict[str, float]:
    """What a checkpoint must hold, as JSON."""
    return dict(self.factors)


def combine(
  values: Mapping[str, np.ndarray], kinds: Sequence[str], valid_GK: np.ndarray,
  weights: Weights, *, scale: str, clip: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
  """Advantages of a batch; the weights adapt afterwards.

  Args:
    values: rewards by name, each `[G * K]`, images of a group together.
    kinds: category of each group.
    valid_GK: see `Failures.count`.
    weights: see `Weights`.
    scale: see `advantages.standardised`.
    clip: bound of the advantages.

  Returns:
    `(advantages [G, K], kept [G])`, see `advantages.advantages`.
  """
  names = sorted(values)
  rewards = np.stack([values[n].reshape(valid_GK.shape) for n in names])
  given = weights.of(names, kinds)
  out, kept = advantages.advantages(
    rewards.astype(np.float32), given, valid_GK, scale=scale, clip=clip
  )
  z = advantages.standardised(rewards.astype(np.float32), valid_GK, scale)
  weights.adapt(names, kinds, z)
  return np.asarray(out), np.asarray(kept)
