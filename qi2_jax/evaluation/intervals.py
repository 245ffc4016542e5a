# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals of a share of right answers."""

from scipy import stats


def wilson(
  successes: int, count: int, confidence: float = 0.95
) -> tuple[float, float]:
  """Wilson's score interval of a binomial share.

  Unlike share +- 2 standard errors it stays inside [0, 1] and does not
  collapse to a point at 0 or 1 successes of few.

  Args:
    successes: number of right answers.
    count: number of answers.
    confidence: of the two-sided interval.

  Returns:
    `(low, high)`; `(0, 1)` if there are no answers.
  """
  if count == 0:
    return 0.0, 1.0
  interval = stats.binomtest(successes, count).proportion_ci(
    confidence, method="wilson"
  )
  return float(interval.low), float(interval.high)
