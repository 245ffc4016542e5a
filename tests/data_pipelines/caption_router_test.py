# SPDX-License-Identifier: Apache-2.0
"""Which kinds suit which images, and what the prompts say."""

import io
import itertools
import os

import numpy as np
import pytest
import skimage.data
from pictures import encoded, picture
from PIL import Image, ImageDraw, ImageFont

from data_pipelines import codec
from data_pipelines.caption import prompts, router
from data_pipelines.caption.kinds import CATEGORIES, KINDS, LENGTHS, Wish
from data_pipelines.caption.prepare import prepare
from data_pipelines.engine import decoding
from data_pipelines.sources.items import Limits, Unusable

TEXT = [
  "Quarterly report of the northern office", "Revenue rose by 12 % over spring",
  "Costs stayed flat, rents excepted", "Three new hires in engineering",
  "Outlook: steady, with some rain",
]  # fmt: skip


def page(background, size=(512, 384), points=22, lines=TEXT * 2):
  """Lines of text on a picture or a colour."""
  if isinstance(background, str):
    image = Image.new("RGB", size, background)
  else:
    image = background.resize(size)
  draw = ImageDraw.Draw(image)
  font = ImageFont.load_default(points)
  for i, line in enumerate(lines):
    at = (20, 14 + int(1.55 * points * i))
    draw.text(at, line, "black", font, stroke_width=1, stroke_fill="white")
  return image


def photograph(name):
  """A picture that scikit-image carries in its package."""
  folder = os.path.dirname(skimage.data.__file__)
  return Image.open(os.path.join(folder, name)).convert("RGB")


PHOTOGRAPHS = (
  "astronaut.png", "chelsea.png", "coffee.png", "camera.png", "grass.png",
  "gravel.png", "brick.png", "rocket.jpg", "motorcycle_left.png",
)  # fmt: skip


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_have_no_lines_of_text(name):
  columns = router.measure(photograph(name))
  assert columns["text_share"] < 0.03
  assert router.by_columns(columns) == "photo"


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_text_on_a_photograph_is_found(name):
  image = page(photograph(name), points=24, lines=TEXT)
  columns = router.measure(image)
  assert columns["text_share"] > 0.05
  assert router.by_columns(columns) == "poster"


def test_a_scanned_page_is_found():
  assert router.measure(photograph("page.png"))["text_share"] > 0.3


