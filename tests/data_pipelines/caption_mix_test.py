# SPDX-License-Identifier: Apache-2.0
"""Draws by weight, the choice of one caption, and the weights themselves."""

import collections
import itertools

import pytest

from data_pipelines import codec
from data_pipelines.caption import mix
from data_pipelines.caption.draw import draw, uniform
from data_pipelines.caption.kinds import LANGUAGES, parse_weights
from data_pipelines.errors import InputError
from data_pipelines.images import EncodedImage

MANY = 4000
EVEN = {"kinds": {}, "languages": {}, "lengths": {}}


def record(id="a", references=0):
  image = EncodedImage(b"", 1, 1, "RGB")
  task = "ti2i" if references else "t2i"
  return codec.Record(
    id, task, "as found", "user", image, (image,) * references, {"where": "w"}
  )


def row(kind, language="en", length="medium", valid=True):
  return {
    "id": "a", "kind": kind, "language": language, "length": length,
    "category": "photo", "text": f"{kind} {language} {length}",
    "valid": valid, "reason": "" if valid else "empty", "model": "m",
    "prompt_id": "p",
  }  # fmt: skip


def shares(weights, rows, references=0):
  found = collections.Counter()
  for i in range(MANY):
    chosen = mix.choose_caption(
      record(f"id{i}", references), rows, EVEN | weights, 3
    )
    found[chosen["text"] if chosen else "original"] += 1
  return {name: count / MANY for name, count in found.items()}


def test_uniform_numbers_are_uniform_and_depend_on_every_part():
  values = [uniform(0, f"id{i}", "x") for i in range(MANY)]
  assert min(values) > 0 and max(values) < 1
  for q in (0.1, 0.5, 0.9):
    assert sum(v < q for v in values) / MANY == pytest.approx(q, abs=0.03)
  assert len({uniform(*k) for k in itertools.permutations("abc")}) == 6
  assert uniform("ab", "c") != uniform("a", "bc")


def test_draws_have_the_chances_of_successive_sampling():
  weights = {"a": 0.5, "b": 0.3, "c": 0.2, "never": 0.0}
  drawn = [draw(weights, 2, i) for i in range(MANY)]
  first = collections.Counter(d[0] for d in drawn)
  for name in "abc":
    assert first[name] / MANY == pytest.approx(weights[name], abs=0.03)
  # P(a then b) = .5 * .3 / (1 - .5).
  pair = sum(d == ["a", "b"] for d in drawn) / MANY
  assert pair == pytest.approx(0.3, abs=0.03)
  assert sorted(draw(weights, 9, "k")) == ["a", "b", "c"]
  assert draw({}, 1, "k") == []


def test_kinds_are_mixed_by_weight_whatever_their_number_of_captions():
  rows = [row("general", "en"), row("general", "zh"), row("text"), row("edit")]
  found = shares(
    {
      "kinds": {"original": 0.2, "general": 0.5, "text": 0.3, "edit": 9.0},
      "languages": {"en": 0.8, "zh": 0.2},
    },
    rows,
  )
  expected = {
    "original": 0.2, "general en medium": 0.4, "general zh medium": 0.1,
    "text en medium": 0.3,
  }  # fmt: skip
  assert found == pytest.approx(expected, abs=0.03)


def test_a_choice_does_not_change_with_what_it_was_not():
  rows = [row("general"), row("text"), row("knowledge")]
  weights = EVEN | {"kinds": {"general": 1, "text": 2, "knowledge": 1}}
  for i in range(50):
    r = record(f"id{i}")
    chosen = mix.choose_caption(r, rows, weights, 0)
    again = mix.choose_caption(r, rows[::-1], weights, 0)
    others = [x for x in rows if x is chosen or x["kind"] == "general"]
    assert again is chosen
    assert mix.choose_caption(r, others, weights, 0) is chosen
  drawn = {
    tuple(mix.choose_caption(record(f"id{i}"), rows, weights, seed)["kind"]
          for i in range(20))
    for seed in range(3)
  }  # fmt: skip
  assert len(drawn) == 3


def test_what_cannot_be_used_is_never_chosen():
  weights = {"kinds": {"general": 1, "edit": 1}}
  bad = [row("general", valid=False), row("text")]
  assert shares(weights, bad) == {"original": 1.0}
  both = [row("general"), row("edit")]
  assert shares(weights, both) == {"general en medium": 1.0}
  assert shares(weights, both, references=1) == {"edit en medium": 1.0}
  # A kind of which no language is wanted leaves its share to the others.
  found = shares(
    {"kinds": {"general": 1, "text": 1}, "languages": {"en": 1}},
    [row("general", "zh"), row("text", "en")],
  )
  assert found == {"text en medium": 1.0}
  # Structured captions have no length that could be left out.
  found = shares(
    {"kinds": {"structured": 1}, "lengths": {"short": 1}},
    [row("structured", length="")],
  )
  assert found == {"structured en ": 1.0}


def test_a_record_says_where_its_caption_is_from():
  weights = EVEN | {"kinds": {"general": 1.0}}
  new = mix.apply(record(), {"a": [row("general")]}, weights, 0)
  assert new.caption == "general en medium"
  assert new.provenance == {
    "where": "w",
    "caption": {
      "kind": "general", "language": "en", "length": "medium", "model": "m",
      "prompt_id": "p", "original": "as found",
    },
  }  # fmt: skip
  same = mix.apply(record(), {"a": []}, weights, 0)
  assert same.caption == "as found"
  assert same.provenance["caption"] == {"kind": "original"}
  assert codec.decode(codec.encode(new)) == new
  with pytest.raises(InputError, match="'a' has no captions"):
    mix.apply(record(), {"b": []}, weights, 0)


@pytest.mark.parametrize(
  "weights, why",
  [
    ({"kinds": {}}, "exactly the fields"),
    (EVEN | {"kinds": {"generic": 1}}, "'generic'"),
    (EVEN | {"languages": {"Chinese": 1}}, "'Chinese'"),
    (EVEN | {"lengths": {"short": -1}}, "'short'"),
    (EVEN | {"kinds": {"text": True}}, "'text'"),
    (EVEN | {"kinds": {"text": float("nan")}}, "'text'"),
    (EVEN | {"kinds": {"text": "1"}}, "'text'"),
  ],
)
def test_unusable_weights_are_refused(weights, why):
  with pytest.raises(InputError, match=why):
    mix.check_weights(weights, "config.captions")
  mix.check_weights(EVEN | {"kinds": {"original": 0.5}}, "config.captions")


def test_weights_of_the_command_line():
  known = tuple(LANGUAGES)
  found = parse_weights(["en:0.7", "Chinese:0.3", "ja"], known, "languages")
  assert found == {"en": 0.7, "zh": 0.3, "ja": 1.0}
  for bad in (["xx"], ["en:0"], ["en:x"], ["en", "English"], ["en:inf"], []):
    with pytest.raises(InputError):
      parse_weights(bad, known, "languages")
