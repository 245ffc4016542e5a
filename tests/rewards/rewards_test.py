# SPDX-License-Identifier: Apache-2.0
"""Rewards: rules, background, failures, weights, and their combination."""

import numpy as np
import pytest

from data_pipelines.shapes import checker, edits, prompts
from data_pipelines.shapes.render import render
from qi2_jax.errors import InputError
from qi2_jax.rewards import composite, protocol, rules

RNG = np.random.default_rng(0)


def example(kind="position", seed=0):
  return prompts.sample_t2i(kind, np.random.default_rng(seed))


def test_rules_judge_by_the_checker():
  good, other = example(seed=0), example(seed=1)
  score = rules.rules(
    lambda image, text: checker.check(image, good.atoms) if text else None,
    lambda *edit: None,
  )
  images = [render(e.scene, 64, 64) for e in (good, other, good)]
  asked = [protocol.Prompt(t) for t in ("x", "x", "")]
  values = score(images, asked, [()] * 3)["rules"]
  assert values[0] == 1.0 and np.isnan(values[2])
  parts = checker.check(images[1], good.atoms)
  parts.pop("all")
  assert values[1] == pytest.approx(0.5 * np.mean(list(parts.values())))
  assert values[1] < 0.5


def edit(seed=0):
  made = edits.sample_edit("recolour", np.random.default_rng(seed))
  return [render(scene, 64, 64) for scene in (made.source, made.target)]


def check_edit(instruction, source, target, result):
  """All or nothing by the pixels that had to change."""
  changed, kept, _ = checker.edit_scores(source, target, result)
  right = {"colour": changed > 0.5, "shape": True}
  return right | {"all": changed > 0.5}, kept


def test_edits_are_judged_by_what_had_to_change_and_to_stay():
  source, target = edit()
  asked = [protocol.Prompt("edit", "edit", target)] * 3
  spoilt = target.copy()
  kept = ~rules.edited_region(source, target)
  spoilt[kept] = 255 - spoilt[kept]
  images, sources = [target, source, spoilt], [(source,)] * 3
  score = rules.rules(lambda image, text: None, check_edit)
  values = score(images, asked, sources)["rules"]
  # The source is right in one of two properties, and leaves the rest alone.
  assert values[0] == 1.0 and values[1] == 0.25 and values[2] < 0.1
  # What had to stay is the same in target and source, and not in the third.
  kept_db = rules.background(images, asked, sources)["background"]
  assert kept_db[0] > 40 and kept_db[1] == 50 and kept_db[2] < 10
  unknown = [protocol.Prompt("edit", "edit")]
  for reward in (score, rules.background):
    (found,) = reward([target], unknown, [(source,)]).values()
    assert np.isnan(found[0])
  assert rules.background([target], unknown, [()])["background"][0] == 0


def test_psnr_by_hand():
  image = np.zeros((2, 2, 3), np.uint8)
  other = image + np.uint8(10)
  mask = np.asarray([[True, False], [False, False]])
  expected = 10 * np.log10(255**2 / 100)
  assert rules.masked_psnr(image, other, mask) == pytest.approx(expected)
  assert rules.masked_psnr(image, image, mask) == pytest.approx(50)


def ones(images, asked, references):
  return {"ones": np.ones(len(images))}


def test_a_reward_that_fails_is_not_zero():
  def broken(images, asked, references):
    raise RuntimeError("no GPU")

  images = [np.zeros((4, 4, 3), np.uint8)] * 3
  asked, sources = [protocol.Prompt("x")] * 3, [()] * 3
  values = protocol.score_all(
    {"ones": ones, "broken": broken}, images, asked, sources
  )
  assert np.isnan(values["broken"]).all() and (values["ones"] == 1).all()
  with pytest.raises(InputError, match="names must differ"):
    protocol.score_all({"a": ones, "b": ones}, images, asked, sources)
  with pytest.raises(InputError, match="one value"):
    protocol.score_all(
      {"short": lambda *_: {"short": np.ones(2)}}, images, asked, sources
    )


