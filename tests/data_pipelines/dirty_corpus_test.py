# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline on a corpus of known dirt: every filter is held to it."""

import json

import dirty_scores
import pytest

from data_pipelines.records import open_dataset
from data_pipelines.report import page

BAR, ALIKE_RECALL_BAR = 0.98, 0.95


def hold_to_account(folder, count, seed):
  """Runs, prints precision and recall, and checks them and the sums."""
  truth, manifest = dirty_scores.run(folder, count, seed)
  found = dirty_scores.outcomes(folder / "out")
  assert found.keys() == truth.keys()
  counts = dirty_scores.compare(truth, found)
  print()
  print(dirty_scores.describe(counts))
  for name in (*manifest["config"]["filter_order"][1:], "kept", "unreadable"):
    assert counts[name].right > 0, f"no example of {name}"
    assert counts[name].precision >= BAR, name
    recall_bar = ALIKE_RECALL_BAR if name == dirty_scores.ALIKE else BAR
    assert counts[name].recall >= recall_bar, name
  dropped = sum(manifest["dropped"].values())
  assert manifest["in"] == len(truth) >= count
  assert manifest["in"] == manifest["kept"] + dropped + manifest["quarantined"]
  assert len(open_dataset(folder / "out" / "data")) == manifest["kept"]
  return manifest


def test_some_hundred_files(tmp_path):
  manifest = hold_to_account(tmp_path, 240, seed=0)
  rows = (tmp_path / "out" / "quarantine.jsonl").read_text("utf-8").splitlines()
  assert len(rows) == manifest["quarantined"]
  assert all(row["reason"] and row["where"] for row in map(json.loads, rows))


@pytest.mark.slow
def test_five_thousand_files(tmp_path):
  hold_to_account(tmp_path, 5000, seed=2)
  text = page.write_report(tmp_path / "out").read_text("utf-8")
  assert "perceptual_duplicate" in text


def test_the_truth_is_not_flattering():
  """A pipeline that errs is seen to err."""
  Truth = dirty_scores.Truth
  truth = {
    "a": Truth("kept", "clean"), "b": Truth("exact_duplicate", "copied", "a"),
    "c": Truth("entropy", "plain"), "d": Truth("kept", "clean"),
    "e": Truth("perceptual_duplicate", "alike", "a"),
  }  # fmt: skip
  perfect = {"a": "exact_duplicate", "b": "kept", "c": "entropy", "d": "kept",
             "e": "perceptual_duplicate"}  # fmt: skip
  for count in dirty_scores.compare(truth, perfect).values():
    assert count.precision == count.recall == 1
  errs = dirty_scores.compare(
    truth, {**perfect, "b": "exact_duplicate", "c": "kept", "d": "entropy"}
  )
  assert errs["exact_duplicate"].precision == 0.5
  assert errs["entropy"].precision == errs["entropy"].recall == 0
  assert errs["kept"].recall == 0 and errs["kept"].wrong == 1
