# SPDX-License-Identifier: Apache-2.0
"""The part of the page about the filters: the funnel, then each of them."""

import collections
import html
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines import reasons
from data_pipelines.engine import materialise
from data_pipelines.filters import rules
from data_pipelines.report import charts, costs, sheets
from data_pipelines.report.results import Results
from data_pipelines.report.tables import table

_DROPPED, _NEAR, _PAIRS, _WORDS = 10, 8, 8, 20
_UNITS = {
  "exact_duplicate": "equal bytes",
  "perceptual_duplicate": "{} of 64 bits differ",
  "embedding_duplicate": "cosine {}",
}
_NOT_BOUNDS = ("broken", "distribution", "decontaminate", *_UNITS)


def funnel(results: Results, spent: Mapping[str, float]) -> str:
  """One row per filter: in, kept, dropped, and what it cost.

  Args:
    results: of the stage.
    spent: milliseconds per group of metrics, see `costs.measure`.
  """
  seconds = results.log.get("decide", {}).get("filters", {})
  rows = []
  for name in results.order:
    reached, dropped = results.reached(name).sum(), results.dropped(name).sum()
    groups = costs.groups_of(name, bounds_of(results, name))
    cost = sum(spent.get(group, 0.0) for group in groups)
    share = dropped / max(reached, 1)
    alone = _alone(results, name)
    rows.append([
      f'<a href="#{html.escape(name)}">{html.escape(name)}</a>',
      f"{reached:,}", f"{reached - dropped:,}", f"{dropped:,}", f"{share:.1%}",
      _bar(share),
      "" if alone is None else f"{alone:,}",
      f"{seconds[name]:.3f}" if name in seconds else "",
      ", ".join(groups),
      f"{cost:.2f}" if cost else "",
      f"{1000 / cost:,.0f}" if cost else "",
    ])  # fmt: skip
  left = int(results.passed().sum())
  # Pictures that fit no bucket are found last.
  for status, name in reversed(materialise.DROPPED.items()):
    lost = sum(row["status"] == status for row in results.buckets)
    # What cannot be decoded again is lost in the last step too.
    last = status == "dropped"
    kept = int(results.kept().sum()) if last else left - lost
    if lost or (results.buckets and last):
      share = lost / max(left, 1)
      rows.append([
        f'<a href="#bucket">{name}</a>', f"{left:,}", f"{kept:,}",
        f"{lost:,}", f"{share:.1%}", _bar(share), "", "", "", "", "",
      ])  # fmt: skip
    left = kept
  return table(
    ["filter", "in", "kept", "dropped", "share", "", "dropped if first",
     "decide, s", "metrics", "ms/record", "records/s"],
    rows,
  )  # fmt: skip


def _bar(lost: float) -> str:
  return f'<div class="bar"><b style="width:{100 * (1 - lost):.1f}%"></b></div>'


def bounds_of(results: Results, name: str) -> tuple[rules.Bound, ...]:
  """The bounds of a filter of single rows, () for the others."""
  if name in _NOT_BOUNDS:
    return ()
  return rules.parse(name, results.filters[name])


def section(results: Results, name: str) -> str:
  """One filter: options, histograms, examples of what it dropped and kept."""
  dropped = int(results.dropped(name).sum())
  reached = int(results.reached(name).sum())
  options = ", ".join(f"{k} = {v}" for k, v in results.filters[name].items())
  parts = [
    f'<section id="{html.escape(name)}"><h3>{html.escape(name)} <small>'
    f"{dropped:,} of {reached:,} dropped</small></h3>",
    f"<p class=note>{html.escape(options or 'no options')}</p>",
  ]
  parts.append(_charts(results, name))
  if name in _UNITS:
    parts.append(_duplicates(results, name))
  elif name == "broken":
    parts.append(_reasons(results))
  else:
    parts.append(_examples(results, name))
  parts += [_near(results, name, b) for b in bounds_of(results, name)]
  return "".join(parts) + "</section>"


def _alone(results: Results, name: str) -> int | None:
  """Rows that the filter would drop if it came first."""
  column = f"drops.{name}"
  if column not in results.table.column_names:
    return None
  return int(rules.to_numpy(results.table[column]).sum())


