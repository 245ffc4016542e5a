# SPDX-License-Identifier: Apache-2.0
"""Wilson's interval against his formula and its edge cases."""

import math

import pytest

from qi2_jax.evaluation.intervals import wilson


@pytest.mark.parametrize("successes, count", [(0, 10), (3, 10), (83, 100)])
def test_equals_the_formula(successes, count):
  z, p = 1.959963985, successes / count
  centre = p + z * z / (2 * count)
  spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2))
  scale = 1 + z * z / count
  expected = (centre - spread) / scale, (centre + spread) / scale
  assert wilson(successes, count) == pytest.approx(expected, abs=1e-9)


def test_never_collapses_and_stays_inside():
  low, high = wilson(10, 10)
  assert 0.6 < low < 0.8 and high == 1.0
  assert wilson(0, 10)[0] == 0.0


def test_no_answers_say_nothing():
  assert wilson(0, 0) == (0.0, 1.0)


def test_more_answers_narrow_it():
  widths = [high - low for low, high in (wilson(n // 2, n) for n in (10, 100))]
  assert widths[1] < widths[0] / 2
