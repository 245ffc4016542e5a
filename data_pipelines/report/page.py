# SPDX-License-Identifier: Apache-2.0
"""Writes OUT/report.html: one file, no scripts, nothing fetched."""

import html
import os
import pathlib

from data_pipelines.errors import InputError
from data_pipelines.report import (
  caption_section,
  costs,
  data_section,
  filter_section,
)
from data_pipelines.report.results import Results, load

NAME = "report.html"
_TIMED = 16  # records on which the cost of the metrics is measured

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;color:#222;max-width:1180px;
margin:24px auto;padding:0 16px}
h1,h2,h3{line-height:1.2}h2{margin-top:40px;border-bottom:1px solid #ddd}
h3{margin:28px 0 4px}h3 small{color:#777;font-weight:400}h4{margin:12px 0 4px}
table{border-collapse:collapse;margin:8px 0}
td,th{padding:3px 10px;text-align:right;border-bottom:1px solid #eee;
vertical-align:top}
td:first-child,th:first-child,td:last-child{text-align:left}
.bar{width:120px;height:10px;background:#d97745;margin-top:5px}
.bar b{display:block;height:10px;background:#2a7f8f}
.sheet{display:flex;flex-wrap:wrap;gap:10px}
figure{margin:0;width:126px;font-size:11px;overflow-wrap:anywhere}
figure.pair,figure.edit{width:auto;max-width:380px}
figcaption i,.note,.caption i{color:#777;font-style:normal}
img{max-width:116px;max-height:116px;margin-right:4px;vertical-align:top;
background:repeating-conic-gradient(#ddd 0 25%,#fff 0 50%) 0 0/12px 12px}
.arrow{margin:0 4px 0 0}.gone{color:#b3242c}
.charts{display:flex;flex-wrap:wrap;gap:18px}
.warn{background:#fff3e2;border-left:4px solid #d97745;padding:6px 12px}
.caption{display:flex;gap:12px;margin:6px 0}.caption p{margin:0}
.sum{font-size:17px}
"""


def write_report(out: pathlib.Path) -> pathlib.Path:
  """Writes the page of a stage.

  Args:
    out: folder of the stage; *decide* has run.

  Returns:
    The page.

  Raises:
    InputError: *decide* has not run, or the page cannot be written.
  """
  out = pathlib.Path(out)
  text = render(load(out))
  path = out / NAME
  temporary = path.with_name(f"{NAME}.tmp-{os.getpid()}")
  try:
    # Captions may hold half a surrogate pair, which UTF-8 cannot.
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise InputError(
      f"The report {path} cannot be written ({error.strerror}); check the free "
      "space."
    ) from error
  return path


def render(results: Results) -> str:
  """The page as text."""
  name = str(results.manifest.get("stage") or results.out.name)
  sample = results.sample(results.kept(), _TIMED)
  spent = costs.measure(results.records(sample).values())
  left_out = [(row["reason"], row["where"]) for row in results.left_out]
  sections = "".join(
    filter_section.section(results, name) for name in results.order
  )
  parts = [
    f"<h1>{html.escape(name)}</h1>",
    _sum(results),
    _stand_ins(results),
    "<h2>Funnel</h2>",
    filter_section.funnel(results, spent),
    f"<p class=note>ms/record: CPU time of the metrics behind a filter, on "
    f"{len(sample)} kept records when this page was made.</p>",
    _verbs(results),
    "<h2>Kept</h2>",
    data_section.kept_sheet(results),
    "<h2>Distributions</h2>",
    data_section.distributions(results),
    '<h2 id="bucket">Buckets</h2>',
    data_section.buckets(results),
    "<h2>Captions</h2>",
    caption_section.found(results),
    caption_section.made(results),
    "<h2>Filters</h2>",
    sections,
    "<h2>Quarantine</h2>",
    filter_section.reasons_table(left_out) or "<p>Nothing was left out.</p>",
    _origin(results),
  ]
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>'
    f"{html.escape(name)}</title><style>{_STYLE}</style><body>"
    f"{''.join(parts)}</body></html>"
  )


def _sum(results: Results) -> str:
  """The equation that must hold."""
  count = results.table.num_rows
  unreadable_later = sum(
    row["status"] == "quarantined" for row in results.buckets
  )
  quarantined = len(results.left_out)
  total = count + quarantined - unreadable_later
  kept = int(results.kept().sum())
  return (
    f'<p class="sum"><b>{total:,}</b> in = <b>{kept:,}</b> kept + '
    f"<b>{total - kept - quarantined:,}</b> dropped + "
    f"<b>{quarantined:,}</b> quarantined</p>"
  )


def _stand_ins(results: Results) -> str:
  """What made the scores; stand-ins are called so."""
  scores = results.manifest.get("scores", {})
  return "".join(
    f'<p class="{"warn" if "stand-in" in what else "note"}">Score '
    f"<b>{html.escape(name)}</b>: {html.escape(what)}</p>"
    for name, what in scores.items()
  )


def _verbs(results: Results) -> str:
  """Seconds and rate of the verbs, as they were last run."""
  rows = [
    f"{html.escape(verb)}: {line['items']:,} items in {line['seconds']:.1f} s, "
    f"{line['items'] / max(line['seconds'], 1e-6):,.0f}/s"
    for verb, line in results.log.items()
  ]
  return f"<p class=note>{'<br>'.join(rows)}</p>" if rows else ""


def _origin(results: Results) -> str:
  fields = ("id", "config_sha256", "inputs", "code", "libraries")
  lines = [
    f"{name}: {results.manifest[name]}"
    for name in fields
    if name in results.manifest
  ]
  return f"<h2>Origin</h2><pre>{html.escape(chr(10).join(lines))}</pre>"
