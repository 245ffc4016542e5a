# SPDX-License-Identifier: Apache-2.0
"""The corpus of small text: what is drawn is what the caption says."""

import dataclasses
import json

import numpy as np
import pytest
from fontTools import fontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from scipy import ndimage

from data_pipelines import imagefolder
from data_pipelines.errors import InputError
from data_pipelines.records import decode_image, open_dataset
from data_pipelines.shapes.fonts import font_at
from data_pipelines.synthesis import fonts, words
from data_pipelines.synthesis.languages import LANGUAGES
from data_pipelines.text_corpus import generate, layout, typefaces
from data_pipelines.text_corpus.generate import Options


def all_pages(**fields):
  return list(generate.pages(Options(**({"count": 9} | fields))))


@pytest.fixture(scope="module")
def chinese_font(tmp_path_factory):
  """A font whose every glyph is a box: no font for Chinese is shipped."""
  path = str(tmp_path_factory.mktemp("fonts") / "boxes.ttf")
  pen = TTGlyphPen(None)
  for x, y in ((100, 0), (100, 700), (800, 700), (800, 0)):
    (pen.lineTo if x + y > 100 else pen.moveTo)((x, y))
  pen.closePath()
  names = [".notdef", "box"]
  builder = fontBuilder.FontBuilder(1000, isTTF=True)
  builder.setupGlyphOrder(names)
  text = words.characters(LANGUAGES["zh"])
  builder.setupCharacterMap(dict.fromkeys(map(ord, text), "box"))
  builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
  builder.setupHorizontalMetrics(dict.fromkeys(names, (900, 100)))
  builder.setupHorizontalHeader(ascent=800, descent=-200)
  builder.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
  builder.setupOS2()
  builder.setupPost()
  builder.save(path)
  return path


def test_pages_depend_on_their_number_alone():
  a, b = all_pages(), all_pages(count=4)
  for (name, kind, image, text), other in zip(a, b):
    assert (name, kind, text) == (other[0], other[1], other[3])
    np.testing.assert_array_equal(image, other[2])
  for changed in ({"seed": 1}, {"split": "held_out"}):
    c = all_pages(**changed)
    assert all(x[3] != y[3] for x, y in zip(a, c))
  assert [page[1] for page in a[:3]] == [f"{k}_en" for k in layout.KINDS]


def test_every_page_is_full_of_text_of_its_size():
  sizes = ((256, 256), (320, 192))
  seen = set()
  for _, _, image, text in all_pages(count=24, sizes=sizes):
    seen.add(image.shape)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    assert len(text.split("\n")) >= 3
    # Strokes are everywhere: many neighbouring pixels differ much.
    steps = np.abs(np.diff(np.float32(image).mean(-1), axis=1))
    assert (steps > 25).mean() > 0.01
    assert text.isascii()
  assert seen == {(256, 256, 3), (192, 320, 3)}


def test_a_document_shows_the_lines_of_its_caption(monkeypatch):
  """One column on flat paper: a band of ink per line, as wide as the line."""
  pixels = 12
  monkeypatch.setattr(layout, "_pixels", lambda rng, low=0, high=0: pixels)
  path = typefaces.fonts_of("en")[0]
  for seed in range(5):
    rng = np.random.default_rng(seed)
    image, text = layout.draw("document", "en", (190, 256), (path,), rng)
    ink = np.abs(image - image[0, 0].astype(int)).sum(-1) > 60
    # The dot of an i belongs to its line; the next line is further away.
    rows = ndimage.binary_closing(ink.any(axis=1), np.ones(2))
    bands, count = ndimage.label(rows)
    lines = text.split("\n")
    assert count == len(lines) > 5
    for (band,), line in zip(ndimage.find_objects(bands), lines):
      columns = np.flatnonzero(ink[band].any(axis=0))
      width = columns.max() - columns.min()
      sizes = {font_at(path, size).getlength(line) for size in (pixels, 20)}
      assert min(abs(width - s) for s in sizes) <= 4, line