@pytest.mark.parametrize("points", [12, 16, 22, 34, 48])
def test_pages_of_every_size_of_letters_are_found(points):
  lines = [line[: 480 * 2 // points] for line in TEXT]
  columns = router.measure(page("white", points=points, lines=lines))
  assert columns["text_share"] > 0.04
  assert router.by_columns(columns) in ("document", "diagram")
  turned = page("white", points=points, lines=lines).rotate(90, expand=True)
  assert router.text_share(turned.convert("L")) > 0.04
  large = page("white", points=points, lines=lines).resize((1536, 1152))
  assert router.text_share(large.convert("L")) > 0.03


def test_frames_bars_and_flat_pictures_are_no_text():
  image = Image.new("RGB", (400, 300), "white")
  draw = ImageDraw.Draw(image)
  for i in range(6):
    draw.rectangle((20, 20 + 45 * i, 90 + 50 * i, 44 + 45 * i), "navy")
  draw.rectangle((5, 5, 394, 294), outline="black", width=2)
  for i in range(10):  # rules as thick as small letters are high
    draw.rectangle((250 + i, 12 + 11 * i, 385, 16 + 11 * i), "black")
  columns = router.measure(image)
  assert columns["text_share"] < 0.02
  assert router.by_columns(columns) == "illustration"
  for size in ((1, 1), (2, 200), (200, 2)):
    assert router.measure(picture(0, size))["text_share"] == 0.0


def test_the_category_decides_and_labels_tell_it():
  assert router.category_of("slide_en") == "slide"
  assert router.category_of("Screenshot") == "interface"
  assert router.category_of("user") == router.category_of("edit") == ""
  flat = {"text_share": 0.5, "flat_share": 0.9, "entropy": 1.0}
  kinds = ("general", "text", "knowledge", "structured", "edit")
  assert router.route(flat, kinds).category == "document"
  assert router.route(flat | {"category": "photo"}, kinds).kinds == ("general",)
  chart = {"category": "chart"}
  assert router.route(chart, kinds).kinds == ("text", "structured")
  assert router.route(chart, kinds, known=True).kinds[-1] == "knowledge"
  assert router.route(chart, ("text",), known=True).kinds == ("text",)
  assert router.route(chart, ("general",)).kinds == ("general",)
  assert router.route(chart, ("knowledge",)).kinds == ()
  assert router.route(chart, kinds, references=2, known=True).kinds == ("edit",)
  assert router.route(chart, ("general",), references=1).kinds == ()
  for category in CATEGORIES:
    assert router.route({"category": category}, kinds).kinds


@pytest.mark.parametrize(
  "answer, category",
  [
    ('{"category": "slide"}', "slide"),
    ('```json\n{"category": "Comic"}\n```', "comic"),
    ("diagram", "diagram"),
    ("It is a poster.", "poster"),
    ('{"category": ["x"]}', ""),
    ('{"kind": "slide"', "slide"),
    ("no idea", ""),
    ("", ""),
  ],
)
def test_categories_of_a_model_are_read(answer, category):
  assert router.read_category(answer) == category


def test_every_wish_has_a_prompt_of_its_own():
  wishes = [
    Wish(kind, language, length, category)
    for kind, language, length, category in itertools.product(
      ("general", "knowledge", "edit"), ("en", "zh"), LENGTHS, ("photo",)
    )
  ]
  wishes += [Wish("text", "en", "short", c) for c in CATEGORIES]
  wishes += [Wish("structured", language, "") for language in ("en", "th")]
  texts = [prompts.build(wish, "", 2) for wish in wishes]
  assert len(set(texts)) == len(wishes)
  ids = [prompts.prompt_id(wish, 1) for wish in wishes]
  assert len(set(ids)) == len(wishes)
  assert {id.partition("-")[0] for id in ids} == set(KINDS)
  assert "Thai" in texts[-1] and "40 to 90 words" in texts[1]
  known = prompts.build(Wish("knowledge", "en", "short"), "- title: Dawn")
  assert known.endswith("- title: Dawn")
  three = prompts.build(Wish("edit", "en", "short"), "", 4)
  assert "first 3 images (image 1, image 2, image 3)" in three
  assert prompts.prompt_id(Wish("edit", "en", "short"), 3) != ids[12]


def record(target, *references, **fields):
  given = {"id": "a", "caption": "a cat on a mat", "kind": "user"} | fields
  images = [decoding.probe(data, Limits()) for data in (target, *references)]
  return codec.Record(
    task="ti2i" if references else "t2i", target=images[0],
    references=tuple(images[1:]), provenance=given.pop("provenance", {}),
    **given,
  )  # fmt: skip


def prepared(*images, max_side=64, **fields):
  data = codec.encode(record(*images, **fields))
  return prepare(data, max_side, Limits())


def test_a_captioner_sees_references_then_the_target_in_its_size():
  one, two, three = (picture(i, (100, 50)) for i in range(3))
  data = [encoded(image, "PNG") for image in (one, two, three)]
  found = prepared(*data)
  for given, image in zip(found.images, (two, three, one), strict=True):
    shown = Image.open(io.BytesIO(given))
    assert shown.format == "JPEG" and shown.size == (64, 32)
    expected = np.asarray(image.resize((64, 32), Image.Resampling.LANCZOS))
    assert np.abs(np.asarray(shown).astype(int) - expected).mean() < 6
  assert prepared(data[0], max_side=500).images != found.images[-1:]


def test_transparent_images_are_shown_on_white():
  image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
  found = prepared(encoded(image, "PNG"))
  shown = np.asarray(Image.open(io.BytesIO(found.images[0])))
  assert shown.min() > 250


def test_what_is_known_is_told_and_what_is_no_knowledge_is_not():
  target = encoded(picture(0), "PNG")
  assert prepared(target).context == ""
  assert prepared(target, provenance={"url": "http://x"}).context == ""
  named = prepared(
    target, caption="the bridge of Mostar at dawn",
    provenance={"url": "http://x", "author": "me", "sha256": "0"},
  )  # fmt: skip
  assert named.context == (
    "- text found beside it: the bridge of Mostar at dawn\n- author: me\n"
    "- url: http://x"
  )
  assert prepared(target, caption="built in 1566").context
  assert prepared(target, caption="莫斯塔尔古桥在清晨的阳光下").context
  assert prepared(target, provenance={"author": "me"}).context == "- author: me"
  written = prepared(target, provenance={"text": "OPEN\n\n9 to 5"})
  assert written.known_text == ("OPEN", "9 to 5")
  assert prepared(target, kind="slide_en").columns["category"] == "slide"
  assert prepared(target).columns["category"] == ""


def test_a_damaged_image_is_a_reason():
  data = encoded(picture(0, (300, 300)), "PNG")[:-4000]
  with pytest.raises(Unusable, match="damaged image"):
    prepared(data)
