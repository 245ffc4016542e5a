# SPDX-License-Identifier: Apache-2.0
"""Decisions from metric columns alone."""

import json

import ml_collections
import numpy as np
import pyarrow as pa
import pytest
from fingerprints import brute_force, fingerprints
from metric_table import dropped, judge, rows

from data_pipelines.errors import InputError
from data_pipelines.filters import decide

LOOSE = {"max_phash": 6, "max_dhash": 10, "max_colour": 4.0}


def test_bounds_values_and_order():
  table = rows(
    5, tokens=[10, 3, 90, 3, 10], short_side=[300, 300, 300, 20, 256]
  )
  verdicts = judge(
    table,
    ("size", "words"),
    size={"min_short_side": 256},
    words={"min_tokens": 5, "max_tokens": 50},
  )
  found = {r["id"]: r for r in verdicts.to_pylist()}
  assert dropped(verdicts) == {"r1": "words", "r2": "words", "r3": "size"}
  assert (found["r1"]["value"], found["r1"]["threshold"]) == (3, 5)
  assert (found["r2"]["value"], found["r2"]["threshold"]) == (90, 50)
  assert found["r3"]["detail"] == "short_side 20 < 256"
  assert found["r0"]["filter"] == "" and found["r0"]["value"] is None
  # Every filter's own opinion stays visible, also behind an earlier one.
  assert found["r3"]["drops.words"] and found["r3"]["drops.size"]
  assert not found["r1"]["drops.size"]
  assert [r["shard"] for r in verdicts.to_pylist()] == [0, 1, 0, 1, 0]
  swapped = judge(
    table, ("words", "size"), size={"min_short_side": 256},
    words={"min_tokens": 5},
  )  # fmt: skip
  assert dropped(swapped)["r3"] == "words"


def test_nulls_pass_words_are_listed_flags_are_numbers():
  table = rows(
    4,
    jpeg_quality=[None, 90.0, 30.0, None],
    language=["en", "fr", None, "zh"],
    orientation_conflict=[False, False, False, True],
  )
  assert dropped(
    judge(table, ("c",), c={"min_jpeg_quality": 50})
  ) == {"r2": "c"}  # fmt: skip
  assert dropped(
    judge(table, ("l",), l={"allow_language": ("en", "zh")})
  ) == {"r1": "l"}  # fmt: skip
  assert dropped(
    judge(table, ("r",), r={"max_orientation_conflict": 0})
  ) == {"r3": "r"}  # fmt: skip
  assert not dropped(judge(table, ("n",), n={"min_tokens": None}))


def test_broken_rows_and_empty_tables():
  table = rows(3, error=[None, "Truncated.", None])
  verdicts = judge(table, ("broken",), broken={})
  assert dropped(verdicts) == {"r1": "broken"}
  assert verdicts["detail"][1].as_py() == "Truncated."
  everything = {
    "broken": {}, "exact_duplicate": {}, "perceptual_duplicate": LOOSE,
    "distribution": {"max_count": 3},
  }  # fmt: skip
  nothing = decide.decide(rows(0), everything, tuple(everything), 0)
  assert nothing.num_rows == 0


def test_the_best_of_equal_files_stays():
  table = rows(
    5,
    sha256=["a", "a", "a", "b", "b"],
    pixels=[1, 3, 2, 5, 5],
    bytes=[1, 1, 1, 7, 8],
  )
  verdicts = judge(table, ("exact_duplicate",), exact_duplicate={})
  assert dropped(verdicts).keys() == {"r0", "r2", "r3"}
  twins = verdicts["duplicate_of"].to_pylist()
  assert twins == ["r1", None, "r1", "r4", None]


def test_a_representative_that_fails_later_is_not_chosen():
  table = rows(2, sha256=["a", "a"], pixels=[9, 1], tokens=[999, 10])
  filters = {"exact_duplicate": {}, "words": {"max_tokens": 50}}
  verdicts = decide.decide(table, filters, tuple(filters), 0)
  assert dropped(verdicts) == {"r0": "exact_duplicate"}


def test_dropped_rows_have_no_duplicates():
  table = rows(2, sha256=["a", "a"], tokens=[999, 10])
  filters = {"words": {"max_tokens": 50}, "exact_duplicate": {}}
  assert dropped(decide.decide(table, filters, tuple(filters), 0)) == {
    "r0": "words"
  }


def test_quotas_count_only_what_is_left():
  table = rows(6, tokens=[999] * 3 + [10] * 3)
  filters = {"words": {"max_tokens": 50}, "distribution": {"max_count": 3}}
  found = dropped(decide.decide(table, filters, tuple(filters), 0))
  assert found == {"r0": "words", "r1": "words", "r2": "words"}


