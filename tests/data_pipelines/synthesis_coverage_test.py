# SPDX-License-Identifier: Apache-2.0
"""No box is ever drawn: what is accepted has glyphs, by other means as well."""

import functools
import unicodedata

import numpy as np
import pytest
import uharfbuzz as hb
from fontTools import ttLib
from PIL import ImageFont

from data_pipelines.errors import InputError
from data_pipelines.synthesis import coverage, fonts, texts, words
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import LANGUAGES
from tests.data_pipelines.synthesis_fonts import faces, made_face

# One line per sort of trouble.
AWKWARD = (
  "😀", "👩\u200d💻", "🇩🇪", "❤\ufe0f", "☺\ufe0e", "1\ufe0f\u20e3",
  "\U00020000", "\U0002a6d6", "𰻝", "葛", "葛\U000e0100", "葛\U000e0105",
  "नमस्ते", "क्ष", "क\u200dष", "ि", "्", "ก็", "็", "ำ", "م\u200d", "\u064b",
  "e\u0301", "é", "x\u0301", "\u0301", "a\u0323\u0302", "\u0345", "ﬁ",
  "\x00", "\x07", "\t", "\x7f", "\x85", "\u2028", "\u202e", "\u200b", "\u2060",
  "\ufeff", "\xad", "\U000e0041", "\u180e", "\u3164", "\u115f", "\u2800",
  "\ue000", "\U000f1234", "\U0010fffd", "\ud800", "\udfff", "\u0378", "\uffff",
  "\ufdd0", "\ufffc", "\ufffd", "\u25cc", "{{name}}", "\u3000", "\xa0", "①",
  "ｱ", "가", "각", "\u1100\u1161", "ǅ", "𝔄", "Ω", "Å", "ꙮ", "☃", "A", "中",
)  # fmt: skip
IGNORABLE = set("\u200c\u200d") | set(map(chr, range(0xFE00, 0xFE10)))
IGNORABLE |= set(map(chr, range(0xE0100, 0xE01F0)))


@functools.cache
def cmap(face: Face) -> dict:
  with ttLib.TTFont(face.path, fontNumber=face.index, lazy=True) as font:
    return dict(font.getBestCmap())


@functools.cache
def shaper(face: Face) -> hb.Font:
  with open(face.path, "rb") as file:
    return hb.Font(hb.Face(hb.Blob(file.read()), face.index))


def whole_line_glyphs(line: str, face: Face) -> list[int]:
  """Shaped in one go, under the script that HarfBuzz guesses."""
  buffer = hb.Buffer()
  buffer.add_str(line)
  buffer.guess_segment_properties()
  hb.shape(shaper(face), buffer)
  return [info.codepoint for info in buffer.glyph_infos]


def is_box(c: str, face: Face) -> bool:
  """Whether Pillow draws a character as one that no font has."""
  font = ImageFont.truetype(face.path, 40, face.index)
  drawn, missing = (font.getmask(x) for x in (c, "\U000effff"))
  return drawn.size == missing.size and bytes(drawn) == bytes(missing)


def all_faces(tmp_path):
  yield made_face(str(tmp_path / "made.ttf"))
  for language in LANGUAGES.values():
    try:
      yield from fonts.faces_of(language)[:1]
    except InputError:
      continue  # not installed: see the tests that skip


def test_accepted_text_has_no_box(tmp_path):
  rng = np.random.default_rng(0)
  accepted = rejected = 0
  for face in all_faces(tmp_path):
    plain = [c for c in "aZ9 中あ가مक" if ord(c) in cmap(face)]
    candidates = [*AWKWARD]
    for _ in range(120):
      some = rng.choice([*AWKWARD, *plain * 8], int(rng.integers(1, 6)))
      candidates.append("".join(str(c) for c in some))
    for text in candidates:
      if coverage.unrenderable(text, face) is not None:
        rejected += 1
        continue
      accepted += 1
      assert text == unicodedata.normalize("NFC", text)
      for c in set(text) - IGNORABLE:
        assert unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn", "Cf")
        assert cmap(face).get(ord(c), ".notdef") != ".notdef", (text, face)
        if not unicodedata.category(c).startswith(("M", "Z")):
          # In the font made here every glyph is the box.
          assert "made" in face.file or not is_box(c, face), (text, face)
      assert 0 not in whole_line_glyphs(text, face), (text, face)
  assert accepted > 60 and rejected > 300


@pytest.mark.parametrize("code", list(LANGUAGES))
def test_everything_drawable_is_accepted(code):
  language = LANGUAGES[code]
  for face in faces(code):
    base = {"hi": "क", "th": "ก", "ar": "ب"}.get(code, "")
    for c in words.characters(language):
      is_mark = unicodedata.category(c).startswith("M")
      text = unicodedata.normalize("NFC", base + c if is_mark else c)
      assert coverage.unrenderable(text, face) is None, (text, face)
    for word in words.vocabulary(language):
      assert coverage.unrenderable(word, face) is None, (word, face)
    rng = np.random.default_rng(1)
    for _ in range(20):
      text = words.paragraph(rng, language, 60)
      assert coverage.unrenderable(text + "\n" + text, face) is None