def _charts(results: Results, name: str) -> str:
  """One chart per column, with all the bounds of the filter on it."""
  bounds = bounds_of(results, name)
  parts = []
  for column in dict.fromkeys(b.column for b in bounds):
    chosen = [b for b in bounds if b.column == column]
    limits = {b.side: b.limit for b in chosen}
    reached = _judged(results, name, chosen[0])
    if "allow" in limits:
      values = results.table[column].filter(reached).to_pylist()
      parts.append(_word_bars(values, set(limits["allow"]), column))
    else:
      values = rules.numbers(results.table, column)[reached]
      ends = (limits.get("min"), limits.get("max"))
      parts.append(charts.histogram(values, *ends, title=column))
  return f'<div class="charts">{"".join(parts)}</div>'


def _word_bars(values: Sequence[str | None], allowed: set, title: str) -> str:
  every = collections.Counter(values)
  rows = {
    str(word): (count, count * (word in allowed or word is None))
    for word, count in every.most_common(_WORDS)
  }
  return charts.bars(rows, title)


def _examples(results: Results, name: str) -> str:
  rows = results.sample(results.dropped(name), _DROPPED)
  return sheets.sheet(
    "Dropped", rows, results.records(rows), _details(results, rows)
  )


def _judged(results: Results, name: str, bound: rules.Bound) -> np.ndarray:
  """[N] rows that a bound was applied to."""
  return results.reached(name) & rules.judged(results.table, bound)


def _near(results: Results, name: str, bound: rules.Bound) -> str:
  """Records on both sides of a threshold, the nearest first."""
  if bound.side == "allow":
    return ""
  values = rules.numbers(results.table, bound.column)
  reached = _judged(results, name, bound) & np.isfinite(values)
  lost = values < bound.limit if bound.side == "min" else values > bound.limit
  parts = []
  for title, mask in (("Just kept", ~lost), ("Just dropped", lost)):
    rows = _nearest(results, values - bound.limit, reached & mask)
    labels = {
      row: f"{bound.column} {rules.number_text(values[row])}" for row in rows
    }
    limit = rules.number_text(bound.limit)
    full = f"{title}: {bound.column} against {limit}"
    parts.append(sheets.sheet(full, rows, results.records(rows), labels))
  return "".join(parts)


def _nearest(results: Results, margin: np.ndarray, mask: np.ndarray):
  rows = np.flatnonzero(mask)
  # Ties are broken by the hash, not by the order of the input.
  order = np.lexsort((results.hash_rank[rows], np.abs(margin[rows])))
  return rows[order][:_NEAR].tolist()


def _duplicates(results: Results, name: str) -> str:
  """A fair sample of pairs; and those least alike, most likely wrong."""
  ids = {id: i for i, id in enumerate(results.table["id"].to_pylist())}
  twins = results.table["duplicate_of"].to_pylist()
  values = rules.numbers(results.table, "value")
  mask = results.dropped(name)
  sampled = results.sample(mask, int(mask.sum()))
  chosen = {"A sample": sampled[:_PAIRS]}
  if name != "exact_duplicate":
    # Cosines fall where distances rise.
    sign = 1 if name == "embedding_duplicate" else -1
    order = sorted(sampled, key=lambda row: sign * values[row])
    chosen["Least alike"] = order[:_PAIRS]
  unit = _UNITS[name]
  parts = []
  for title, rows in chosen.items():
    both = [(ids[twins[row]], row) for row in rows]
    records = results.records([row for pair in both for row in pair])
    labels = {row: unit.format(rules.number_text(values[row])) for row in rows}
    parts.append(sheets.pairs(title, both, records, labels))
  return "".join(parts)


def _details(results: Results, rows: Sequence[int]) -> dict[int, str]:
  return {row: results.table["detail"][row].as_py() for row in rows}


def _reasons(results: Results) -> str:
  rows = np.flatnonzero(results.dropped("broken")).tolist()
  return reasons_table(
    [
      (results.table["detail"][row].as_py(), results.table["id"][row].as_py())
      for row in rows
    ]
  )


def reasons_table(found: Sequence[tuple[str, str]]) -> str:
  """Reasons with their counts and a few examples.

  Args:
    found: (reason, where).
  """
  groups: dict[str, list[tuple[str, str]]] = {}
  for reason, where in found:
    groups.setdefault(reasons.category(reason), []).append((reason, where))
  rows = [
    [
      html.escape(kind),
      f"{len(items):,}",
      "<br>".join(
        f"{html.escape(where[-80:])}: {html.escape(reason[:160])}"
        for reason, where in items[:3]
      ),
    ]
    for kind, items in sorted(groups.items(), key=lambda g: -len(g[1]))
  ]
  return table(["reason", "count", "for example"], rows) if rows else ""