def test_the_first_violated_bound_gives_the_value():
  table = rows(1, tokens=[2], short_side=[20])
  bounds = {"min_tokens": 5, "min_short_side": 256}
  row = judge(table, ("f",), f=bounds).to_pylist()[0]
  assert (row["value"], row["threshold"]) == (2, 5)
  assert row["detail"] == "tokens 2 < 5"


def test_only_targets_count_and_edits_need_the_instruction_too():
  table = rows(
    5,
    sha256=["a"] * 5,
    references=[0, 1, 1, 1, 2],
    task=["t2i", "ti2i", "ti2i", "ti2i", "ti2i"],
    caption=["x", "blue", "red", "red", "x"],
    bytes=[1, 2, 3, 4, 5],
  )
  verdicts = judge(table, ("exact_duplicate",), exact_duplicate={})
  assert dropped(verdicts).keys() == {"r2"}


@pytest.mark.parametrize("name", ["exact_duplicate", "perceptual_duplicate"])
def test_an_image_may_have_several_captions(name):
  table = rows(
    4, sha256=["a"] * 4, phash=[1] * 4, dhash=[1] * 4,
    thumb=[b"x" * 192] * 4, caption=["one", "two", "two", "one"],
    references=[0, 0, 0, 1], task=["t2i"] * 3 + ["ti2i"], bytes=[4, 3, 2, 1],
  )  # fmt: skip
  options = LOOSE if name == "perceptual_duplicate" else {}
  assert dropped(judge(table, (name,), **{name: options})).keys() == {
    "r1", "r2",
  }  # fmt: skip
  options = {**options, "same_caption": True}
  assert dropped(judge(table, (name,), **{name: options})).keys() == {"r2"}


def test_perceptual_groups_against_brute_force():
  phash, dhash, thumb = fingerprints(300, seed=3)
  table = rows(
    300,
    phash=phash.tolist(),
    dhash=dhash.tolist(),
    thumb=[row.tobytes() for row in thumb],
  )
  verdicts = judge(table, ("perceptual_duplicate",), perceptual_duplicate=LOOSE)
  label = np.arange(300)
  for i, j in brute_force(phash, dhash, thumb, *LOOSE.values()):
    label[label == label[j]] = label[i]
  kept = np.array(verdicts["kept"].to_pylist())
  assert 100 < kept.sum() < 299
  for group in set(label.tolist()):
    assert kept[label == group].sum() == 1
  ids = verdicts["id"].to_pylist()
  for i, row in enumerate(verdicts.to_pylist()):
    if not row["kept"]:
      j = ids.index(row["duplicate_of"])
      assert label[i] == label[j] and kept[j]
      assert row["value"] == int(phash[i] ^ phash[j]).bit_count()


def test_equal_fingerprints_of_different_edits():
  table = rows(
    4, phash=[1] * 4, dhash=[1] * 4, thumb=[b"x" * 192] * 4,
    references=[1] * 4, task=["ti2i"] * 4, caption=["a", "b", "b", "a"],
  )  # fmt: skip
  verdicts = judge(table, ("perceptual_duplicate",), perceptual_duplicate=LOOSE)
  assert verdicts["kept"].to_pylist().count(True) == 2
  assert {c.as_py() for c in table["caption"].filter(verdicts["kept"])} == {
    "a", "b",
  }  # fmt: skip


def test_embedding_duplicates():
  vectors = [[1.0, 0], [2.0, 0.01], [0, 1.0]]
  table = rows(3, embedding=vectors, pixels=[1, 2, 3])
  verdicts = judge(
    table, ("embedding_duplicate",), embedding_duplicate={"min_cosine": 0.99}
  )
  row = verdicts.to_pylist()[0]
  assert dropped(verdicts).keys() == {"r0"} and row["duplicate_of"] == "r1"
  assert row["value"] == pytest.approx(1 / np.hypot(1, 0.005))