def test_reasons(tmp_path):
  made = made_face(str(tmp_path / "made.ttf"))
  latin = Face(str(fonts.bundled_folder() / "DejaVuSans.ttf"))
  for text, face, reason in (
    ("plain text, é\nand more", latin, None),
    ("", latin, coverage.EMPTY), (" \n ", latin, coverage.EMPTY),
    ("e\u0301", latin, coverage.NOT_NORMAL),
    ("x\u0301", latin, None),
    ("a\u0301", made, coverage.NOT_NORMAL),
    ("dear {{name}},", latin, coverage.PLACEHOLDER),
    ("a\tb", latin, coverage.REFUSED), ("a\ue000", latin, coverage.REFUSED),
    ("a\ud800", latin, coverage.REFUSED), ("\ufffd", latin, coverage.REFUSED),
    ("a\u202eb", latin, coverage.INVISIBLE),
    ("a\u200bb", latin, coverage.INVISIBLE),
    ("a中", latin, coverage.NO_GLYPH), ("क", latin, coverage.NO_GLYPH),
    ("az", made, coverage.NO_GLYPH),  # in the cmap, as .notdef
    ("b a", made, None), ("ab", made, coverage.NO_GLYPH),  # only after shaping
    ("a\n\u0301", latin, coverage.NO_BASE), ("\u0301", latin, coverage.NO_BASE),
    ("a\u3164a", made, coverage.BLANK),
    ("葛", made, None), ("葛\U000e0100", made, None),
    ("葛\U000e0101", made, coverage.NO_VARIATION),
    ("a\U000e0100", made, coverage.NO_VARIATION),
    ("a a", made, None),
  ):  # fmt: skip
    assert coverage.unrenderable(text, face) == reason, ascii(text)


def test_a_mark_without_a_letter_would_get_a_dotted_circle():
  face = faces("hi")[0]
  assert coverage.unrenderable("कि", face) is None
  assert coverage.unrenderable("\u25cc", face) is None
  for text in ("ि", "क ि", "कि\nि", "अा"):
    assert coverage.unrenderable(text, face) == coverage.NO_BASE, text


def test_a_variation_counts_if_the_face_has_it():
  japanese, chinese = faces("ja")[0], faces("zh")[0]
  assert coverage.unrenderable("葛\U000e0100", japanese) is None
  assert len(whole_line_glyphs("葛\U000e0100", japanese)) == 1
  # The Chinese face would draw another form without a word.
  reason = coverage.unrenderable("葛\U000e0100", chinese)
  assert reason == coverage.NO_VARIATION
  assert coverage.unrenderable("नमस्ते", japanese) == coverage.NO_GLYPH


def test_normal_text_keeps_what_can_be_seen():
  assert coverage.normal(" e\u0301 \r\n\u3000b\r\n\n") == "é\nb"
  assert coverage.normal("a\n\nb") == "a\n\nb"


def test_fonts_are_found_or_named(tmp_path):
  thai = LANGUAGES["th"]
  with pytest.raises(InputError, match="does not exist"):
    fonts.faces_of(thai, str(tmp_path / "nowhere"))
  made_face(str(tmp_path / "made.ttf"))
  (tmp_path / "broken.ttf").write_bytes(b"no font")
  with pytest.raises(InputError, match=r"None of the 2 fonts .* draws Thai"):
    fonts.faces_of(thai, str(tmp_path))
  source = fonts.bundled_folder() / "DejaVuSans.ttf"
  (tmp_path / "mine.ttf").write_bytes(source.read_bytes())
  (face,) = fonts.faces_of(LANGUAGES["ar"], str(tmp_path))
  assert face.file == "mine.ttf" and face.sha256 == Face(str(source)).sha256
  with pytest.raises(InputError, match="cannot be read"):
    coverage.unrenderable("a", Face(str(tmp_path / "gone.ttf")))


def test_without_an_installed_font_the_package_is_named(monkeypatch):
  monkeypatch.setattr(fonts, "system_fonts", list)
  fonts.faces_of.cache_clear()
  try:
    assert fonts.faces_of(LANGUAGES["en"]) and fonts.faces_of(LANGUAGES["ar"])
    with pytest.raises(InputError, match="fonts-noto-cjk"):
      fonts.faces_of(LANGUAGES["zh"])
  finally:
    fonts.faces_of.cache_clear()


def test_the_face_of_a_collection_is_the_language_s():
  indices = [faces(code)[0].index for code in ("ja", "ko", "zh")]
  assert indices == [0, 1, 2]


def test_texts_of_the_user(tmp_path):
  lines = tmp_path / "texts.txt"
  lines.write_text("one\n\ne\u0301\n", encoding="utf-8")
  assert texts.read_texts(lines, ["en"]) == {"en": ("one", "é")}
  with pytest.raises(InputError, match="do not say which"):
    texts.read_texts(lines, ["en", "zh"])
  rows = tmp_path / "texts.jsonl"
  rows.write_text(
    '{"text": "a\\nb", "language": "en"}\n{"text": "中", "language": "zh"}\n'
  )
  found = texts.read_texts(rows, ["en", "zh", "zh-vertical"])
  assert found == {"en": ("a\nb",), "zh": ("中",), "zh-vertical": ("中",)}
  with pytest.raises(InputError, match="none in language 'ko'"):
    texts.read_texts(rows, ["ko"])
  for line in ("{}", "[]", '{"text": "", "language": "en"}', "no json"):
    rows.write_text(line)
    with pytest.raises(InputError, match=":1 "):
      texts.read_texts(rows, ["en"])
  with pytest.raises(InputError, match="cannot be read"):
    texts.read_texts(tmp_path / "gone", ["en"])