def test_lines_fit_and_lose_no_word():
  font = font_at(typefaces.fonts_of("en")[0], 12)
  text = words.sentence(np.random.default_rng(0), LANGUAGES["en"]) * 3
  lines = layout.wrap(text, font, 90, "en")
  assert all(font.getlength(line) <= 90 for line in lines)
  assert " ".join(lines) == text and len(lines) > 2
  assert layout.wrap("a incomprehensibilities b", font, 40, "en") == ["a", "b"]
  assert layout.wrap("incomprehensibilities", font, 40, "en") == []


def test_chinese_is_drawn_and_breaks_anywhere(chinese_font):
  fields = {"languages": ("en", "zh"), "font_zh": chinese_font, "count": 12}
  made = all_pages(**fields)
  kinds = [kind for _, kind, _, _ in made]
  assert kinds.count("slide_zh") == kinds.count("slide_en") == 2
  known = set(words.characters(LANGUAGES["zh"])) | {"\n"}
  for _, kind, image, text in made:
    if kind.endswith("zh"):
      assert set(text) <= known and len(text) > 20 and image.std() > 5
  font = font_at(chinese_font, 10)
  assert layout.wrap("的一是不了", font, 19, "zh") == ["的一", "是不", "了"]


def test_both_formats_hold_the_same_pages(tmp_path):
  options = Options(count=5, sizes=((64, 80),))
  generate.write_dataset(tmp_path / "set", options)
  generate.write_folder(tmp_path / "folder", options)
  imagefolder.convert(tmp_path / "folder", tmp_path / "converted")
  pages = {name: (kind, im, t) for name, kind, im, t in generate.pages(options)}
  lines = (tmp_path / "folder/metadata.jsonl").read_text("utf-8").splitlines()
  assert {json.loads(x)["file_name"] for x in lines} == {
    f"{name}.png" for name in pages
  }
  dataset = open_dataset(tmp_path / "set")
  assert len(dataset) == 5
  for i in range(5):
    record = dataset[i]
    kind, image, text = pages[record.id]
    assert (record.kind, record.caption, record.task) == (kind, text, "t2i")
    np.testing.assert_array_equal(decode_image(record.target), image)
  dataset.close()
  converted = open_dataset(tmp_path / "converted")
  texts = {converted[i].caption for i in range(len(converted))}
  converted.close()
  assert texts <= {text for _, _, text in pages.values()} and texts
  for write in (generate.write_dataset, generate.write_folder):
    with pytest.raises(InputError, match="already exists"):
      write(tmp_path / "set", options)


def test_nothing_is_left_of_a_folder_that_failed(tmp_path, monkeypatch):
  monkeypatch.setattr(fonts, "system_fonts", list)
  typefaces.fonts_of.cache_clear()
  options = Options(count=3, languages=("zh",))
  for write in (generate.write_dataset, generate.write_folder):
    with pytest.raises(InputError, match="No installed font draws Chinese"):
      write(tmp_path / "out", options)
  assert list(tmp_path.iterdir()) == []
  typefaces.fonts_of.cache_clear()


@pytest.mark.parametrize("fields, message", [
  ({"languages": ("fr",)}, "languages"), ({"kinds": ()}, "kinds"),
  ({"split": "both"}, "split"), ({"count": 0}, "at least one page"),
  ({"sizes": ((256, 32),)}, "at least 64 px"),
])  # fmt: skip
def test_bad_options_are_named(fields, message):
  with pytest.raises(InputError, match=message):
    dataclasses.replace(Options(count=1), **fields)


def test_a_font_without_the_language_is_named():
  latin = typefaces.fonts_of("en")[0]
  assert all(
    fonts.covers(path, words.characters(LANGUAGES["en"]))
    for path in typefaces.fonts_of("en")
  )
  with pytest.raises(InputError, match="lacks characters"):
    typefaces.fonts_of("zh", latin)
  with pytest.raises(InputError, match="unreadable"):
    typefaces.fonts_of("zh", "nowhere.ttf")