def test_cosines_are_not_rounded_to_half_precision():
  """Of two vectors on either side of the threshold by less than its step."""
  first = np.float16([1.0, 0.0])
  pair = [np.float16([np.cos(t), np.sin(t)]) for t in (0.171, 0.175)]
  cosines = [float(v[0] / np.linalg.norm(v.astype(float))) for v in pair]
  vectors = pa.array([first, *pair], pa.list_(pa.float16()))
  table = rows(3, embedding=vectors, pixels=[3, 2, 1])
  verdicts = judge(
    table, ("embedding_duplicate",),
    embedding_duplicate={"min_cosine": np.mean([cosines[0], 1])},
  )  # fmt: skip
  assert dropped(verdicts) == {"r2": "embedding_duplicate"}
  between = judge(
    table.take([0, 1]), ("embedding_duplicate",),
    embedding_duplicate={"min_cosine": cosines[0] - 1e-5},
  )  # fmt: skip
  np.testing.assert_allclose(between["value"][1].as_py(), cosines[0], rtol=1e-6)


def test_what_has_no_caption_yet_is_not_judged_by_it():
  columns = {
    "caption": ["", "short"],
    "tokens": [0, 1],
    "language": [None, "xx"],
  }
  table = rows(2, clip_alignment=[0.0, 0.0], **columns)
  for name, bound in (
    ("words", {"min_tokens": 3}), ("language", {"allow_language": ["en"]}),
    ("alignment", {"min_clip_alignment": 0.1}),
  ):  # fmt: skip
    assert dropped(judge(table, (name,), **{name: bound})) == {"r1": name}
  assert len(dropped(judge(table, ("e",), e={"min_entropy": 7.5}))) == 2


def test_edits_without_an_instruction_yet_are_no_duplicates():
  same = {"sha256": ["0"] * 6, "references": [1, 1, 1, 1, 0, 0],
          "task": ["ti2i"] * 4 + ["t2i"] * 2,
          "caption": ["", "", "turn it", "turn it", "", ""]}  # fmt: skip
  table = rows(6, pixels=[6, 5, 4, 3, 2, 1], **same)
  found = dropped(judge(table, ("exact_duplicate",), exact_duplicate={}))
  assert set(found) == {"r3", "r5"}
  options = {"same_caption": True}
  found = dropped(judge(table, ("exact_duplicate",), exact_duplicate=options))
  assert set(found) == {"r3"}


def in_clusters(vectors, count, limit, order=None):
  table = rows(
    len(vectors), embedding=pa.array(list(vectors), pa.list_(pa.float32()))
  )
  if order is not None:
    table = table.take(order)
  options = {"column": "cluster", "clusters": count, "max_count": limit}
  verdicts = judge(table, ("distribution",), distribution=options)
  return set(table["id"].to_pylist()) - set(dropped(verdicts)), verdicts


def test_clusters_of_embeddings_have_quotas():
  rng = np.random.default_rng(0)
  axes = np.eye(8)[[0] * 60 + [3] * 25 + [6] * 10]
  vectors = (axes + 0.1 * rng.standard_normal(axes.shape)).astype(np.float32)
  vectors *= rng.uniform(0.5, 2, (95, 1))  # only directions count
  kept, verdicts = in_clusters(vectors, 3, 20)
  truth = [sum(int(id[1:]) in span for id in kept)
           for span in (range(60), range(60, 85), range(85, 95))]  # fmt: skip
  assert truth == [20, 20, 10]
  details = {d for d in verdicts["detail"].to_pylist() if d}
  assert details == {"cluster 1: quota 20", "cluster 2: quota 20"}
  assert in_clusters(vectors, 3, 20, rng.permutation(95))[0] == kept
  # Copies of one vector are one cluster, whatever is asked for.
  assert len(in_clusters(np.ones((9, 4), np.float32), 5, 2)[0]) == 2


def test_input_order_does_not_matter():
  table = rows(60, sha256=[str(i % 7) for i in range(60)],
               kind=["ab"[i % 2] for i in range(60)])  # fmt: skip
  filters = {"exact_duplicate": {}, "distribution": {"max_count": 2}}
  first = dropped(decide.decide(table, filters, tuple(filters), 1))
  shuffled = table.take(np.random.default_rng(0).permutation(60))
  assert dropped(decide.decide(shuffled, filters, tuple(filters), 1)) == first
  assert dropped(decide.decide(table, filters, tuple(filters), 2)) != first


def quota_counts(kinds, **options):
  verdicts = judge(
    rows(len(kinds), kind=kinds), ("distribution",), distribution=options
  )
  kept = [k for k, keep in zip(kinds, verdicts["kept"].to_pylist()) if keep]
  return {kind: kept.count(kind) for kind in set(kept)}


