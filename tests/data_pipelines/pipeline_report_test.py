# SPDX-License-Identifier: Apache-2.0
"""The page of a stage says what the stage did."""

import base64
import dataclasses
import html.parser
import io
import itertools
import pathlib
import re
import subprocess
import sys

import dirty_scores
import numpy as np
import pyarrow as pa
import pytest
from chart_rects import rects
from metric_table import rows
from PIL import Image

from data_pipelines import codec, images
from data_pipelines.engine import shards, stage
from data_pipelines.engine.config import parse
from data_pipelines.errors import InputError
from data_pipelines.filters import decide, rules
from data_pipelines.report import (
  charts,
  costs,
  data_section,
  filter_section,
  page,
  sheets,
)
from data_pipelines.report.results import Results, load
from experiments import data


class Page(html.parser.HTMLParser):
  """Tables, images and ids of a page."""

  def __init__(self, text):
    super().__init__()
    self.sources, self.ids, self.tags = [], [], []
    self.tables, self._cell = [], None
    self.attributes = set()
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.attributes |= attrs.keys()
    self.tags.append(tag)
    self.sources += [attrs[k] for k in ("src", "href") if k in attrs]
    self.ids += [attrs["id"]] if "id" in attrs else []
    if tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")
      self._cell = True

  def handle_endtag(self, tag):
    if tag in ("td", "th"):
      self._cell = None

  def handle_data(self, text):
    if self._cell:
      self.tables[-1][-1][-1] += text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(folder of a stage, its manifest, the page)."""
  folder = tmp_path_factory.mktemp("report")
  _, manifest = dirty_scores.run(folder, 90, seed=1)
  path = page.write_report(folder / "out")
  return folder / "out", manifest, path.read_text("utf-8")


def table_results(table, **filters):
  """Results of a metric table that was never on disk."""
  verdicts = decide.decide(table, filters, tuple(filters), 0)
  for name in verdicts.column_names:
    if name not in table.column_names:
      table = table.append_column(name, verdicts[name])
  return Results(
    out=pathlib.Path("nowhere"), table=table, filters=filters,
    order=tuple(filters), manifest={}, left_out=[], buckets=[], log={},
  )  # fmt: skip


def test_the_page_stands_alone(run):
  out, _, text = run
  found = Page(text)
  assert "script" not in found.tags and "link" not in found.tags
  anchors = [s for s in found.sources if s.startswith("#")]
  pictures = [s for s in found.sources if s not in anchors]
  assert {a[1:] for a in anchors} <= set(found.ids)
  assert len(pictures) > 30
  for picture in pictures:
    head, _, body = picture.partition(",")
    assert head == "data:image/webp;base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert max(image.size) <= 116
  assert text.count("http") == text.count('xmlns="http://www.w3.org/2000/svg"')
  assert [p.name for p in out.glob("report*")] == ["report.html"]


def test_the_sum_and_the_funnel_are_those_of_the_manifest(run):
  _, manifest, text = run
  equation = re.sub("<[^>]*>", "", re.search('"sum">(.*?)</p>', text)[1])
  total = sum(manifest["dropped"].values())
  assert equation == (
    f"{manifest['in']} in = {manifest['kept']} kept + {total} dropped + "
    f"{manifest['quarantined']} quarantined"
  )
  funnel = Page(text).tables[0][1:]
  dropped = {row[0]: int(row[3]) for row in funnel}
  assert (
    dropped == manifest["dropped"] and sum(v > 0 for v in dropped.values()) > 8
  )
  for before, after in itertools.pairwise(funnel):
    assert before[2] == after[1]  # what one keeps, the next gets
  for row in funnel:
    assert int(row[1]) - int(row[3]) == int(row[2])
    assert row[0] == "bucket" or float(row[7]) >= 0  # seconds of the decision
  speed = {row[0]: row[10] for row in funnel}
  assert speed["perceptual_duplicate"] and speed["compression"]
  assert not speed["nsfw"]  # a score, not a metric


def test_every_filter_has_a_section_with_examples(run):
  _, manifest, text = run
  for name in manifest["config"]["filter_order"]:
    section = re.search(f'<section id="{name}">.*?</section>', text, re.S)[0]
    dropped = manifest["dropped"][name]
    assert f"{dropped:,} of" in section
    if name == "broken":
      assert "damaged image" in section
    elif dropped:
      assert section.count("<figure") >= min(dropped, 8)
    for column in ("short_side", "tokens", "edit_similarity"):
      bounded = f"_{column} =" in section
      assert (f">{column}" in section.replace(" (log scale)", "")) == bounded


def test_reasons_and_stand_ins_are_named(run):
  _, manifest, text = run
  for reason in manifest["reasons"]:
    assert reason in text
  assert text.count('class="warn"') == 1
  assert "stand-in for an NSFW classifier" in text


def test_a_second_page_differs_only_in_times(run):
  out, _, text = run
  again = page.render(load(out))
  cells = re.compile(r"<td>[\d,.]*</td>")
  assert cells.sub("", again) == cells.sub("", text)


def test_captions_and_buckets(run):
  _, manifest, text = run
  for kind, count in manifest["by_kind"].items():
    assert f"<h4>{kind} ({count:,})</h4>" in text
  buckets = next(t for t in Page(text).tables if t[0][0] == "task")
  assert sum(int(row[3]) for row in buckets[1:]) == manifest["kept"]


def test_made_captions_are_shown_by_kind_with_what_failed(tmp_path):
  from caption_data import dataset
  from stages import config
  from stages import run as run_stage

  out = tmp_path / "out"
  run_stage(out, dataset(tmp_path / "in"), config=config(
    filter_order=(), max_enlarge=2.0))  # fmt: skip
  before = (out / "report.html").read_text("utf-8")
  assert "Captions made" not in before
  ids = load(out).table["id"].to_pylist()
  evil = "<b>a soft field</b> & so on"
  base = {"language": "en", "length": "short", "model": "m<1>", "tokens": 7,
          "reason": "", "valid": True}  # fmt: skip
  structured = '{"type":"chart","summary":"bars"}'
  made = [
    {**base, "id": ids[0], "kind": "general", "text": evil},
    {**base, "id": ids[1], "kind": "structured", "text": structured},
    {**base, "id": ids[2], "kind": "text", "valid": False, "text": "",
     "reason": "refusal (sorry)"},
  ]  # fmt: skip
  with shards.write(out / "caption", "part-00000", "x") as shard:
    shard.table(pa.Table.from_pylist(made))
  text = page.write_report(out).read_text("utf-8")
  after = text[text.index("Captions made") :]
  assert "&lt;b&gt;a soft field" in after and "<b>a soft" not in after
  assert "&quot;type&quot;: &quot;chart&quot;" in after
  assert "By m&lt;1&gt;: 2 usable of 3" in after
  counts = next(t for t in Page(after).tables if t[0][2] == "asked for")
  assert counts[1:] == [
    ["general", "en", "1", "1"], ["structured", "en", "1", "1"],
    ["text", "en", "1", "0"],
  ]  # fmt: skip
  assert "refusal" in after[after.index("Not usable") :]


def test_what_a_bucket_cuts_off():
  made = [
    {"id": "r0", "status": "kept", "bucket": "64x64", "width": 128,
     "height": 64},
    {"id": "r1", "status": "kept", "bucket": "64x64", "width": 80,
     "height": 80},
    {"id": "r2", "status": "dropped", "bucket": None, "width": None,
     "height": None},
  ]  # fmt: skip
  results = dataclasses.replace(table_results(rows(3)), buckets=made)
  assert data_section._cropped(results) == {"64x64": 0.25}


def test_before_materialise_and_with_nothing_kept(tmp_path, run):
  out, manifest, _ = run
  source = out.parent / "in"
  values = {
    **manifest["config"], "filters": {"all": {"max_tokens": 0}},
    "filter_order": ["all"],
  }  # fmt: skip
  stage.run(
    stage.Run(
      config=parse(values), out=tmp_path / "out", inputs=(str(source),),
      verbs=("ingest", "measure", "score", "decide"), processes=1,
    )
  )  # fmt: skip
  text = page.write_report(tmp_path / "out").read_text("utf-8")
  assert "<b>0</b> kept" in text and "Not written yet" in text
  assert 'class="sum"' in text


def test_the_command(run):
  out, _, _ = run
  done = subprocess.run(
    [sys.executable, "-m", "data_pipelines.report", f"--out={out}"],
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0 and done.stdout.strip() == f"{out}/report.html"


def test_a_stage_without_verdicts_is_told(tmp_path):
  with pytest.raises(InputError, match="verb decide first"):
    page.write_report(tmp_path)


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
  monkeypatch.setattr(page, "load", lambda out: None)
  monkeypatch.setattr(page, "render", lambda results: "text")
  (tmp_path / "report.html").mkdir()
  with pytest.raises(InputError, match="cannot be written"):
    page.write_report(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_captions_cannot_break_the_page():
  evil = '" onerror="y" <script>alert(\'x\')</script>'
  image = images.encode_png(np.zeros((4, 4, 3), np.uint8))
  record = codec.Record(evil, "t2i", evil, "user", image, (), {})
  text = sheets.sheet(evil, [0], {0: record}, {0: evil})
  found = Page(text)
  assert "script" not in found.tags and len(found.sources) == 1
  assert not {"onerror", "onload"} & found.attributes


def test_samples_are_stable_and_mergeable():
  table = rows(200)
  results = table_results(table, words={"max_tokens": 50})
  every = np.ones(200, bool)
  names = table["id"].to_pylist()
  chosen = [names[i] for i in results.sample(every, 20)]
  shuffled = table.take(np.random.default_rng(0).permutation(200))
  again = table_results(shuffled, words={"max_tokens": 50})
  other = shuffled["id"].to_pylist()
  assert [other[i] for i in again.sample(every, 20)] == chosen
  halves = [
    {names[i] for i in results.sample(half, 20)}
    for half in (np.arange(200) < 100, np.arange(200) >= 100)
  ]
  assert set(chosen) <= halves[0] | halves[1]
  assert chosen != names[:20]


def test_the_nearest_to_a_threshold_are_shown():
  values = np.random.default_rng(0).uniform(0, 8, 60)
  table = rows(60, entropy=values.tolist())
  results = table_results(table, entropy={"min_entropy": 3.0})
  kept = values >= 3
  found = filter_section._nearest(results, values - 3, kept)
  expected = np.argsort(np.where(kept, values - 3, 99))[:8]
  assert found == expected.tolist()
  found = filter_section._nearest(results, values - 3, ~kept)
  expected = np.argsort(np.where(kept, 99, 3 - values))[:8]
  assert found == expected.tolist()


def test_rows_reach_a_filter_once():
  table = rows(4, tokens=[99, 99, 10, 10], short_side=[1, 300, 1, 300])
  results = table_results(
    table, words={"max_tokens": 50}, size={"min_short_side": 9}
  )
  assert results.reached("size").tolist() == [False, False, True, True]
  assert results.dropped("size").tolist() == [False, False, True, False]
  assert results.kept().tolist() == [False, False, False, True]
  funnel = Page(filter_section.funnel(results, {})).tables[0]
  assert [row[:4] for row in funnel[1:]] == [
    ["words", "4", "2", "2"], ["size", "2", "1", "1"],
  ]  # fmt: skip
  assert [row[6] for row in funnel[1:]] == ["2", "2"]


def test_what_is_lost_after_the_filters_is_in_the_sum():
  results = table_results(
    rows(7, tokens=[99] * 2 + [10] * 5), words={"max_tokens": 50}
  )
  results = dataclasses.replace(
    results,
    left_out=[{"id": "q"}, {"id": "r6"}],
    buckets=[
      {"id": "r5", "status": "dropped"}, {"id": "r6", "status": "quarantined"},
      *({"id": f"r{i}", "status": "kept"} for i in (2, 3, 4)),
    ],
  )  # fmt: skip
  assert results.kept().tolist() == [False] * 2 + [True] * 3 + [False] * 2
  funnel = Page(filter_section.funnel(results, {})).tables[0]
  assert funnel[-1][:4] == ["bucket", "5", "3", "1"]
  text = re.sub("<[^>]*>", "", page._sum(results))
  assert text == "8 in = 3 kept + 3 dropped + 2 quarantined"


def test_allowed_words_are_bars():
  table = rows(4, language=["en", "fr", None, "en"])
  results = table_results(table, words={"allow_language": ["en"]})
  svg = filter_section._charts(results, "words")
  assert ">2 of 2<" in svg and ">0 of 1<" in svg and ">1 of 1<" in svg


def test_a_filter_for_one_task_shows_that_task():
  table = rows(6, task=["t2i", "ti2i"] * 3, tokens=[1, 1, 2, 2, 9, 9])
  results = table_results(table, words={"min_tokens": 5, "task": "t2i"})
  (bound,) = filter_section.bounds_of(results, "words")
  judged = filter_section._judged(results, "words", bound)
  assert judged.tolist() == [True, False] * 3
  svg = filter_section._charts(results, "words")
  assert len(rects(svg, charts.DROPPED)) == 2


def test_costs():
  image = images.encode_png(np.zeros((64, 64, 3), np.uint8))
  good = codec.Record("a", "t2i", "words", "user", image, (), {})
  broken = codec.Record(
    "b", "t2i", "words", "user", images.EncodedImage(b"?", 1, 1, "RGB"), (), {}
  )
  spent = costs.measure([broken, good])
  assert spent.keys() == {
    "decode", "caption", "file", "pixels", "fingerprints", "edit",
  }  # fmt: skip
  assert all(ms >= 0 for ms in spent.values())
  bounds = rules.parse("c", {"min_jpeg_quality": 1, "max_blockiness": 2})
  assert costs.groups_of("c", bounds) == ["file", "pixels"]
  assert costs.groups_of("s", rules.parse("s", {"max_nsfw": 1})) == []
  assert costs.measure([]) == {}


def test_every_metric_has_a_cost_or_is_a_size():
  from data_pipelines.filters import metrics

  sizes = {
    "task", "kind", "references", "reference_short_side", "width", "height",
    "short_side", "pixels", "aspect",
  }  # fmt: skip
  assert metrics.METRICS.keys() - costs._GROUP_OF.keys() == sizes
  assert pa.types.is_integer(metrics.METRICS["pixels"])


def test_the_tiny_stage_can_be_reported(tmp_path):
  from stages import mixed_input

  config = data.get_config("tiny").to_dict() | {"shard_records": 8}
  stage.run(
    stage.Run(
      config=parse(config), out=tmp_path / "out",
      inputs=(str(mixed_input(tmp_path / "in")),), processes=1,
    )
  )  # fmt: skip
  found = Page(page.write_report(tmp_path / "out").read_text("utf-8"))
  assert set(config["filter_order"]) <= set(found.ids)
