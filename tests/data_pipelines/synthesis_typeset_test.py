# SPDX-License-Identifier: Apache-2.0
"""Typeset text: boxes hold the ink, shapes are raqm's, lines break by rule."""

import itertools

import numpy as np
import pytest
import regex
import uharfbuzz as hb
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.errors import InputError
from data_pipelines.synthesis import breaking, typeset, words
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import LANGUAGES
from data_pipelines.synthesis.sample import joined
from tests.data_pipelines.synthesis_fonts import faces

INK = (10, 20, 30)


def set_text(code, text, pixels=24, width=300, height=400, face=None, **more):
  return typeset.block(
    text, face or faces(code)[0], LANGUAGES[code], pixels, INK, width, height,
    **more,
  )  # fmt: skip


def alpha(block) -> np.ndarray:
  return np.asarray(block.image.getchannel("A"))


def reference(text: str, face: Face, pixels: int, code: str) -> np.ndarray:
  """The ink of a whole string, as Pillow and raqm draw it on a large sheet."""
  language = LANGUAGES[code]
  font = ImageFont.truetype(
    face.path, pixels, face.index, layout_engine=ImageFont.Layout.RAQM
  )
  sheet = Image.new("L", (2000, 2000))
  ImageDraw.Draw(sheet).text(
    (300, 300), text, fill=255, font=font, direction=language.direction,
    language=language.tag,
  )  # fmt: skip
  return np.asarray(sheet.crop(sheet.getbbox()))


def glyphs(text: str, face: Face, direction: str) -> list[int]:
  buffer = hb.Buffer()
  buffer.add_str(text)
  buffer.guess_segment_properties()
  buffer.direction = direction
  with open(face.path, "rb") as file:
    font = hb.Font(hb.Face(hb.Blob(file.read()), face.index))
  hb.shape(font, buffer)
  return [info.codepoint for info in buffer.glyph_infos]


@pytest.mark.parametrize("code", list(LANGUAGES))
def test_boxes_hold_all_ink_and_lines_are_those_of_raqm(code):
  language = LANGUAGES[code]
  rng = np.random.default_rng(3)
  for face, pixels, align in zip(
    itertools.cycle(faces(code)), (8, 17, 30), typeset.ALIGNMENTS
  ):
    text = words.heading(rng, language) + "\n\n"
    text += words.paragraph(rng, language, 25)
    made = set_text(code, text, pixels, 460, 480, face, align=align)
    assert made.complete and len(made.lines) > 1
    outside = alpha(made).copy()
    for line in made.lines:
      left, top, right, bottom = line.box
      ink = outside[top:bottom, left:right].copy()
      whole = reference(line.text, face, pixels, code)
      # Not a pixel more or less, in the shapes of the whole string.
      np.testing.assert_array_equal(ink, whole)
      outside[top:bottom, left:right] = 0
    assert outside.sum() == 0
    assert set(np.asarray(made.image)[..., :3].reshape(-1, 3)[0]) == set(INK)
    expected = [p for p in text.split("\n") if p]
    assert joined((x.text for x in made.lines), language).replace(" ", "") == (
      "".join(expected).replace(" ", "")
    )


def test_arabic_letters_join():
  face = faces("ar")[0]
  for word in ("مدرسة", "كتاب", "جميل"):
    alone = [
      g for letter in reversed(word) for g in glyphs(letter, face, "rtl")
    ]
    assert glyphs(word, face, "rtl") != alone
    made = set_text("ar", word, 40)
    (line,) = made.lines
    left, top, right, bottom = line.box
    ink = alpha(made)[top:bottom, left:right]
    np.testing.assert_array_equal(ink, reference(word, face, 40, "ar"))
    separate = sum(reference(c, face, 40, "ar").shape[1] for c in word)
    assert ink.shape[1] < separate


def test_arabic_runs_from_the_right():
  face = faces("ar")[0]
  for text, right, left in (
    ("كتاب مدرسة", "كتاب", "مدرسة"),
    ("كتاب ١٢٣", "كتاب", "١٢٣"),  # digits run from the left all the same
  ):
    made = set_text("ar", text, 30, align="start")
    (line,) = made.lines
    assert line.box[2] >= 295  # at the right edge
    ink = alpha(made)[line.box[1] : line.box[3], line.box[0] : line.box[2]]
    for word, at_left in ((right, False), (left, True)):
      for other in (word, word[::-1]):
        part = reference(other, face, 30, "ar")
        width = part.shape[1]
        found = ink[:, :width] if at_left else ink[:, -width:]
        # Words start between two pixels: how far ink had to be moved.
        both = [x.sum(0, float).cumsum() / x.sum() for x in (found, part)]
        moved = np.abs(both[0] - both[1]).sum()
        assert (moved < 1) == (other == word), (text, other, moved)


def test_rows_go_down_and_columns_go_left():
  rng = np.random.default_rng(0)
  for code in ("en", "ar"):
    text = words.paragraph(rng, LANGUAGES[code], 150)
    lines = set_text(code, text, 18, height=900).lines
    assert len(lines) > 3 and " ".join(x.text for x in lines) == text
    for before, after in itertools.pairwise(lines):
      assert before.box[3] <= after.box[1]
  text = words.paragraph(rng, LANGUAGES["zh-vertical"], 60)
  lines = set_text("zh-vertical", text, 18, 400, 200).lines
  assert len(lines) > 3 and "".join(x.text for x in lines) == text
  assert lines[0].box[2] > 380  # the first one at the right
  for before, after in itertools.pairwise(lines):
    assert before.box[0] >= after.box[2]
    assert before.box[3] - before.box[1] > 100


