# SPDX-License-Identifier: Apache-2.0
"""The part of the page about the data itself: what is in it, and what left."""

import collections
import html

import numpy as np

from data_pipelines import reasons, records
from data_pipelines.filters import rules
from data_pipelines.report import charts, sheets
from data_pipelines.report.results import Results
from data_pipelines.report.tables import table

_KEPT, _LABELS, _LOST = 24, 14, 10
# Batches that a bucket is compared with; ours.
_BATCH = 64
_WORDS = ("task", "kind", "language", "format", "source_mode")
_NUMBERS = ("short_side", "pixels", "tokens", "bytes")


def kept_sheet(results: Results) -> str:
  """A sample of what stays."""
  rows = results.sample(results.kept(), _KEPT)
  labels = {
    row: (
      f"{results.table['width'][row]} x {results.table['height'][row]}, "
      f"{results.table['tokens'][row]} tokens"
    )
    for row in rows
  }
  title = f"{len(rows)} of {int(results.kept().sum()):,} kept records"
  return sheets.sheet(title, rows, results.records(rows), labels)


def distributions(results: Results) -> str:
  """Categories, languages, formats, sizes: all records, kept ones filled."""
  kept = results.kept()
  parts = []
  for column in _WORDS:
    values = [str(v) for v in results.table[column].to_pylist()]
    every = collections.Counter(values)
    stayed = collections.Counter(v for v, k in zip(values, kept) if k)
    most = every.most_common(_LABELS)
    rows = {label: (count, stayed[label]) for label, count in most}
    rest = len(values) - sum(count for _, count in most)
    if rest:
      left = int(kept.sum()) - sum(stayed[label] for label, _ in most)
      rows[f"{len(every) - len(most)} others"] = (rest, left)
    parts.append(charts.bars(rows, f"{column} (filled: kept)"))
  for column in _NUMBERS:
    values = rules.numbers(results.table, column)[kept]
    parts.append(charts.histogram(values, title=f"{column}, kept"))
  ratio = rules.numbers(results.table, "width") / rules.numbers(
    results.table, "height"
  )
  parts.append(charts.histogram(ratio[kept], title="width / height, kept"))
  return f'<div class="charts">{"".join(parts)}</div>'


def buckets(results: Results) -> str:
  """Shapes of the written dataset, what they cut off, what none could take."""
  folder = results.out / "data"
  if not (folder / "manifest.json").is_file():
    return "<p>Not written yet: run the verb materialise.</p>"
  manifest = records.load_manifest(folder)
  index = records.read_index([folder / s["path"] for s in manifest["shards"]])
  shapes = np.stack(
    [index.height, index.width, index.references], axis=1
  )  # fmt: skip
  cut = _cropped(results)
  found, counts = np.unique(shapes, axis=0, return_counts=True)
  rows = [
    [
      "edit" if references else "text to image",
      f"{height} x {width}",
      str(references),
      f"{count:,}",
      f"{count / len(index):.1%}",
      f"{count % _BATCH:,}" if count >= _BATCH else "smaller than one batch",
      f"{cut[f'{height}x{width}']:.1%}",
    ]
    for (height, width, references), count in sorted(
      zip(found.tolist(), counts.tolist()), key=lambda item: -item[1]
    )
  ]
  head = [
    "task", "height x width", "references", "records", "share",
    f"left over in batches of {_BATCH}", "of the source cut off",
  ]  # fmt: skip
  lost = [row for row in results.buckets if row["status"] == "dropped"]
  note = f"<p>{len(lost):,} records fit no bucket"
  if lost:
    note += f", for example: {html.escape(lost[0]['reason'])}"
  ids = {row["id"]: row["reason"] for row in lost}
  mask = np.array([id in ids for id in results.table["id"].to_pylist()], bool)
  sample = results.sample(mask, _LOST)
  labels = {
    row: reasons.details(ids[results.table["id"][row].as_py()])
    for row in sample
  }
  pictures = sheets.sheet(
    "Without a bucket", sample, results.records(sample), labels
  )
  return f"{note}.</p>{table(head, rows)}{pictures}"


def _cropped(results: Results) -> dict[str, float]:
  """Mean share of a target that lies outside of its bucket, by bucket."""
  shares: dict[str, list[float]] = collections.defaultdict(list)
  for row in results.buckets:
    if row["status"] == "kept":
      height, width = map(int, row["bucket"].split("x"))
      scale = min(row["width"] / width, row["height"] / height)
      seen = scale**2 * width * height / (row["width"] * row["height"])
      shares[row["bucket"]].append(1 - seen)
  return {bucket: float(np.mean(s)) for bucket, s in shares.items()}
