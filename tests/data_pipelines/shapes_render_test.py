# SPDX-License-Identifier: Apache-2.0
"""Rendering and fonts of shapes and glyphs."""

import math
import time

import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.shapes import fonts, prompts, render
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.scene import Item, Scene

SIZES = [(64, 64), (96, 64), (64, 96), (128, 128), (256, 160), (33, 47)]

# Areas in a box of side 2, from school geometry.
AREAS = {
  "circle": math.pi,
  "square": 1.76**2,
  "triangle": 1.85,
  "cross": 2 * 2 * 0.68 - 0.68**2,
}


@pytest.mark.parametrize("width, height", SIZES)
def test_every_kind_fits_the_canvas(width, height):
  rng = np.random.default_rng(0)
  for kind in vocab.T2I_KINDS:
    for _ in range(20):
      scene = prompts.sample_t2i(kind, rng).scene
      image = render.render(scene, width, height)
      assert image.shape == (height, width, 3) and image.dtype == np.uint8
      border = np.concatenate(
        [image[0], image[-1], image[:, 0], image[:, -1]]
      ).astype(int)
      assert abs(border - vocab.BACKGROUND).max() <= 2, (kind, scene)
      assert (image != vocab.BACKGROUND).any()


@pytest.mark.parametrize("shape", vocab.SHAPES)
@pytest.mark.parametrize("size", [20.3, 57.0])
def test_coverage_sums_to_the_area(shape, size):
  mask = render.shape_mask(shape, 80, 70, 38.2, 33.7, size)
  assert mask.sum() == pytest.approx(AREAS[shape] * size**2 / 4, rel=0.03)
  assert render.shape_moments(shape)[0] == pytest.approx(AREAS[shape], rel=0.01)


def test_shapes_are_symmetric_and_upright():
  for shape in vocab.SHAPES:
    mask = render.shape_mask(shape, 64, 64, 32, 32, 30)
    np.testing.assert_array_equal(mask, mask[:, ::-1])
  triangle = render.shape_mask("triangle", 64, 64, 32, 32, 30)
  assert triangle[:32].sum() < triangle[32:].sum()


@pytest.mark.parametrize("size", [0.2, 0.5])
def test_form_does_not_depend_on_the_aspect_ratio(size):
  item = Item("red", 0.5, 0.5, size, shape="circle")
  for width, height in ((128, 64), (64, 128)):
    rows, columns = np.nonzero(render.item_mask(item, width, height) > 0.5)
    assert np.ptp(rows) == np.ptp(columns)
    assert np.ptp(rows) + 1 == pytest.approx(size * 64, abs=1)


def test_shape_beyond_the_canvas_is_clipped():
  assert not render.shape_mask("circle", 64, 64, -30, 20, 20).any()
  half = render.shape_mask("square", 64, 64, 0, 32, 20)
  assert half.sum() == pytest.approx(17.6**2 / 2, rel=0.05)


def test_text_has_the_asked_height_and_place():
  for char in "HEX":
    mask = render.text_mask(char, 64, 64, 30, 34, 24, fonts.default_font())
    rows, columns = np.nonzero(mask > 0.5)
    assert np.ptp(rows) + 1 == pytest.approx(24, abs=1)
    assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(34, abs=1)
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(30, abs=1.5)


@pytest.mark.parametrize("word", [*vocab.WORDS, "MWMW"])
def test_letters_of_words_do_not_touch(word):
  mask = render.text_mask(word, 128, 64, 64, 32, 12, fonts.default_font())
  inked = (mask > 0.5).any(axis=0)
  assert np.count_nonzero(inked[1:] & ~inked[:-1]) == len(word)


def test_colours_are_flat_inside():
  image = render.render(
    Scene((Item("blue", 0.5, 0.5, 0.6, shape="square"),)), 64, 64
  )
  assert tuple(image[32, 32]) == vocab.COLOURS["blue"]
  assert tuple(image[2, 2]) == vocab.BACKGROUND


@pytest.mark.parametrize(
  "text, named",
  [
    ("A\x07", "U+0007"),
    ("line\nbreak", "U+000A"),
    ("rocket \N{ROCKET}", "U+1F680 (ROCKET)"),
    ("\u4e2d", "U+4E2D (CJK UNIFIED IDEOGRAPH-4E2D)"),
    ("\ufffd", "U+FFFD"),
    ("\ue000", "U+E000"),
    ("\ud800", "U+D800"),
    ("\uac00", "U+AC00"),
  ],
)
def test_undrawable_text_is_refused_by_name(text, named):
  with pytest.raises(InputError) as error:
    fonts.require_drawable(text, fonts.default_font())
  assert named in str(error.value)


def test_every_undrawable_character_is_named_once():
  with pytest.raises(InputError) as error:
    fonts.require_drawable("a\u4e2d\u6587\u4e2db", fonts.default_font())
  message = str(error.value)
  assert message.count("U+4E2D") == 1 and message.count("U+6587") == 1
  assert "U+0061" not in message


def test_drawable_text_comes_back_composed():
  decomposed = "Cafe\u0301"
  assert fonts.require_drawable(decomposed, fonts.default_font()) == "Caf\xe9"
  for text in (*vocab.WORDS, vocab.GLYPHS):
    assert fonts.require_drawable(text, fonts.default_font()) == text


def test_render_refuses_bad_input(tmp_path):
  scene = Scene((Item("red", 0.5, 0.5, 0.5, text="\u4e2d"),))
  with pytest.raises(InputError, match=r"U\+4E2D"):
    render.render(scene, 64, 64)
  with pytest.raises(InputError, match="at least 32"):
    render.render(Scene(()), 64, 31)
  not_a_font = tmp_path / "font.ttf"
  not_a_font.write_bytes(b"no font")
  for path in (not_a_font, tmp_path / "absent.ttf"):
    with pytest.raises(InputError, match="cannot be read"):
      fonts.require_drawable("A", str(path))
    with pytest.raises(InputError, match="cannot be read"):
      fonts.font_at(str(path), 20)


@pytest.mark.parametrize(
  "fields",
  [
    {"colour": "mauve", "shape": "circle"},
    {"colour": "red", "shape": "blob"},
    {"colour": "red"},
    {"colour": "red", "shape": "circle", "text": "A"},
  ],
)
def test_items_are_validated(fields):
  with pytest.raises(InputError):
    Item(x=0.5, y=0.5, size=0.3, **fields)


def test_rendering_is_fast():
  rng = np.random.default_rng(0)
  scenes = [
    prompts.sample_t2i(kind, rng).scene
    for kind in vocab.T2I_KINDS
    for _ in range(20)
  ]
  seconds = []
  for scene in scenes:
    start = time.perf_counter()
    render.render(scene, 64, 64)
    seconds.append(time.perf_counter() - start)
  # About 0.2 ms; the bound only catches a change of order of magnitude.
  assert np.median(seconds) < 0.005
