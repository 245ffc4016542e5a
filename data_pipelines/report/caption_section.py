# SPDX-License-Identifier: Apache-2.0
"""The part of the page about captions: as found, and as made for the stage."""

import collections
import html
import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_pipelines.caption import mix
from data_pipelines.engine import shards
from data_pipelines.report import filter_section, sheets
from data_pipelines.report.results import Results
from data_pipelines.report.tables import table

_KINDS, _SAMPLES = 8, 4
_CHARACTERS = 1200


def found(results: Results) -> str:
  """Sample captions as they came, of every kind of record."""
  kinds = np.array([str(k) for k in results.table["kind"].to_pylist()], object)
  kept = results.kept()
  counts = collections.Counter(kinds[kept].tolist())
  parts = []
  for kind, count in counts.most_common(_KINDS):
    rows = results.sample(kept & (kinds == kind), _SAMPLES)
    records = results.records(rows)
    items = "".join(
      _item(
        sheets.pictures(records[row]),
        records[row].caption or "(none)",
        f"{results.table['language'][row]}, "
        f"{results.table['tokens'][row]} tokens",
      )
      for row in rows
    )
    parts.append(f"<h4>{html.escape(kind)} ({count:,})</h4>{items}")
  return "".join(parts)


def made(results: Results) -> str:
  """What the captioner wrote: how much of what, samples of every kind.

  '' where it has not run.
  """
  rows = _read(results)
  if not rows:
    return ""
  usable = [row for row in rows if row["valid"]]
  failed = [(row["reason"], row["id"]) for row in rows if not row["valid"]]
  models = ", ".join(sorted({row["model"] for row in rows}))
  parts = [
    f"<p class=note>By {html.escape(models)}: {len(usable):,} usable of "
    f"{len(rows):,}.</p>",
    _counts(rows, results.manifest.get("by_caption", {})),
  ]
  place = {id: i for i, id in enumerate(results.table["id"].to_pylist())}
  for kind in dict.fromkeys(row["kind"] for row in usable):
    chosen = [r for r in usable if r["kind"] == kind and r["id"] in place]
    chosen.sort(key=lambda row: results.hash_rank[place[row["id"]]])
    parts.append(f"<h4>{html.escape(kind)}</h4>")
    parts.append(_samples(results, chosen[:_SAMPLES], place))
  if failed:
    parts.append("<h4>Not usable</h4>")
    parts.append(filter_section.reasons_table(failed))
  return "<h2>Captions made</h2>" + "".join(parts)


def _read(results: Results) -> list[dict[str, Any]]:
  """Rows of the captioner, of shards that are complete."""
  folder = results.out / mix.FOLDER
  return [
    row
    for path in sorted(folder.glob("part-*.parquet"))
    if shards.read_marker(folder, path.stem) is not None
    for row in pq.read_table(path).to_pylist()
  ]


def _counts(rows: list[dict[str, Any]], used: dict[str, int]) -> str:
  """One row per kind and language; what the dataset took of every kind."""
  every = collections.Counter((r["kind"], r["language"]) for r in rows)
  valid = collections.Counter(
    (r["kind"], r["language"]) for r in rows if r["valid"]
  )
  lines = [
    [html.escape(kind or "(none)"), html.escape(language or ""), f"{n:,}",
     f"{valid[kind, language]:,}"]
    for (kind, language), n in sorted(every.items())
  ]  # fmt: skip
  text = table(["kind", "language", "asked for", "usable"], lines)
  if used:
    drawn = ", ".join(f"{n:,} {html.escape(kind)}" for kind, n in used.items())
    text += f"<p>In the dataset: {drawn}.</p>"
  return text


def _samples(results, rows, place) -> str:
  records = results.records([place[row["id"]] for row in rows])
  return "".join(
    _item(
      sheets.pictures(records[place[row["id"]]]),
      _readable(row),
      " ".join(filter(None, (row["language"], row["length"]))) + ", "
      f"{row['tokens']} tokens; found: "
      f"{records[place[row['id']]].caption[:120] or '(none)'}",
    )
    for row in rows
  )


def _readable(row: dict[str, Any]) -> str:
  if row["kind"] != "structured":
    return row["text"]
  return json.dumps(json.loads(row["text"]), ensure_ascii=False, indent=1)


def _item(pictures: str, caption: str, note: str) -> str:
  return (
    f'<div class="caption">{pictures}<p>{html.escape(caption[:_CHARACTERS])}'
    f"<br><i>{html.escape(note)}</i></p></div>"
  )
