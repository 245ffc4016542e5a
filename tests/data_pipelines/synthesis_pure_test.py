# SPDX-License-Identifier: Apache-2.0
"""Pure rendering: what the layout says is there, and can be read."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipelines.synthesis import (
  backgrounds,
  captions,
  colours,
  coverage,
  pure,
  typeset,
  words,
)
from data_pipelines.synthesis.fonts import Face, bundled_folder
from data_pipelines.synthesis.languages import LANGUAGES
from data_pipelines.synthesis.sample import (
  Rejected,
  Sample,
  TextBlock,
  layout_of,
  polygon_of,
)
from tests.data_pipelines.synthesis_fonts import faces

SIZE = (384, 256)


def sample(code, seed, size=SIZE, **more):
  rng = np.random.default_rng([seed, 11])
  return pure.draw(LANGUAGES[code], faces(code), size, rng, **more)


def without_ink(monkeypatch, *args, **more):
  """The same sample with transparent letters."""
  original = typeset.block

  def clear(*args, **more):
    made = original(*args, **more)
    made.image.putalpha(0)
    return made

  with monkeypatch.context() as patch:
    patch.setattr(typeset, "block", clear)
    return sample(*args, **more)


@pytest.mark.parametrize("code", list(LANGUAGES))
def test_all_ink_is_in_polygons_and_stands_out(code, monkeypatch):
  seen = 0
  for seed in range(5):
    made = sample(code, seed)
    if isinstance(made, Rejected):
      continue
    seen += 1
    bare = without_ink(monkeypatch, code, seed)
    assert bare.layout == made.layout and bare.caption == made.caption
    drawn, behind = (np.asarray(x.image, np.int16) for x in (made, bare))
    changed = np.abs(drawn - behind).sum(-1) > 0
    for line in made.layout["lines"]:
      (left, top), (right, bottom) = line["polygon"][0], line["polygon"][2]
      assert 0 <= left < right <= SIZE[0] and 0 <= top < bottom <= SIZE[1]
      box = slice(int(top), int(bottom)), slice(int(left), int(right))
      # Ink on every edge of the box: it is no larger than the line.
      inside = changed[box]
      assert inside[0].any() and inside[-1].any()
      assert inside[:, 0].any() and inside[:, -1].any()
      most = np.abs(drawn[box] - behind[box]).sum(-1).argmax()
      pen, paper = (x[box].reshape(-1, 3)[most] for x in (drawn, behind))
      both = sorted(float(backgrounds.luminance(x)) for x in (pen, paper))
      # At small sizes no pixel is ink alone.
      if bottom - top > 24:
        assert (both[1] + 0.05) / (both[0] + 0.05) >= 2.9
    for line in made.layout["lines"]:
      (left, top), (right, bottom) = line["polygon"][0], line["polygon"][2]
      changed[int(top) : int(bottom), int(left) : int(right)] = False
    assert not changed.any()
  assert seen >= 4


@pytest.mark.parametrize("code", list(LANGUAGES))
def test_layout_text_and_caption_agree(code):
  language = LANGUAGES[code]
  for seed in range(6):
    made = sample(code, seed)
    if isinstance(made, Rejected):
      continue
    layout = json.loads(json.dumps(made.layout))
    assert layout == made.layout and layout["size"] == list(SIZE)
    assert (layout["strategy"], layout["language"]) == ("pure", code)
    assert made.kind == f"text-pure-{code}" and made.image.size == SIZE
    lines = [line["text"] for line in layout["lines"]]
    assert made.text == "\n".join(lines)
    numbers = [i for block in layout["blocks"] for i in block["lines"]]
    assert numbers == list(range(len(lines)))
    for i, block in enumerate(layout["blocks"]):
      assert block["text"] in made.caption
      own = "".join(lines[n] for n in block["lines"])
      assert own.replace(" ", "") == block["text"].replace(" ", "")
      assert {layout["lines"][n]["block"] for n in block["lines"]} == {i}
    (font,) = layout["fonts"]
    face = next(f for f in faces(code) if f.file == font["file"])
    with open(face.path, "rb") as file:
      assert font["sha256"] == hashlib.sha256(file.read()).hexdigest()
    assert font["index"] == face.index
    for line in lines:
      assert coverage.unrenderable(line, face) is None
    if code != "en" and not made.caption.startswith("一"):
      assert language.name in made.caption


def test_samples_depend_on_the_generator_alone():
  one, two, other = sample("en", 1), sample("en", 1), sample("en", 2)
  assert one.layout == two.layout and one.text != other.text
  np.testing.assert_array_equal(np.asarray(one.image), np.asarray(two.image))


def test_sizes_reach_from_five_pixels_to_a_page_of_1000_tokens(monkeypatch):
  seen = []
  original = typeset.block

  def noted(text, face, language, pixels, *rest):
    seen.append(pixels)
    return original(text, face, language, pixels, *rest)

  monkeypatch.setattr(typeset, "block", noted)
  for seed in range(40):
    sample("en", seed)
  assert min(seen) == 5 and max(seen) >= 30
  monkeypatch.setattr(pure, "FORMS", {"page": 1.0})
  page = sample("en", 1, (1280, 1280))
  tokens = words.tokens_of(page.text, LANGUAGES["en"])
  assert 800 < tokens <= 1000


def test_the_user_s_texts_are_drawn_whole():
  texts = ("First line\nsecond one", 'He said "no", twice')
  seen = set()
  for seed in range(12):
    made = sample("en", seed, texts=texts)
    for block in made.layout["blocks"]:
      assert block["text"] in texts and block["text"] in made.caption
      seen.add(block["text"])
  assert seen == set(texts)
  assert sample("en", 0, texts=("a 中",)) == Rejected(coverage.NO_GLYPH)
  long = " ".join(["incomprehensibilities"] * 2000)
  assert sample("en", 0, texts=(long,)) == Rejected(pure.NO_ROOM)


def test_half_of_the_captions_of_chinese_are_chinese():
  # A layout is enough: no font for Chinese is needed.
  face = Face(str(bundled_folder() / "DejaVuSans.ttf"))
  block = TextBlock("title", (("大海", polygon_of((10, 10, 90, 30))),))
  shares = {}
  for code in ("zh", "zh-vertical", "ja"):
    layout = layout_of("pure", LANGUAGES[code], (100, 200), [face], [block], "")
    made = [
      captions.of(
        layout, "A sign", "一块牌子", LANGUAGES[code], np.random.default_rng(i)
      )
      for i in range(200)
    ]
    assert all("大海" in caption for caption in made)
    shares[code] = np.mean(["一块牌子" in caption for caption in made])
  assert 0.4 < shares["zh"] < 0.6 and 0.4 < shares["zh-vertical"] < 0.6
  assert shares["ja"] == 0


def test_captions_name_places_and_choose_quotes():
  face = Face(str(bundled_folder() / "DejaVuSans.ttf"))
  spots = {
    (0, 0, 20, 10): "at the top on the left", (40, 45, 60, 55): "in the middle",
    (80, 90, 100, 99): "at the bottom on the right",
    (0, 45, 9, 55): "on the left",
  }  # fmt: skip
  for box, place in spots.items():
    block = TextBlock("body", (("words", polygon_of(box)),))
    layout = layout_of("pure", LANGUAGES["en"], (100, 100), [face], [block], "")
    assert captions.place_of(layout, 0)[0] == place
  texts = ('say "hi"', "one", "two", "x")
  roles = ("title", "cell", "cell", "body")
  blocks = [
    TextBlock(role, ((text, polygon_of((0, 9, 9, 19))),))
    for role, text in zip(roles, texts)
  ]
  layout = layout_of("pure", LANGUAGES["en"], (100, 100), [face], blocks, "")
  caption = captions.of(
    layout, "A page", "", LANGUAGES["en"], np.random.default_rng(9)
  )
  assert '“say "hi"”' in caption and "“one”, “two”" in caption
  assert "The cells read" in caption
  vertical = LANGUAGES["zh-vertical"]
  layout = layout_of("pure", vertical, (100, 100), [face], blocks[1:2], "")
  made = {
    captions.of(layout, "A sign", "牌子", vertical, np.random.default_rng(i))
    for i in range(20)
  }
  assert made == {
    "A sign, with text in Chinese, in vertical columns from right to left, "
    'that reads "one".',
    "A sign, with text in Chinese at the top on the left, in vertical columns "
    'from right to left, that reads "one".',
    "牌子，文字从右到左竖排，上面写着“one”。",
    "牌子，文字从右到左竖排，左侧上方写着“one”。",
  }


def test_backgrounds_and_contrast(tmp_path):
  assert backgrounds.least_contrast(
    (0, 0, 0), Image.new("RGB", (3, 3), "white")
  ) == pytest.approx(21)
  grey = Image.new("RGB", (4, 4), (119, 119, 119))
  # 4.48: a standard example of WCAG just below 4.5.
  assert backgrounds.least_contrast((255, 255, 255), grey) == pytest.approx(
    4.48, abs=0.01
  )
  half = Image.new("RGB", (4, 4), "white")
  half.paste((0, 0, 0), (0, 0, 2, 4))
  assert backgrounds.ink_for(half, np.random.default_rng(0)) is None
  names = set()
  for seed in range(60):
    made = backgrounds.draw((96, 64), np.random.default_rng(seed))
    assert made.image.size == (96, 64) and made.image.mode == "RGB"
    names.add(made.english.split()[-1])
  assert names == {"background", "gradient", "colours", "paper"}


def test_colours_have_names():
  for colour, name, chinese in (
    ((255, 255, 255), "white", "白色"), ((0, 0, 0), "black", "黑色"),
    ((255, 0, 0), "red", "红色"), ((0, 0, 128), "dark blue", "深蓝色"),
    ((173, 216, 230), "light cyan", "浅青色"),
    ((128, 128, 128), "grey", "灰色"),
    ((0, 128, 0), "dark green", "深绿色"), ((255, 255, 0), "yellow", "黄色"),
    ((255, 0, 20), "red", "红色"), ((255, 165, 0), "orange", "橙色"),
  ):  # fmt: skip
    assert colours.name_of(colour) == (name, chinese)


def test_captions_tell_colours(monkeypatch):
  monkeypatch.setattr(backgrounds, "KINDS", ("plain",))
  monkeypatch.setattr(pure, "FORMS", {"line": 1.0})
  for seed in range(6):
    made = sample("en", seed)
    pixels = np.asarray(made.image).reshape(-1, 3)
    paper = colours.name_of(pixels[0])[0]
    (left, top), (right, bottom) = (
      made.layout["lines"][0]["polygon"][i] for i in (0, 2)
    )
    box = made.image.crop((int(left), int(top), int(right), int(bottom)))
    own = np.asarray(box).reshape(-1, 3)
    ink = own[np.abs(own - pixels[0].astype(int)).sum(1).argmax()]
    assert f"An image of {colours.name_of(ink)[0]} text on a plain" in (
      made.caption
    )
    assert f"a plain {paper} background" in made.caption


def test_photos_are_written_on_where_it_can_be_read(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
  photo = Image.fromarray(noise)
  ImageDraw.Draw(photo).rectangle((0, 0, 80, 90), fill="white")
  photo.save(tmp_path / "photo.png")
  (tmp_path / "broken.jpg").write_bytes(b"no photo")
  paths = [str(tmp_path / "photo.png")]
  seen = 0
  for seed in range(12):
    made = sample("en", seed, photos=paths)
    if isinstance(made, Sample) and made.layout["background"] == "a photo":
      seen += 1
      assert "photo" in made.caption
    elif isinstance(made, Rejected):
      assert made.reason == pure.NO_CONTRAST
  assert seen >= 2
  broken = [sample("en", seed, photos=[str(tmp_path / "broken.jpg")])
            for seed in range(6)]  # fmt: skip
  assert Rejected(pure.BAD_PHOTO) in broken
