# SPDX-License-Identifier: Apache-2.0
"""Prompts, edits and their splits."""

import hashlib
import itertools
import json
import re

import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.shapes import edits, prompts, render
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.scene import Item, Scene, describe

COLOURS = "|".join(vocab.COLOURS)
SHAPES = "|".join(vocab.SHAPES)
PLACES = "|".join(vocab.PLACES)
THING = rf"an? ({COLOURS}) ({SHAPES})"
TEMPLATES = {
  "single": THING,
  "position": rf"{THING} in the ({PLACES})",
  "counting": rf"(one|two|three|four) ({COLOURS}) ({SHAPES})(?:s|es)?",
  "relation": rf"{THING} ({'|'.join(vocab.RELATIONS)}) {THING}",
  "glyph": rf"the (?:letter ([A-Z])|digit ([0-9])) in ({COLOURS})",
  "word": rf"the word ([A-Z]+) in ({COLOURS})",
}


def examples(kind, count=300, seed=0):
  rng = np.random.default_rng(seed)
  return [prompts.sample_t2i(kind, rng) for _ in range(count)]


def edit_examples(kind, count=300, seed=0):
  rng = np.random.default_rng(seed)
  return [edits.sample_edit(kind, rng) for _ in range(count)]


@pytest.mark.parametrize("kind", vocab.T2I_KINDS)
def test_prompts_follow_their_template_and_scene(kind):
  for example in examples(kind):
    match = re.fullmatch(TEMPLATES[kind], example.prompt)
    assert match, example.prompt
    assert " a orange" not in f" {example.prompt}"
    assert json.loads(json.dumps(example.atoms)) == example.atoms
    said = [word for word in match.groups() if word]
    items = example.scene.items
    if kind in ("glyph", "word"):
      assert said == [items[0].text, items[0].colour]
      assert example.atoms == {"text": said[0], "colour": said[1]}
      continue
    drawn = [{"colour": i.colour, "shape": i.shape} for i in items]
    wanted = [
      {k: thing[k] for k in ("colour", "shape")}
      for thing in example.atoms["objects"]
    ]
    assert wanted == drawn
    if kind == "counting":
      assert vocab.NUMBERS.index(said[0]) + 1 == len(items)
      assert len({item.size for item in items}) == 1
      assert said[1:] == list(drawn[0].values())
    elif kind == "position":
      assert said == [*drawn[0].values(), items[0].place]
      assert example.atoms["objects"][0]["place"] == said[2]
    elif kind == "relation":
      assert said == [*drawn[0].values(), said[2], *drawn[1].values()]
      assert example.atoms["relation"] == said[2]
      a, b = items
      assert {
        "left of": a.x < b.x,
        "right of": a.x > b.x,
        "above": a.y < b.y,
        "below": a.y > b.y,
      }[said[2]]


@pytest.mark.parametrize("width, height", [(64, 64), (96, 64), (64, 96)])
def test_items_never_overlap(width, height):
  scenes = [e.scene for kind in vocab.T2I_KINDS[:4] for e in examples(kind, 60)]
  for kind in vocab.EDIT_KINDS:
    for example in edit_examples(kind, 30):
      scenes += [example.source, example.target]
  for scene in scenes:
    masks = [render.item_mask(i, width, height) > 0 for i in scene.items]
    assert all(not (a & b).any() for a, b in itertools.combinations(masks, 2))


def test_held_out_is_the_documented_hash():
  for prompt in ("a red circle", "the word CAT in green", "two blue squares"):
    digest = hashlib.md5(prompt.encode()).hexdigest()
    assert prompts.is_held_out(prompt) == (int(digest, 16) % 5 == 0)


@pytest.mark.parametrize("kind", vocab.T2I_KINDS)
def test_splits_are_disjoint_and_both_exist(kind):
  rng = np.random.default_rng(1)
  split = {
    s: {prompts.sample_split(kind, s, rng).prompt for _ in range(200)}
    for s in prompts.SPLITS
  }
  assert not split["seen"] & split["held_out"]
  assert all(map(prompts.is_held_out, split["held_out"]))
  assert not any(map(prompts.is_held_out, split["seen"]))


@pytest.mark.parametrize("kind", vocab.EDIT_KINDS)
def test_edit_splits_are_disjoint(kind):
  rng = np.random.default_rng(1)
  keys = {
    split: {
      (e.instruction, describe(e.source))
      for e in (edits.sample_edit_split(kind, split, rng) for _ in range(200))
    }
    for split in prompts.SPLITS
  }
  assert not keys["seen"] & keys["held_out"]


def test_about_a_fifth_is_held_out():
  prompt_set = {e.prompt for k in vocab.T2I_KINDS for e in examples(k, 2000)}
  share = np.mean([prompts.is_held_out(p) for p in prompt_set])
  assert share == pytest.approx(0.2, abs=0.03)
  share = np.mean(
    [edits.is_held_out(e) for k in vocab.EDIT_KINDS for e in edit_examples(k)]
  )
  assert share == pytest.approx(0.2, abs=0.04)