def test_failures_are_dropped_counted_and_end_the_run():
  failures = protocol.Failures(0.25)
  values = {"a": np.ones(8), "b": np.ones(8)}
  values["a"][0] = values["b"][1] = np.nan
  np.testing.assert_array_equal(
    failures.count(values), [False, False, *[True] * 6]
  )
  assert failures.record() == {"failed": 2, "judged": 8}
  again = protocol.Failures(0.25, failures.record())
  values["b"][2] = np.inf
  with pytest.raises(InputError, match=r"3 of 8 images.*'b': 2"):
    again.count(values)
  assert again.failed == 5


TABLE = {"default": {"a": 1.0, "b": 1.0}, "poster": {"a": 1.0, "b": 3.0}}


def test_categories_have_their_own_weights():
  weights = composite.Weights(TABLE, 0.0, 4.0)
  found = weights.of(["a", "b", "c"], ["poster", "portrait"])
  np.testing.assert_array_equal(found, [[1, 1], [3, 1], [0, 0]])


def test_the_combination_is_a_weighted_sum_of_z_scores():
  values = {n: RNG.normal(size=12) for n in "ab"}
  values["b"][5] = np.nan
  valid = np.isfinite(values["b"]).reshape(3, 4)
  kinds = ["poster", "portrait", "poster"]
  weights = composite.Weights(TABLE, 0.0, 4.0)
  out, kept = composite.combine(
    values, kinds, valid, weights, scale="group", clip=99.0
  )
  for g, kind in enumerate(kinds):
    use = valid[g]
    total = 0.0
    for name in "ab":
      x = values[name].reshape(3, 4)[g, use]
      weight = TABLE.get(kind, TABLE["default"])[name]
      total = total + weight * (x - x.mean()) / x.std()
    np.testing.assert_allclose(out[g, use], total, rtol=1e-4)
    assert not np.any(out[g, ~use])
  assert kept.all()


def test_weights_adapt_against_the_dominant_reward_within_bounds():
  weights = composite.Weights(TABLE, 0.5, 2.0)
  valid = np.ones((2, 4), bool)
  # `a` varies in every group, `b` in one of two.
  loud = RNG.normal(size=8)
  quiet = np.concatenate([np.zeros(4), RNG.normal(size=4)])
  kinds = ["portrait", "portrait"]
  for _ in range(20):
    composite.combine(
      {"a": loud, "b": quiet}, kinds, valid, weights, scale="group", clip=5.0
    )
  found = weights.record()
  assert 0.5 <= found["a"] < 0.9 and 1.1 < found["b"] <= 2.0
  z = np.abs(RNG.normal(size=(2, 2, 4)))
  again = composite.Weights(TABLE, 0.5, 2.0, found)
  again.adapt(["a", "b"], kinds, z * np.asarray([1e9, 1.0])[:, None, None])
  assert again.factors == {"a": 0.5, "b": 2.0}
  fixed = composite.Weights(TABLE, 0.0, 2.0)
  fixed.adapt(["a", "b"], kinds, z)
  assert fixed.record() == {}


@pytest.mark.parametrize(
  "fields, message",
  [
    (({"poster": {}}, 0.0, 2.0), "no 'default'"),
    (({"default": {"a": -1.0}}, 0.0, 2.0), "negative"),
    (({"default": {}}, 2.0, 2.0), "adapt_rate"),
    (({"default": {}}, 0.1, 0.5), "adapt_bound"),
  ],
)
def test_bad_weights_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    composite.Weights(*fields)


def test_grades_are_given_by_text_or_by_target():
  source, target = edit()
  score = rules.grades(
    lambda image, text: 0.25 if text == "known" else None,
    lambda text, before, right, made: 0.5 + 0.5 * np.array_equal(made, right),
  )
  asked = [
    protocol.Prompt("known"), protocol.Prompt("?"),
    protocol.Prompt("edit", "edit", target), protocol.Prompt("edit", "edit"),
  ]  # fmt: skip
  sources = [(), (), (source,), (source,)]
  values = score([target] * 4, asked, sources)["grades"]
  assert values[0] == 0.25 and values[2] == 1.0
  assert np.isnan(values[1]) and np.isnan(values[3])
