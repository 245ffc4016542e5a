# SPDX-License-Identifier: Apache-2.0
"""Captions over shards: rows, retries, dead captioners."""

import collections
import json

import pytest
from caption_data import (
  ENGLISH_ONLY,
  SETTINGS,
  client,
  dataset,
  files,
  table,
)
from caption_server import DROP, STRUCTURED, good, prompt_of, well_behaved

from data_pipelines import captioner
from data_pipelines.caption import checks
from data_pipelines.caption.kinds import Wish
from data_pipelines.caption.record import Settings, plain
from data_pipelines.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return dataset(tmp_path_factory.mktemp("captions") / "data")


def test_every_record_gets_the_kinds_that_suit_it(data, tmp_path, serve):
  server = serve(lambda r: (0.05, well_behaved(r)))
  out = tmp_path / "out"
  counts = captioner.caption(data, out, SETTINGS, client(server))
  rows = table(out)
  # 6 of each: general; general + text; text + structured + knowledge; edit.
  assert counts == {"valid": 42, "failed": 0, "unrouted": 0}
  found = collections.Counter(row["kind"] for row in rows)
  assert found == {
    "general": 12, "text": 12, "structured": 6, "knowledge": 6, "edit": 6,
  }  # fmt: skip
  assert {row["language"] for row in rows} == {"en", "zh"}
  assert {row["length"] for row in rows} == {"short", "medium", ""}
  drawn = collections.defaultdict(set)
  for row in rows:
    if row["length"]:
      drawn[row["id"]].add((row["language"], row["length"]))
  # Kinds of one record are drawn one by one.
  assert max(map(len, drawn.values())) > 1
  for row in rows:
    wish = Wish(row["kind"], row["language"], row["length"], row["category"])
    references = 2 if row["kind"] == "edit" else 0
    assert checks.read(wish, row["text"], (), references) == (row["text"], "")
    assert row["valid"] and row["reason"] == "" and row["answers"] == 1
    assert row["model"] == "m" and row["tokens"] > 5
    assert row["prompt_id"].startswith(row["kind"])
  texts = [json.loads(r["text"]) for r in rows if r["kind"] == "structured"]
  assert STRUCTURED in texts
  assert [len(r["messages"][0]["content"]) for r in server.seen].count(4) == 6
  assert 1 < server.most <= SETTINGS.concurrency
  ids = [row["id"] for row in rows if row["kind"] == "edit"]
  # Records go round robin over the two shards.
  assert ids == [f"r{i:02d}" for i in (3, 7, 11, 15, 19, 23)]


def test_draws_and_rows_depend_on_the_records_alone(data, tmp_path, serve):
  server = serve()
  one, two = tmp_path / "one", tmp_path / "two"
  captioner.caption(data, one, SETTINGS, client(server))
  slow = iter(range(10**6))
  server.reply = lambda r: (0.02 * (next(slow) % 5), good(prompt_of(r)))
  changed = Settings(**vars(SETTINGS) | {"concurrency": 9})
  captioner.caption(data, two, changed, client(server))
  assert files(one) == files(two)
  seed = Settings(**vars(SETTINGS) | {"seed": 1})
  captioner.caption(data, two, seed, client(server))
  assert files(one) != files(two)


def test_several_captions_of_a_kind_differ_in_language_or_length(
  data, tmp_path, serve
):
  three = Settings(**vars(SETTINGS) | {"per_kind": 3, "kinds": ("general",)})
  captioner.caption(data, tmp_path / "out", three, client(serve()))
  found = collections.defaultdict(set)
  for row in table(tmp_path / "out"):
    if row["kind"]:
      found[row["id"]].add((row["language"], row["length"]))
  assert {len(drawn) for drawn in found.values()} == {3}


def test_a_finished_folder_asks_nothing(data, tmp_path, serve):
  server, out = serve(), tmp_path / "out"
  counts = captioner.caption(data, out, SETTINGS, client(server))
  before, asked = files(out), len(server.seen)
  assert captioner.caption(data, out, SETTINGS, client(server)) == counts
  assert files(out) == before and len(server.seen) == asked
  (out / "part-00001.parquet").unlink()
  captioner.caption(data, out, SETTINGS, client(server))
  assert files(out) == before and asked < len(server.seen) < 2 * asked


def test_what_fails_is_recorded_and_only_that_is_tried_again(tmp_path, serve):
  data = dataset(tmp_path / "data", broken=(4,))
  out = tmp_path / "out"

  def reply(request):
    prompt = prompt_of(request)
    if "as JSON of exactly" in prompt:
      return "{" if request["seed"] < 2 else good(prompt)
    if "Write the instruction" in prompt:
      return 500
    return good(prompt)

  server = serve(reply)
  counts = captioner.caption(data, out, ENGLISH_ONLY, client(server))
  assert counts == {"valid": 29, "failed": 13, "unrouted": 0}
  bad = {(r["kind"], r["reason"]) for r in table(out) if not r["valid"]}
  assert {kind for kind, _ in bad} == {"", "structured", "edit"}
  reasons = captioner.reasons(out)
  assert reasons["JSON invalid"] == 6 and reasons["HTTP 500"] == 6
  assert reasons["damaged image"] == 1
  assert {r["answers"] for r in table(out) if r["kind"] == "structured"} == {2}
  good_rows = [r for r in table(out) if r["valid"]]

  server.seen.clear()
  captioner.caption(data, out, ENGLISH_ONLY, client(server), "JSON invalid")
  assert len(server.seen) == 6 and {r["seed"] for r in server.seen} == {2}
  reasons = captioner.reasons(out)
  assert reasons == {"HTTP 500": 6, "damaged image": 1}
  server.reply = well_behaved
  server.seen.clear()
  counts = captioner.caption(data, out, ENGLISH_ONLY, client(server), "all")
  assert counts == {"valid": 41, "failed": 1, "unrouted": 0}
  assert len(server.seen) == 6  # the damaged image is looked at, not sent
  assert [r for r in table(out) if r in good_rows] == good_rows
  # Without a reason to retry nothing is asked again.
  server.seen.clear()
  captioner.caption(data, out, ENGLISH_ONLY, client(server))
  assert server.seen == []


