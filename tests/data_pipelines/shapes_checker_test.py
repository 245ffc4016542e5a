# SPDX-License-Identifier: Apache-2.0
"""The rule-based checker: right images pass, wrong ones fail."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.errors import InputError
from data_pipelines.shapes import checker, colour, edits, prompts, reader
from data_pipelines.shapes import render as renderer
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.scene import Item, Scene

SIZES = [(64, 64), (96, 64), (128, 128)]


def rendered(kind, count, width=64, height=64, seed=0):
  rng = np.random.default_rng(seed)
  drawn = [prompts.sample_t2i(kind, rng) for _ in range(count)]
  return [(renderer.render(e.scene, width, height), e) for e in drawn]


def passes(image, atoms):
  return checker.check(image, atoms)["all"]


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("kind", vocab.T2I_KINDS)
def test_ground_truth_passes(kind, width, height):
  pairs = rendered(kind, 100, width, height)
  rate = np.mean([passes(image, e.atoms) for image, e in pairs])
  assert rate >= 0.99


@pytest.mark.parametrize("kind", vocab.T2I_KINDS)
def test_shuffled_prompts_fail(kind):
  pairs = rendered(kind, 200)
  images, drawn = zip(*pairs)
  others = (*drawn[1:], drawn[0])
  rate = np.mean([passes(i, e.atoms) for i, e in zip(images, others)])
  assert rate <= 0.06


@pytest.mark.parametrize("kind", vocab.T2I_KINDS)
def test_mild_blur_and_noise_pass(kind):
  """What an autoencoder does to an image must not be held against a model."""
  rng = np.random.default_rng(0)
  results = []
  for image, example in rendered(kind, 40):
    blurred = ndimage.gaussian_filter(image.astype(float), (0.8, 0.8, 0))
    noisy = blurred + rng.normal(0, 6, image.shape)
    noisy = noisy.clip(0, 255).astype(np.uint8)
    results.append(passes(noisy, example.atoms))
  assert np.mean(results) >= 0.97


def other(value, options):
  options = list(options)
  return options[(options.index(value) + 1) % len(options)]


def wrong_atoms(atoms):
  """Yields (name of the violated entry, atoms that the image violates)."""
  if "text" in atoms:
    glyphs = [other(atoms["text"][0], vocab.GLYPHS), *atoms["text"][1:]]
    yield "text", {**atoms, "text": "".join(glyphs)}
    yield "text", {**atoms, "text": atoms["text"] + "A"}
    yield "text", {**atoms, "text": atoms["text"][:-1]}
    yield "text", {**atoms, "text": atoms["text"].lower() + "!"}
    yield "colour", {**atoms, "colour": other(atoms["colour"], vocab.COLOURS)}
    return
  for field, options in (
    ("colour", vocab.COLOURS),
    ("shape", vocab.SHAPES),
    ("place", vocab.PLACES),
  ):
    for k, thing in enumerate(atoms["objects"]):
      if field in thing:
        wrong = copy.deepcopy(atoms)
        wrong["objects"][k][field] = other(thing[field], options)
        yield field, wrong
  for objects in (atoms["objects"][1:], atoms["objects"] * 2):
    yield "count", {"objects": objects}
  if "relation" in atoms:
    for relation in set(vocab.RELATIONS) - {atoms["relation"]}:
      yield "relation", {**atoms, "relation": relation}
    yield "relation", {**atoms, "objects": atoms["objects"][::-1]}


@pytest.mark.parametrize("kind", vocab.T2I_KINDS)
def test_every_wrong_atom_fails(kind):
  for image, example in rendered(kind, 15, seed=3):
    for entry, wrong in wrong_atoms(example.atoms):
      result = checker.check(image, wrong)
      assert not result[entry], (entry, example.prompt, wrong)
      assert not result["all"]


@pytest.mark.parametrize("kind", vocab.T2I_KINDS)
@pytest.mark.parametrize("same_colour", [True, False])
def test_extra_objects_fail(kind, same_colour):
  for _, example in rendered(kind, 8, seed=4):
    paint = example.scene.items[0].colour
    if not same_colour:
      paint = other(paint, vocab.COLOURS)
    mask = renderer.item_mask
    taken = np.max([mask(i, 96, 64) for i in example.scene.items], axis=0)
    near = ndimage.binary_dilation(taken > 0, iterations=2)
    for x, y in itertools.product((0.07, 0.5, 0.93), (0.1, 0.5, 0.9)):
      extra = Item(paint, x, y, 0.14, shape="square")
      if (near & (mask(extra, 96, 64) > 0)).any():
        continue
      scene = Scene((*example.scene.items, extra))
      image = renderer.render(scene, 96, 64)
      assert not passes(image, example.atoms), (example.prompt, x, y)


def test_swapped_colours_fail_only_by_binding():
  left = Item("red", 0.27, 0.5, 0.34, shape="circle")
  right = Item("blue", 0.73, 0.5, 0.34, shape="square")
  atoms = {
    "objects": [
      {"colour": "blue", "shape": "circle"},
      {"colour": "red", "shape": "square"},
    ]
  }
  result = checker.check(renderer.render(Scene((left, right)), 64, 64), atoms)
  assert result == {
    "count": True,
    "colour": True,
    "shape": True,
    "binding": False,
    "all": False,
  }


def test_blobs_and_glyphs_are_no_shapes():
  bar = np.full((64, 64, 3), vocab.BACKGROUND, np.uint8)
  bar[30:36, 4:60] = vocab.COLOURS["red"]
  ring = renderer.render(
    Scene((Item("red", 0.5, 0.5, 0.58, text="O"),)), 64, 64
  )
  for image in (bar, ring):
    (found,) = checker.find_objects(image)
    assert found.colour == "red" and found.shape == ""


def test_noise_and_flat_images_fail_everything():
  rng = np.random.default_rng(0)
  images = [
    rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
    np.full((64, 64, 3), vocab.BACKGROUND, np.uint8),
    np.full((64, 64, 3), vocab.COLOURS["red"], np.uint8),
    np.zeros((64, 64, 3), np.uint8),
  ]
  for kind in vocab.T2I_KINDS:
    for image, (_, example) in itertools.product(images, rendered(kind, 5)):
      assert not passes(image, example.atoms)


def test_empty_canvas_is_what_removing_the_last_item_asks_for():
  empty = renderer.render(Scene(()), 64, 64)
  assert passes(empty, {"objects": []})
  one = renderer.render(
    Scene((Item("red", 0.5, 0.5, 0.3, shape="cross"),)), 64, 64
  )
  assert not passes(one, {"objects": []})


@pytest.mark.parametrize("width, height", SIZES)
def test_reader_tells_all_glyphs_apart(width, height):
  rng = np.random.default_rng(0)
  for char in vocab.GLYPHS:
    place = prompts.jittered(rng, (0.5, 0.5), prompts.GLYPH_SIZE)
    scene = Scene((Item("blue", text=char, **place),))
    image = renderer.render(scene, width, height)
    assert reader.read_text(image, "blue") == char


def test_reader_marks_what_it_cannot_read():
  image = renderer.render(
    Scene((Item("red", 0.5, 0.5, 0.6, shape="square"),)), 64, 64
  )
  image[20:24] = vocab.BACKGROUND
  assert set(reader.read_text(image, "red")) <= {reader.UNREADABLE}


@pytest.mark.parametrize("kind", vocab.EDIT_KINDS)
@pytest.mark.parametrize("width, height", SIZES)
def test_edits_score_as_defined(kind, width, height):
  rng = np.random.default_rng(0)
  for _ in range(8):
    example = edits.sample_edit(kind, rng)
    source = renderer.render(example.source, width, height)
    target = renderer.render(example.target, width, height)
    assert passes(target, example.atoms)
    assert not passes(source, example.atoms)
    assert checker.edit_scores(source, target, target) == (1.0, 1.0, 1.0)
    assert checker.edit_scores(source, target, source)[0] == 0.0


def test_edit_scores_count_pixels():
  source = np.full((40, 40, 3), 250, np.uint8)
  target, result = source.copy(), source.copy()
  target[:10] = vocab.COLOURS["red"]
  result[:5] = vocab.COLOURS["red"]  # half of what had to change
  result[10:16] = vocab.COLOURS["blue"]  # 6 of the 30 rows that had not to
  e, p, o = checker.edit_scores(source, target, result)
  assert (e, p) == (0.5, 0.8)
  assert o == pytest.approx((0.5 * 0.8) ** 0.5)


def test_bad_images_are_refused():
  image = np.zeros((64, 64, 3), np.uint8)
  with pytest.raises(InputError, match="no visible difference"):
    checker.edit_scores(image, image, image)
  with pytest.raises(InputError, match="resize"):
    checker.edit_scores(image, image, np.zeros((64, 96, 3), np.uint8))
  with pytest.raises(InputError, match="uint8"):
    checker.check(image.astype(np.float32), {"objects": []})
  with pytest.raises(InputError, match="uint8"):
    checker.check(image[..., 0], {"objects": []})
  with pytest.raises(InputError, match="give two"):
    checker.check(image, {"objects": [], "relation": "above"})


def test_lab_of_published_colours():
  """Values of the CSS Color 4 / colormine tables for D65."""
  rgb = np.array(
    [[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]],
    np.uint8,
  )
  lab = [
    [100, 0, 0],
    [0, 0, 0],
    [53.24, 80.09, 67.20],
    [87.74, -86.18, 83.18],
    [32.30, 79.19, -107.86],
  ]
  np.testing.assert_allclose(colour.lab_from_rgb(rgb), lab, atol=0.05)


def test_lab_agrees_with_scikit_image():
  skimage_color = pytest.importorskip("skimage.color")
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (50, 50, 3), dtype=np.uint8)
  expected = skimage_color.rgb2lab(image)
  np.testing.assert_allclose(colour.lab_from_rgb(image), expected, atol=0.01)


def test_palette_is_well_separated():
  names = [*vocab.COLOURS, "background"]
  values = [*vocab.COLOURS.values(), vocab.BACKGROUND]
  lab = colour.lab_from_rgb(np.array(values, np.uint8))
  for i, j in itertools.combinations(range(len(lab)), 2):
    assert np.linalg.norm(lab[i] - lab[j]) >= 50, (names[i], names[j])


def test_edges_never_look_like_a_third_colour():
  blend = np.linspace(0, 1, 64)[:, None]
  for label, value in enumerate(vocab.COLOURS.values()):
    row = blend * value + (1 - blend) * np.array(vocab.BACKGROUND)
    image = np.repeat(row.round().astype(np.uint8)[None], 8, axis=0)
    seen = set(np.unique(colour.palette_labels(image)).tolist())
    assert seen == {label, colour.BACKGROUND_LABEL}


def test_jitter_free_scene_is_checked_like_a_jittered_one():
  example = rendered("relation", 1)[0][1]
  scene = Scene(
    tuple(dataclasses.replace(i, size=0.34) for i in example.scene.items)
  )
  assert passes(renderer.render(scene, 64, 64), example.atoms)
