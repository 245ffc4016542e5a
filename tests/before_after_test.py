# SPDX-License-Identifier: Apache-2.0
"""The page of before and after, from judged images that are made up."""

import numpy as np
import pytest

from qi2_jax.evaluation import suite
from tests.benchmark_program import loaded


@pytest.fixture(scope="module")
def program():
  with loaded("before_after") as module:
    yield module


def judged(kind, index, name="t2i", **figures):
  edit = name == "edit"
  image = np.full((8, 8, 3), 200, np.uint8)
  case = suite.Case(
    suite=name, kind=kind, split="held_out", index=index, prompt=f"{kind}!",
    seed=0, truth=image, score=dict, source=image if edit else None,
  )  # fmt: skip
  return suite.Judged("model", case, figures)


def sides():
  before = [
    judged("glyph", 0, all=0.0, atoms=0.5),
    judged("glyph", 1, all=1.0, atoms=1.0),
    judged("word", 0, all=0.0, atoms=0.0),
  ]
  after = [
    judged("glyph", 0, all=1.0, atoms=1.0),
    judged("glyph", 1, all=1.0, atoms=1.0),
    judged("word", 0, all=0.0, atoms=0.25),
  ]
  return {"before": before, "after": after}


def test_rewards_are_those_of_training(program):
  values = [program.reward(one) for one in sides()["before"]]
  assert values == [0.25, 1.0, 0.0]
  edit = judged("move", 0, "edit", O=0.7, P=0.5, all=0.0, atoms=0.8)
  assert program.reward(edit) == pytest.approx(0.2)


def test_means_are_over_kinds(program):
  found = program.scores(sides()["before"])
  assert found["glyph"]["reward"] == 0.625 and found["glyph"]["n"] == 2
  assert found["mean"] == {"reward": 0.3125, "all": 0.25}
  low, high = found["glyph"]["interval"]
  assert low < 0.5 < high


def test_the_page_shows_both_sides(program):
  some = sides()
  images = {side: [one.case.truth for one in some[side]] for side in some}
  results = {
    "before": "A", "after": "B", "sampling": "10 steps", "notes": ["tiny"],
    "suites": {"t2i": {side: program.scores(some[side]) for side in some}},
  }  # fmt: skip
  text = program.page(results, {"t2i": some}, {"t2i": images})
  assert "+0.375" in text and "tiny" in text
  assert text.count("<img") == 6


def test_edits_have_a_column_for_the_pixels(program):
  figures = {"P": 1.0, "all": 1.0, "atoms": 1.0}
  old, new = (judged("move", 0, "edit", O=o, **figures) for o in (0.25, 0.75))
  found = {"before": program.scores([old]), "after": program.scores([new])}
  assert found["after"]["mean"]["O"] == 0.75
  table = program.gain_table(found)
  assert "O before" in table and "0.25" in table and "0.75" in table
  text = {side: program.scores(some) for side, some in sides().items()}
  assert "O before" not in program.gain_table(text)
