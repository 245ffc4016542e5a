# SPDX-License-Identifier: Apache-2.0
"""Templates: boxes against pixels, lines against Pillow, what is refused."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("typst")
pytest.importorskip("uharfbuzz")

from PIL import Image, ImageDraw, ImageFont, features

from data_pipelines.errors import InputError
from data_pipelines.synthesis import (
  coverage,
  fonts,
  template_engine,
  template_text,
  templates,
  words,
)
from data_pipelines.synthesis.languages import LANGUAGES
from data_pipelines.synthesis.sample import Rejected, Sample
from data_pipelines.synthesis.template_palette import (
  LARGE,
  SMALL,
  contrast,
  palette,
)

ROOT = pathlib.Path(__file__).parents[2]
SIZE = (512, 448)
KINDS = tuple(templates.KINDS)
ROOMY = ("slide", "poster", "infographic", "ui", "document")


def faces_of(code: str):
  try:
    return template_engine.usable(fonts.faces_of(LANGUAGES[code]))
  except InputError:
    pytest.skip(f"needs the Debian package {LANGUAGES[code].package}")


def drafted(kind: str, code: str, seed: int, size=SIZE):
  """The first draft of a seed that fits its template, and its page."""
  language, faces = LANGUAGES[code], faces_of(code)
  for i in range(20):
    rng = np.random.default_rng([seed, i])
    data, draft = templates.drafted(kind, language, faces, size, rng)
    page = template_engine.typeset(kind, data, draft.texts, language, faces)
    if not isinstance(page, str):
      return data, draft, page
  raise AssertionError(f"{kind} {code}: {page}")


def again(kind: str, code: str, data, draft):
  return template_engine.typeset(
    kind, data, draft.texts, LANGUAGES[code], faces_of(code)
  )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", ["en", "ar", "zh", "hi", "ja", "ko", "th"])
def test_boxes_are_the_ink(code, kind):
  """Hiding a text changes the pixels in its boxes, to their edges."""
  data, draft, page = drafted(kind, code, 3)
  shown = np.asarray(page.image).astype(int)
  numbers = np.random.default_rng(5).permutation(len(draft.texts))[:4]
  for number in map(int, numbers):
    hidden = again(kind, code, {**data, "hidden": [number]}, draft)
    changed = np.abs(np.asarray(hidden.image) - shown).max(-1) > 0
    assert changed.any(), draft.texts[number]
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    inside = np.zeros_like(changed)
    for line in hidden.lines[number]:
      left, top, right, bottom = line.box
      inside |= (
        (x + 1 > left - 1) & (x < right + 1) & (y + 1 > top - 1)
        & (y < bottom + 1)
      )  # fmt: skip
    assert not (changed & ~inside).any(), draft.texts[number]
    boxes = np.array([line.box for line in page.lines[number]])
    rows, columns = np.nonzero(changed.any(1))[0], np.nonzero(changed.any(0))[0]
    drawn = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    union = (*boxes[:, :2].min(0), *boxes[:, 2:].max(0))
    np.testing.assert_allclose(drawn, union, atol=1.5)


def pillow_box(text: str, face, code: str):
  """The ink at 96 pixels per em."""
  font = ImageFont.truetype(face.path, 96, face.index)
  canvas = Image.new("L", (96 * len(text) + 192, 384))
  ImageDraw.Draw(canvas).text(
    (96, 96), text, 255, font, language=code,
    direction="rtl" if code == "ar" else "ltr",
  )  # fmt: skip
  return canvas.getbbox()


def test_ink_ends_where_the_outline_does():
  """Not at its control points, which lie 0.03 em farther out here."""
  face = next((f for f in faces_of("zh") if "Serif" in f.file), None)
  if face is None:
    pytest.skip("needs the Debian package fonts-noto-cjk")
  box = template_text.ink("校", False, face, LANGUAGES["zh"]).box
  font = ImageFont.truetype(face.path, 960, face.index)
  canvas = Image.new("L", (1400, 1400))
  ImageDraw.Draw(canvas).text((200, 1100), "校", 255, font, anchor="ls")
  drawn = np.array(canvas.getbbox()) - (200, 1100, 200, 1100)
  np.testing.assert_allclose(np.array(box) * 960, drawn, atol=5)


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow without raqm")
@pytest.mark.parametrize("code", ["en", "ar", "zh", "hi", "th"])
def test_lines_are_as_wide_as_pillow_draws_them(code):
  """So every box belongs to its text. typst trims marks of Chinese."""
  seen = 0
  for kind in ("slide", "poster", "table"):
    _, draft, page = drafted(kind, code, 1)
    for text, lines in zip(draft.texts, page.lines):
      for line in lines:
        if code == "zh" and any(c in "，。" for c in line.text):
          continue
        box = pillow_box(line.text, text.face, code)
        scale = line.size / 96
        expected = ((box[2] - box[0]) * scale, (box[3] - box[1]) * scale)
        found = (line.box[2] - line.box[0], line.box[3] - line.box[1])
        # FreeType's hints move outlines to whole pixels.
        np.testing.assert_allclose(found, expected, atol=3.5 * scale)
        seen += 1
  assert seen > 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", ["en", "ar", "zh"])
def test_lines_are_the_text_in_order(code, kind):
  _, draft, page = drafted(kind, code, 8)
  spaced = LANGUAGES[code].spaces
  for text, lines in zip(draft.texts, page.lines):
    joined = (" " if spaced else "").join(line.text for line in lines)
    assert joined == text.text
    tops = [line.box[1] for line in lines]
    if kind != "document":  # whose columns begin at the top again
      assert tops == sorted(tops)


def test_columns_are_read_one_after_the_other():
  for seed in range(20):
    data, _, page = drafted("document", "en", seed, (900, 700))
    if data["columns"] > 1:
      break
  body = [pair[0] for pair in data["body"]]
  lines = [line for number in body for line in page.lines[number]]
  middles = [(line.box[1] + line.box[3]) / 2 for line in lines]
  jumps = [i for i in range(1, len(lines)) if middles[i] < middles[i - 1] - 5]
  assert 1 <= len(jumps) < data["columns"]
  for i in jumps:
    assert lines[i].box[0] > lines[i - 1].box[0] + 100


@pytest.mark.parametrize("code, sign", [("en", 1), ("ar", -1)])
def test_comics_are_read_in_the_direction_of_the_language(code, sign):
  pairs = 0
  for seed in range(6):
    data, _, page = drafted("comic", code, seed)
    for panel in data["panels"]:
      starts = [
        sum(page.lines[who["says"]][0].box[::2]) / 2 for who in panel["people"]
      ]
      pairs += len(starts) - 1
      assert starts == sorted(starts, reverse=sign < 0)
    first = [p["people"][0]["says"] for p in data["panels"] if p["row"] == 0]
    across = [sum(page.lines[n][0].box[::2]) / 2 for n in first]
    assert across == sorted(across, reverse=sign < 0)
  assert pairs > 3


def test_user_text_is_drawn_as_it_is_and_never_as_markup():
  text = '#panic("x") *bold* $x^2$ \\u{41} // [a] @b <c> `d` -- ~ e_f_'
  faces = faces_of("en")
  for seed in range(9):
    sample = templates.draw_kind(
      "slide", LANGUAGES["en"], faces, (900, 700),
      np.random.default_rng(seed), [text],
    )  # fmt: skip
    assert isinstance(sample, Sample)
    assert text in [block["text"] for block in sample.layout["blocks"]]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_does_not_fit_is_refused(kind):
  faces, long = faces_of("en"), "Donaudampfschiff" * 12
  reasons = set()
  for text in (long, "many words " * 400, "many words " * 5000):
    found = templates.draw_kind(
      kind, LANGUAGES["en"], faces, SIZE, np.random.default_rng(11), [text]
    )
    if isinstance(found, Rejected):
      reasons.add(found.reason)
  known = {template_engine.NO_ROOM, template_engine.LEAVES_FRAME}
  assert reasons <= known
  # Tables quote the user at most in a note, a dialog has no body here.
  assert reasons == known or kind not in ROOMY


@pytest.mark.parametrize(
  "text, reason",
  [
    ("tofu \U0002a6d6 here", coverage.NO_GLYPH),
    ("private \ue000", coverage.REFUSED),
    ("left {{over}}", coverage.PLACEHOLDER),
    ("mixed שלום", "directions too mixed"),
  ],
)
def test_text_that_no_font_draws_is_refused(text, reason):
  faces = [f for f in faces_of("en") if f.file == "DejaVuSans.ttf"]
  found = templates.draw_kind(
    "poster", LANGUAGES["en"], faces, SIZE, np.random.default_rng(0), [text]
  )
  assert found == Rejected(reason)


def test_vertical_text_is_refused():
  found = templates.draw(
    LANGUAGES["zh-vertical"], [], SIZE, np.random.default_rng(0)
  )
  assert found == Rejected(templates.VERTICAL)


def test_samples_tell_everything_and_repeat():
  kinds = set()
  for seed in range(8):
    one, two = (
      templates.draw(
        LANGUAGES["en"], faces_of("en"), SIZE, np.random.default_rng(seed)
      )
      for _ in range(2)
    )
    assert one.image.tobytes() == two.image.tobytes()
    assert (one.layout, one.caption) == (two.layout, two.caption)
    assert one.image.size == SIZE and one.image.mode == "RGB"
    assert one.kind == "text-template-en"
    kinds.add(one.layout["background"])
    for block in one.layout["blocks"]:
      assert block["text"] in one.caption and block["lines"]
    corners = np.array([line["polygon"] for line in one.layout["lines"]])
    assert corners.min() >= 0 and (corners <= np.array(SIZE)).all()
    assert one.text.split("\n") == [x["text"] for x in one.layout["lines"]]
  assert len(kinds) > 3


@pytest.mark.parametrize("code", ["en", "ar"])
def test_pages_hold_up_to_a_thousand_tokens(code):
  counts, sizes = [], []
  for seed in range(4):
    _, draft, page = drafted("document", code, seed, (1536, 2048))
    texts = [text.text for text in draft.texts]
    counts.append(sum(words.tokens_of(text, LANGUAGES[code]) for text in texts))
    sizes += [line.size for lines in page.lines for line in lines]
  assert max(counts) > 600 and max(counts) < 1200
  assert min(sizes) >= LANGUAGES[code].smallest


def test_letters_are_as_small_as_five_pixels():
  smallest = min(
    line.size
    for seed in range(12)
    for lines in drafted("document", "en", seed, (384, 384))[2].lines
    for line in lines
  )
  assert 5 <= smallest < 7


def test_every_colour_of_text_can_be_read():
  def rgb(text):
    return tuple(v / 255 for v in bytes.fromhex(text[1:]))

  for seed in range(300):
    found = palette(np.random.default_rng(seed))
    colours = {name: rgb(value) for name, value in found.items()}
    for ground in ("paper", "panel"):
      # Rounded to bytes, a ratio may lose a little.
      for ink, least in (("ink", SMALL), ("soft", SMALL), ("strong", LARGE)):
        assert contrast(colours[ink], colours[ground]) > least - 0.1
    for ground in ("accent", "second"):
      assert contrast(colours[f"on_{ground}"], colours[ground]) > SMALL - 0.1
  # The two ends of WCAG's scale.
  assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
  assert contrast((1, 0, 0), (1, 0, 0)) == 1


def test_of_two_fonts_of_one_name_one_is_used(tmp_path):
  face = next(f for f in faces_of("en") if f.file == "DejaVuSans.ttf")
  for name in ("a.ttf", "b.ttf"):
    shutil.copy(face.path, tmp_path / name)
  two = fonts.faces_of(LANGUAGES["en"], str(tmp_path))
  assert len(two) == 2
  assert template_engine.usable(two) == two[:1]
  assert len(template_engine._fonts(two).opened.fonts()) == 1


def test_charts_have_the_shares_of_their_numbers():
  for seed in range(12):
    data, draft, page = drafted("infographic", "en", seed)
    if data["variant"] == "bars":
      break
  values = [int(draft.texts[value].text) for _, value, _ in data["rows"]]
  shares = [share for *_, share in data["rows"]]
  np.testing.assert_allclose(shares, np.array(values) / max(values), atol=1e-3)
  assert isinstance(page.image, Image.Image)


def test_the_installed_package_carries_the_templates(tmp_path):
  copy = tmp_path / "copy"
  copy.mkdir()
  for name in ("pyproject.toml", "requirements.txt", "README.md"):
    shutil.copy(ROOT / name, copy)
  for folder in ("data_pipelines", "qi2_jax"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
  subprocess.run(
    [
      sys.executable, "-c", "from setuptools import setup; setup()", "-q",
      "build_py", "--build-lib", str(tmp_path / "built"),
    ],
    cwd=copy, check=True, capture_output=True,
  )  # fmt: skip
  built = tmp_path / "built" / "data_pipelines" / "synthesis" / "templates"
  expected = {path.name for path in template_engine.FOLDER.glob("*.typ")}
  assert {path.name for path in built.glob("*.typ")} == expected
  assert {f"{kind}.typ" for kind in KINDS} < expected