def test_quotas():
  kinds = ["face"] * 60 + ["text"] * 20 + ["food"] * 10 + ["map"] * 10
  assert quota_counts(kinds, max_count=15) == {
    "face": 15, "text": 15, "food": 10, "map": 10,
  }  # fmt: skip
  assert quota_counts(kinds, shares={"face": 0.5, "text": 0.5}) == {
    "face": 20, "text": 20,
  }  # fmt: skip
  # 0.4 for the 20 others: the result has 50 rows.
  assert quota_counts(kinds, shares={"face": 0.4, "text": 0.2}) == {
    "face": 20, "text": 10, "food": 10, "map": 10,
  }  # fmt: skip


def test_quotas_keep_a_nested_sample():
  kinds = ["a"] * 50
  few = judge(rows(50, kind=kinds), ("distribution",),
              distribution={"max_count": 10})  # fmt: skip
  more = judge(rows(50, kind=kinds), ("distribution",),
               distribution={"max_count": 20})  # fmt: skip
  assert set(dropped(more)) < set(dropped(few))
  row = few.filter(pa.compute.invert(few["kept"])).to_pylist()[0]
  assert row["value"] > row["threshold"] == 10


def test_config_dicts_work_and_options_travel_with_the_table():
  config = ml_collections.ConfigDict(
    {"words": {"max_tokens": 50}, "distribution": {"shares": {"user": 1.0}}}
  )
  verdicts = decide.decide(rows(3), config, ("words", "distribution"), 0)
  used = json.loads(verdicts.schema.metadata[b"filters"])
  assert used == config.to_dict()


def test_seconds_of_every_filter():
  filters = {"broken": {}, "words": {"max_tokens": 5}, "exact_duplicate": {}}
  _, seconds = decide.decide_timed(rows(3), filters, tuple(filters), 0)
  assert seconds.keys() == filters.keys() and min(seconds.values()) >= 0


@pytest.mark.parametrize(
  "filters, order, message",
  [
    ({}, ("words",), "no options"),
    ({"w": {}}, ("w", "w"), "twice"),
    ({"w": {"tokens": 3}}, ("w",), "min_, max_ or allow_"),
    ({"w": {"min_tokens": "3"}}, ("w",), "give a number"),
    ({"w": {"allow_language": "en"}}, ("w",), "list of words"),
    ({"exact_duplicate": {"x": 1}}, ("exact_duplicate",), "unknown"),
    ({"perceptual_duplicate": {}}, ("perceptual_duplicate",), "missing"),
    ({"distribution": {"shares": {"a": 2.0}}}, ("distribution",), "at most 1"),
    ({"distribution": {"max_count": 0}}, ("distribution",), "whole number"),
    ({"distribution": {"clusters": 3}}, ("distribution",), "with column="),
    ({"distribution": {"column": "cluster"}}, ("distribution",), "at least 2"),
    ({"distribution": {"column": "cluster", "clusters": 2, "shares": {"1": 1}}},
     ("distribution",), "no names"),
    ({"distribution": {"column": "cluster", "clusters": 2, "max_count": 3}},
     ("distribution",), "embedding"),
    ({"distribution": {"shares": {"b": 0.1}}}, ("distribution",), "no record"),
    ({"s": {"min_aesthetic": 5}}, ("s",), "run that score"),
    ({"s": {"min_caption": 5}}, ("s",), "allow_caption"),
    ({"embedding_duplicate": {"min_cosine": 0.9}}, ("embedding_duplicate",),
     "embedding"),
  ],
)  # fmt: skip
def test_mistakes_are_told(filters, order, message):
  with pytest.raises(InputError, match=message):
    decide.decide(rows(2), filters, order, 0)


def test_empty_scores_are_told_unless_the_image_is_broken():
  filters = {"s": {"max_nsfw": 0.5}}
  table = rows(2, nsfw=[0.1, None])
  with pytest.raises(InputError, match=r"empty for 1 readable.*'r1'"):
    decide.decide(table, filters, ("s",), 0)
  table = rows(2, nsfw=[0.1, None], error=[None, "Truncated."])
  assert not dropped(decide.decide(table, filters, ("s",), 0))
  assert decide.score_columns(filters, ("s",)) == {"nsfw"}


def test_a_filter_may_be_for_one_task():
  table = rows(4, task=["t2i", "ti2i", "t2i", "ti2i"], tokens=[1, 1, 9, 9])
  for task, expected in (
    ("t2i", {"r0": "f"}), ("ti2i", {"r1": "f"}), (None, {"r0": "f", "r1": "f"}),
  ):  # fmt: skip
    options = {"min_tokens": 5, "task": task}
    assert dropped(judge(table, ("f",), f=options)) == expected
  with pytest.raises(InputError, match="is for task 'edit'"):
    judge(table, ("f",), f={"min_tokens": 5, "task": "edit"})