def test_a_bad_answer_is_asked_for_once_more(data, tmp_path, serve):
  server = serve(
    lambda r: "" if r["seed"] == 0 else good(prompt_of(r))
  )  # fmt: skip
  counts = captioner.caption(data, tmp_path / "o", SETTINGS, client(server))
  assert counts["failed"] == 0 and len(server.seen) == 84
  assert {row["answers"] for row in table(tmp_path / "o")} == {2}


def test_a_captioner_that_dies_stops_the_run_and_the_next_goes_on(
  data, tmp_path, serve
):
  out, cache = tmp_path / "out", str(tmp_path / "cache")
  left = [20]

  def reply(request):
    left[0] -= 1
    return good(prompt_of(request)) if left[0] >= 0 else DROP

  server = serve(reply)
  asks = client(server, cache=cache, patience=0.05)
  with pytest.raises(InputError, match=r"No captioner answers .*Incomplete"):
    captioner.caption(data, out, SETTINGS, asks)
  assert asks.asked == 20
  assert not [p for p in out.iterdir() if ".tmp" in p.name]
  again = client(serve(), cache=cache)
  # What failed before the captioner counted as dead is in the rows.
  captioner.caption(data, out, SETTINGS, again, "all")
  assert again.asked == 22
  fresh = tmp_path / "fresh"
  captioner.caption(data, fresh, SETTINGS, client(serve()))
  assert files(out) == files(fresh)


def test_a_dead_captioner_beside_a_living_one_costs_nothing(
  data, tmp_path, serve
):
  dead, alive = serve(), serve()
  dead.close()
  counts = captioner.caption(
    data, tmp_path / "out", SETTINGS, client(dead, alive, attempts=3)
  )
  assert counts == {"valid": 42, "failed": 0, "unrouted": 0}


def test_a_shard_of_failures_is_refused_after_the_others(tmp_path, serve):
  data = dataset(tmp_path / "data", 80, shards=2)
  bad = {f"r{i:02d}" for i in range(0, 80, 2)}  # the first shard

  def answer(pictures, prompt):
    if len(seen) < 60:
      seen.append(prompt)
      raise ValueError("no")
    return good(prompt)

  seen, out = [], tmp_path / "out"
  settings = Settings(**vars(ENGLISH_ONLY) | {"concurrency": 1})
  with pytest.raises(
    InputError, match=r"captioner failed, for example .*ValueError"
  ):
    captioner.caption(data, out, settings, plain(answer))
  assert {row["id"] for row in table(out)} == {
    f"r{i:02d}" for i in range(80)
  } - bad
  loose = Settings(**vars(settings) | {"max_error_rate": 1.0})
  seen.clear()
  counts = captioner.caption(data, out, loose, plain(answer))
  assert counts["failed"] == 60


def test_a_callable_is_a_captioner(data, tmp_path):
  shown = collections.Counter()

  def answer(pictures, prompt):
    shown[len(pictures)] += 1
    assert all(p.startswith(b"\xff\xd8") for p in pictures)
    return good(prompt)

  counts = captioner.caption(data, tmp_path / "o", ENGLISH_ONLY, plain(answer))
  assert counts["failed"] == 0 and shown == {1: 36, 3: 6}


def test_the_model_may_name_the_category(data, tmp_path, serve):
  def reply(request):
    if "Which one of these" in prompt_of(request):
      return '{"category": "diagram"}'
    return well_behaved(request)

  settings = Settings(**vars(ENGLISH_ONLY) | {"classify": True})
  captioner.caption(data, tmp_path / "o", settings, client(serve(reply)))
  rows = table(tmp_path / "o")
  assert {r["category"] for r in rows if r["kind"] != "edit"} == {"diagram"}
  assert sum(row["kind"] == "structured" for row in rows) == 18

  def silent(request):
    if "Which one of these" in prompt_of(request):
      return 400
    return well_behaved(request)

  captioner.caption(data, tmp_path / "p", settings, client(serve(silent)))
  categories = {row["category"] for row in table(tmp_path / "p")}
  assert categories == {"photo", "slide", "chart"}


def test_a_record_that_no_kind_suits_says_so(data, tmp_path, serve):
  settings = Settings(**vars(ENGLISH_ONLY) | {"kinds": ("edit",)})
  counts = captioner.caption(data, tmp_path / "o", settings, client(serve()))
  assert counts == {"valid": 6, "failed": 0, "unrouted": 18}
  assert "no kind suits (slide)" in {r["reason"] for r in table(tmp_path / "o")}