def test_every_word_is_seen_in_training():
  rng = np.random.default_rng(0)
  words = {
    (kind, word)
    for kind in vocab.T2I_KINDS
    for _ in range(1000)
    for word in prompts.sample_split(kind, "seen", rng).prompt.split()
  }
  for kind in vocab.T2I_KINDS:
    assert {(kind, c) for c in vocab.COLOURS} <= words
  for kind in ("single", "position", "relation"):
    assert {(kind, s) for s in vocab.SHAPES} <= words
  assert {("counting", n) for n in vocab.NUMBERS} <= words
  assert {("counting", s) for s in vocab.PLURALS.values()} <= words
  assert {("relation", r.split()[0]) for r in vocab.RELATIONS} <= words
  assert {("glyph", c) for c in vocab.GLYPHS} <= words
  assert {("word", w) for w in vocab.WORDS} <= words


def _follow(instruction: str, items: list[Item]) -> list[dict]:
  """Carries out an instruction knowing nothing but its words."""
  things = [
    {"colour": i.colour, "shape": i.shape, "text": i.text, "place": i.place}
    for i in items
  ]

  def the(shape, colour=None):
    fits = [
      t for t in things if t["shape"] == shape and colour in (None, t["colour"])
    ]
    assert len(fits) == 1, f"ambiguous: {instruction} for {things}"
    return fits[0]

  if m := re.fullmatch(rf"make the ({SHAPES}) ({COLOURS})", instruction):
    the(m[1])["colour"] = m[2]
  elif m := re.fullmatch(rf"remove the ({COLOURS}) ({SHAPES})", instruction):
    things.remove(the(m[2], m[1]))
  elif m := re.fullmatch(rf"add {THING} in the ({PLACES})", instruction):
    assert all(t["place"] != m[3] for t in things)
    new = {"colour": m[1], "shape": m[2], "text": "", "place": m[3]}
    things.append(new)
  elif m := re.fullmatch(
    rf"move the ({SHAPES}) to the ({PLACES})", instruction
  ):
    assert all(t["place"] != m[2] for t in things)
    the(m[1])["place"] = m[2]
  elif m := re.fullmatch(
    rf"replace the ({SHAPES}) with a ({SHAPES})", instruction
  ):
    the(m[1])["shape"] = m[2]
  elif m := re.fullmatch(r"change the (letter|digit) to (.)", instruction):
    (thing,) = things
    assert thing["text"].isdigit() == m[2].isdigit() == (m[1] == "digit")
    thing["text"] = m[2]
  else:
    raise AssertionError(instruction)
  return things


@pytest.mark.parametrize("kind", vocab.EDIT_KINDS)
def test_instructions_lead_to_the_target_and_nowhere_else(kind):
  for example in edit_examples(kind):
    result = _follow(example.instruction, list(example.source.items))
    target = [
      {"colour": i.colour, "shape": i.shape, "text": i.text, "place": i.place}
      for i in example.target.items
    ]
    assert result == target
    if kind == "retext":
      wanted = [{k: target[0][k] for k in ("text", "colour")}]
      assert [example.atoms] == wanted
    else:
      for thing in target:
        del thing["text"]
      assert example.atoms == {"objects": target}


@pytest.mark.parametrize("kind", vocab.EDIT_KINDS)
def test_only_the_edited_item_changes(kind):
  for example in edit_examples(kind, 60):
    source = render.render(example.source, 64, 64)
    target = render.render(example.target, 64, 64)
    assert (source != target).any()
    kept = set(example.source.items) & set(example.target.items)
    assert len(kept) >= len(example.source.items) - 1
    for item in kept:
      mask = render.item_mask(item, 64, 64) > 0
      np.testing.assert_array_equal(source[mask], target[mask])
    touched = np.zeros((64, 64), bool)
    for item in {*example.source.items, *example.target.items} - kept:
      touched |= render.item_mask(item, 64, 64) > 0
    np.testing.assert_array_equal(source[~touched], target[~touched])


def test_edit_sources_have_one_and_two_items():
  for kind in vocab.EDIT_KINDS[:-1]:
    counts = {len(e.source.items) for e in edit_examples(kind, 40)}
    assert counts == {1, 2}


def test_description_ignores_jitter_and_order():
  a = Item("red", 0.26, 0.27, 0.34, shape="circle")
  b = Item("blue", 0.74, 0.72, 0.33, shape="cross")
  moved = Item("red", 0.29, 0.25, 0.35, shape="circle")
  text = "blue cross bottom right; red circle top left"
  assert describe(Scene((a, b))) == describe(Scene((b, moved))) == text


def test_same_seed_same_example():
  for kind in vocab.T2I_KINDS:
    assert examples(kind, 5, seed=7) == examples(kind, 5, seed=7)
    assert examples(kind, 5, seed=7) != examples(kind, 5, seed=8)
  for kind in vocab.EDIT_KINDS:
    assert edit_examples(kind, 5, seed=7) == edit_examples(kind, 5, seed=7)


def test_unknown_kinds_and_splits_are_refused():
  rng = np.random.default_rng(0)
  with pytest.raises(InputError, match="'ballet'"):
    prompts.sample_t2i("ballet", rng)
  with pytest.raises(InputError, match="'ballet'"):
    edits.sample_edit("ballet", rng)
  with pytest.raises(InputError, match="'train'"):
    prompts.sample_split("single", "train", rng)
  with pytest.raises(InputError, match="'train'"):
    edits.sample_edit_split("add", "train", rng)
