# SPDX-License-Identifier: Apache-2.0
"""The charts of a report show the numbers that they are given."""

import re

import numpy as np
import pytest
from chart_rects import rects

from data_pipelines.report import charts


def test_histograms_show_counts_and_bounds():
  values = np.array([1.0] * 30 + [5.0] * 60 + [9.0] * 15 + [np.nan])
  svg = charts.histogram(values, low=3.0, title="a & b")
  assert "a &amp; b" in svg and ">60<" in svg
  ((_, low),) = rects(svg, charts.DROPPED)
  (_, high), (_, last) = rects(svg, charts.KEPT)
  assert high == pytest.approx(2 * low, rel=0.02)
  assert low == pytest.approx(2 * last, rel=0.02)
  line = float(re.search(rf'd="M([\d.]+) [^>]*{charts.LINE}', svg)[1])
  starts = [float(x) for x in re.findall(r'<rect x="([\d.]+)"', svg)]
  # Kept bars are drawn first: 5, then 9; then what was dropped, 1.
  assert starts[2] < line < starts[0]
  share = (line - 40) / (440 - 6 - 40)
  assert share == pytest.approx((3 - 1) / (9 - 1), abs=0.02)
  assert charts.histogram(np.array([np.nan])) == ""
  assert rects(charts.histogram(np.ones(5)), charts.KEPT)


def test_wide_ranges_are_logarithmic():
  values = np.logspace(0, 5, 400)
  svg = charts.histogram(values, high=1000.0, title="size")
  assert "size (log scale)" in svg
  line = float(re.search(rf'd="M([\d.]+) [^>]*{charts.LINE}', svg)[1])
  assert (line - 40) / (440 - 6 - 40) == pytest.approx(3 / 5, abs=0.02)


def test_bars_are_proportional():
  svg = charts.bars({"en": (100, 80), "zh": (25, 0)}, "language")
  assert [w for w, _ in rects(svg, charts.DROPPED)] == [220, 55]
  assert [w for w, _ in rects(svg, charts.KEPT)] == [176, 0]
  assert ">80 of 100<" in svg and ">0 of 25<" in svg
