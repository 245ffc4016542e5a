# SPDX-License-Identifier: Apache-2.0
"""Small charts as SVG text, which a page can hold without any script.

Written by hand: a plotting library would draw the same bars as 20 KB of paths
each, in fonts of its own.
"""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.filters.rules import number_text

KEPT, DROPPED, INK, LINE = "#2a7f8f", "#d97745", "#444", "#b3242c"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 440, 164, 40, 24, 30
_BINS = 44


def histogram(
  values: np.ndarray,
  low: float | None = None,
  high: float | None = None,
  title: str = "",
) -> str:
  """A histogram with the bounds of a filter as lines.

  Args:
    values: 1-D; NaN is left out.
    low: smallest value that stays, if there is a bound.
    high: largest value that stays.
    title: name of the metric.

  Returns:
    An <svg> element; bars outside the bounds have another colour.
  """
  values = values[np.isfinite(values)]
  if not len(values):
    return ""
  limits = [x for x in (low, high) if x is not None]
  first, last, log = _range(values, limits)
  warp = np.log10 if log else np.asarray
  edges = np.linspace(warp(first), warp(last), _BINS + 1)
  place = np.clip(warp(np.clip(values, first, last)), edges[0], edges[-1])
  lost = np.zeros(len(values), bool)
  if low is not None:
    lost |= values < low
  if high is not None:
    lost |= values > high
  counts = [np.histogram(place[mask], edges)[0] for mask in (~lost, lost)]
  top = max(1, int(sum(counts).max()))

  def x_of(value: float) -> float:
    share = (warp(value) - edges[0]) / (edges[-1] - edges[0])
    return _LEFT + (_WIDTH - _LEFT - 6) * float(share)

  parts = [_text(0, 11, title + (" (log scale)" if log else ""), "start")]
  parts += _bars(counts, top)
  parts += _axis(first, last, log, top, x_of)
  for limit in limits:
    x = x_of(min(max(limit, first), last))
    parts.append(
      f'<path d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="{LINE}" '
      'stroke-width="1.5" stroke-dasharray="4 3"/>'
    )
    anchor = "end" if x > _WIDTH - 30 else "middle"
    parts.append(_text(x, _TOP - 5, number_text(limit), anchor, LINE))
  return _svg(_WIDTH, _HEIGHT, parts)


def bars(rows: Mapping[str, Sequence[int]], title: str) -> str:
  """Horizontal bars: of the first count, the part of the second is filled.

  Args:
    rows: label -> (all, kept).
    title: what the labels are.
  """
  top = max((all_ for all_, _ in rows.values()), default=0) or 1
  left, step, wide = 120, 18, 220
  parts = [_text(0, 11, title, "start")]
  for i, (label, (all_, kept)) in enumerate(rows.items()):
    y = 20 + step * i
    parts.append(_text(left - 6, y + 11, label[:18], "end"))
    for count, colour in ((all_, DROPPED), (kept, KEPT)):
      width = max(wide * count / top, 0.6 if count else 0)
      parts.append(_rect(left, y, width, step - 4, colour))
    x = left + wide * all_ / top + 6
    parts.append(_text(x, y + 11, f"{kept:,} of {all_:,}", "start"))
  return _svg(left + wide + 100, 24 + step * len(rows), parts)


def _range(
  values: np.ndarray, limits: Sequence[float]
) -> tuple[float, float, bool]:
  """(first, last, whether on a log scale) without far outliers."""
  first, last = np.quantile(values, (0.002, 0.998)).tolist()
  for limit in limits:
    first, last = min(first, limit), max(last, limit)
  middle = float(np.quantile(values, 0.5))
  log = first > 0 and last / first > 40 and middle < last / 8
  if last <= first:
    first, last = first - 0.5, last + 0.5
  return first, last, log


def _bars(counts: Sequence[np.ndarray], top: int) -> list[str]:
  width = (_WIDTH - _LEFT - 6) / _BINS
  room = _HEIGHT - _BOTTOM - _TOP - 4
  parts = []
  base = np.zeros(_BINS)
  for heights, colour in zip(counts, (KEPT, DROPPED)):
    for i in np.flatnonzero(heights).tolist():
      height = max(room * heights[i] / top, 2)
      y = _HEIGHT - _BOTTOM - base[i] - height
      x = _LEFT + width * i
      parts.append(_rect(x, y, width - 0.8, height, colour))
      base[i] += height
  return parts


def _axis(first, last, log, top, x_of) -> list[str]:
  y = _HEIGHT - _BOTTOM
  parts = [
    f'<path d="M{_LEFT} {y}H{_WIDTH - 6}" stroke="{INK}"/>',
    _text(_LEFT - 4, _TOP + 10, f"{top:,}", "end"),
    _text(_LEFT - 4, y, "0", "end"),
  ]
  for value in _ticks(first, last, log):
    x = x_of(value)
    parts.append(f'<path d="M{x:.1f} {y}v4" stroke="{INK}"/>')
    parts.append(_text(x, y + 15, number_text(value), "middle"))
  return parts


def _ticks(first: float, last: float, log: bool) -> list[float]:
  """Four to seven round numbers."""
  if log:
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)))
    marks = [m * 10.0**p for p in (*powers, powers.stop) for m in (1, 3)]
    marks = [m for m in marks if first <= m <= last]
    return marks[:: max(1, len(marks) // 6)]
  raw = (last - first) / 5
  power = 10.0 ** math.floor(math.log10(raw))
  step = min((1, 2, 5, 10), key=lambda m: abs(m * power - raw)) * power
  start = math.ceil(first / step)
  return [step * i for i in range(start, math.floor(last / step + 1e-9) + 1)]


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
  return (
    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
    f'height="{height:.1f}" fill="{fill}"/>'
  )


def _text(x: float, y: float, text: str, anchor: str, fill: str = INK) -> str:
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" '
    f'font-size="11">{html.escape(text)}</text>'
  )


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    f'width="{width}" height="{height}" font-family="sans-serif">'
    f"{''.join(parts)}</svg>"
  )
