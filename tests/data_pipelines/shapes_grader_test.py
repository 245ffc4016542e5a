# SPDX-License-Identifier: Apache-2.0
"""The grade rises where an image comes nearer to the rules, and only there."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.shapes import checker, edits, grader, prompts
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.render import render
from data_pipelines.shapes.scene import Scene


def examples(kind, count=12):
  return [
    prompts.sample_t2i(kind, np.random.default_rng(i)) for i in range(count)
  ]


def drawn(scene):
  return render(scene, 64, 64)


@pytest.mark.parametrize("kind", vocab.T2I_KINDS)
def test_right_images_are_near_one_and_empty_ones_at_zero(kind):
  made = examples(kind)
  right = [grader.grade(drawn(e.scene), e.atoms) for e in made]
  assert min(right) > 0.75 and max(right) <= 1.0
  empty = drawn(Scene(()))
  assert all(grader.grade(empty, e.atoms) == 0.0 for e in made)


@pytest.mark.parametrize("kind", vocab.T2I_KINDS)
def test_what_the_checker_refuses_is_graded_below_what_it_accepts(kind):
  made = examples(kind)
  images = [drawn(e.scene) for e in made]
  for one in made:
    values = [
      (checker.check(image, one.atoms)["all"], grader.grade(image, one.atoms))
      for image in images
    ]
    accepted = [grade for passed, grade in values if passed]
    refused = [grade for passed, grade in values if not passed]
    assert min(accepted) > max(refused)


def changed(example, **fields):
  """The image of an example whose first item is another."""
  first, *others = example.scene.items
  first = dataclasses.replace(first, **fields)
  return drawn(dataclasses.replace(example.scene, items=(first, *others)))


def test_each_property_counts_by_itself():
  atoms = {
    "objects": [{"colour": "red", "shape": "square", "place": "top left"}]
  }
  example = next(
    e for e in examples("position", 400)
    if e.atoms["objects"] == atoms["objects"]
  )  # fmt: skip
  right = grader.grade(drawn(example.scene), atoms)
  colour = grader.grade(changed(example, colour="blue"), atoms)
  shape = grader.grade(changed(example, shape="circle"), atoms)
  place = grader.grade(changed(example, x=0.75, y=0.75), atoms)
  for value in (colour, shape, place):
    assert right - 0.4 < value < right - 0.1
  everything = changed(example, colour="blue", shape="cross", x=0.75, y=0.75)
  assert grader.grade(everything, atoms) < 0.35


def test_it_rises_on_the_way_to_the_right_colour_and_place():
  example = examples("position", 1)[0]
  image = drawn(example.scene).astype(np.float32)
  paint = np.array(vocab.COLOURS[example.scene.items[0].colour], np.float32)
  ink = np.abs(image - vocab.BACKGROUND).max(axis=-1) > 100
  other = np.array([40, 40, 120], np.float32)
  values = []
  for share in (0.5, 0.75, 1.0):
    mixed = image.copy()
    mixed[ink] = share * paint + (1 - share) * other
    values.append(grader.grade(mixed.astype(np.uint8), example.atoms))
  assert values[0] < values[1] < values[2]


def test_too_many_objects_cost_as_much_as_too_few():
  wanted, found = {}, {}
  for example in examples("counting", 60):
    count = len(example.atoms["objects"])
    things = tuple(example.atoms["objects"][0].items())
    wanted[things, count] = example.atoms
    found[things, count] = drawn(example.scene)
  things = next(
    t for t, n in wanted if n == 2 and (t, 1) in found and (t, 3) in found
  )
  right, few, many = (
    grader.grade(found[things, n], wanted[things, 2]) for n in (2, 1, 3)
  )
  assert few == pytest.approx(right / 2, abs=0.06)
  assert many == pytest.approx(right * 2 / 3, abs=0.06)


@pytest.mark.parametrize("kind", vocab.EDIT_KINDS)
def test_the_right_edit_has_the_highest_grade(kind):
  for seed in range(4):
    made = edits.sample_edit(kind, np.random.default_rng(seed))
    source, target = drawn(made.source), drawn(made.target)
    assert grader.grade_edit(source, target, target) == 1.0
    untouched = grader.grade_edit(source, target, source)
    half = ((source.astype(int) + target) // 2).astype(np.uint8)
    assert untouched < 0.75
    # A pale blot in between is nowhere quite wrong, and no right edit.
    assert grader.grade_edit(source, target, half) < 0.9


def test_an_empty_result_and_an_empty_target():
  made = edits.sample_edit("recolour", np.random.default_rng(0))
  source, target = drawn(made.source), drawn(made.target)
  empty = drawn(Scene(()))
  assert grader.grade_edit(source, target, empty) < 0.5
  assert grader.grade_edit(source, empty, empty) == 1.0
  # Nothing was asked for, and what is there is wrong.
  assert grader.grade(empty, {"objects": []}) == 1.0
  assert grader.grade(source, {"objects": []}) == 0.0