def test_columns_have_upright_forms_of_brackets():
  face = faces("zh-vertical")[0]
  assert glyphs("（", face, "ttb") != glyphs("（", face, "ltr")
  left, top, right, bottom = set_text("zh-vertical", "（", 60).lines[0].box
  assert right - left > 2 * (bottom - top)
  left, top, right, bottom = set_text("zh", "（", 60).lines[0].box
  assert bottom - top > 2 * (right - left)


@pytest.mark.parametrize("code", ["zh", "ja", "zh-vertical"])
def test_no_line_begins_or_ends_with_the_wrong_sign(code):
  rng = np.random.default_rng(5)
  letters = ["abc", "12.5%", " ", *"天地人、。，！？）」』（「『ーっ々あア"]
  for room in range(4, 12):
    text = "人" + "".join(rng.choice(letters, 200))
    text = regex.sub(r"[（「『]+(?=[、。，！？）」』ーっ々 ]|$)", "人", text)
    lines, complete = breaking.break_lines(
      text, LANGUAGES[code], lambda piece: len(piece), 40 + room
    )
    assert complete and len(lines) > 3
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    for line in lines:
      assert line[0] not in "、。，！？）」』ーっ々", line
      assert line[-1] not in "（「『", line
      # Words and numbers of another script are not cut.
      assert "abc" * line.count("a") == "".join(c for c in line if c in "abc")


@pytest.mark.parametrize("code", ["th", "hi", "ko"])
def test_clusters_are_never_cut(code):
  language = LANGUAGES[code]
  rng = np.random.default_rng(2)
  for room in range(9, 40):
    text = words.paragraph(rng, language, 80)
    if code == "th":
      text += "ฮฺึ่แฬ็่งญู๋เกฺ๊าะ"  # of no word
    bounds = set(itertools.accumulate(map(len, regex.findall(r"\X", text))))
    lines, complete = breaking.break_lines(
      text, language, lambda piece: len(regex.findall(r"\X", piece)), room
    )
    assert complete
    at = 0
    for line in lines:
      at = text.index(line, at) + len(line)
      assert at in bounds, line
      assert line[-1] not in "เแโใไ"


def test_thai_breaks_between_words():
  language = LANGUAGES["th"]
  rng = np.random.default_rng(4)
  for _ in range(30):
    drawn = [str(w) for w in rng.choice(words.vocabulary(language), 20)]
    text = "".join(drawn)
    bounds = set(itertools.accumulate(map(len, drawn)))
    lines, complete = breaking.break_lines(text, language, len, 24)
    assert complete and "".join(lines) == text
    cuts = set(itertools.accumulate(map(len, lines)))
    # A word may begin with another one; hardly ever do two ways exist.
    assert len(cuts - bounds) <= 1


def test_what_does_not_fit_is_incomplete():
  text = "some words that need two lines or more"
  assert set_text("en", text, 24).complete
  assert not set_text("en", text, 24, height=20).complete
  assert not set_text("en", "incomprehensibilities", 24, width=60).complete
  assert not set_text("en", "  ", 24).complete
  tall = set_text("en", text, 24, width=120, height=70)
  assert not tall.complete and len(tall.lines) == 2
  assert text.startswith(" ".join(line.text for line in tall.lines))


@pytest.mark.parametrize("code", ["en", "ar", "zh-vertical"])
def test_fitting_is_the_largest_that_fits(code):
  language, face = LANGUAGES[code], faces(code)[0]
  text = words.paragraph(np.random.default_rng(1), language, 40)
  pixels = typeset.fitting(text, face, language, (8, 90), 300, 300)
  assert 12 < pixels < 60
  assert set_text(code, text, pixels - 1, 300, 300).complete
  assert not set_text(code, text, round(1.3 * pixels), 300, 300).complete
  assert typeset.fitting(text, face, language, (60, 90), 300, 300) is None
  assert typeset.fitting(text, face, language, (8, 10), 300, 300) == 10


def test_alignment_and_blank_lines():
  left, middle, right = (
    set_text("en", "il", align=align).lines[0].box
    for align in typeset.ALIGNMENTS
  )
  assert left[0] <= 3 and right[2] >= 296
  assert abs((middle[0] + middle[2]) / 2 - 150) <= 2
  one, two = set_text("en", "x\nx").lines
  first, apart = set_text("en", "x\n\nx").lines
  step = two.box[1] - one.box[1]
  assert step == round(1.3 * 24)
  assert apart.box[1] - first.box[1] == round(1.5 * 1.3 * 24)


def test_lines_of_tall_letters_are_moved_apart():
  text = "กี้ กู่\nกี้ กู่"
  one, two = set_text("th", text, 40, leading=0.5).lines
  assert one.box[3] < two.box[1]


def test_an_unreadable_font_is_named(tmp_path):
  (tmp_path / "font.ttf").write_bytes(b"no font")
  with pytest.raises(InputError, match="cannot be read"):
    typeset.font_of(Face(str(tmp_path / "font.ttf")), 12)
