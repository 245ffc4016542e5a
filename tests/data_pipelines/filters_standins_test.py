# SPDX-License-Identifier: Apache-2.0
"""Embedded stand-ins for the scores of models."""

import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter
from skimage import data as photos

from data_pipelines import codec, images
from data_pipelines.errors import InputError
from data_pipelines.filters import decide, metrics, standins
from experiments import data


def record(caption=""):
  return codec.Record("x", "t2i", caption, "user", None, (), {})


def photo(name="coffee"):
  return Image.fromarray(getattr(photos, name)())


@pytest.mark.parametrize("name", [n for n in standins.NAMES if n != "nudenet"])
def test_columns_fit_arrow_and_the_name_says_stand_in(name):
  for image in (photo(), Image.new("RGBA", (1, 1)), Image.new("RGB", (9, 400))):
    row = standins.score(name, record("red"), image)
    schema = pa.schema(list(standins.COLUMNS[name].items()))
    assert pa.Table.from_pylist([row], schema).to_pylist() == [row]
  assert standins.describe(name).startswith("stand-in for")
  assert row == standins.score(name, record("red"), image)


@pytest.mark.parametrize(
  "colour, share",
  [
    ((224, 172, 140), 1),  # light skin
    ((120, 80, 60), 1),  # dark skin
    ((128, 128, 128), 0),
    ((40, 90, 200), 0),
    ((30, 160, 40), 0),
    ((255, 255, 255), 0),
  ],
)
def test_skin(colour, share):
  assert standins.skin_share(Image.new("RGB", (20, 20), colour)) == share


def test_references_are_judged_too():
  def png(colour):
    return images.encode_png(np.full((9, 9, 3), colour, np.uint8))

  skin, sky = (224, 172, 140), (40, 90, 200)
  broken = images.EncodedImage(b"?", 9, 9, "RGB")
  target = images.decode_image(png(sky))
  for references, value in (
    ((), 0), ((png(sky), png(skin)), 1), ((broken, png(sky)), 0),
  ):  # fmt: skip
    item = codec.Record("x", "ti2i", "", "user", png(sky), references, {})
    assert standins.score("nsfw", item, target) == {"nsfw": value}


def test_colourfulness_is_that_of_the_paper():
  assert standins.colourfulness(photo("camera").convert("RGB")) == 0
  # Half pure red, half pure green: rg is +-255, yb is 127.5 throughout.
  half = Image.new("RGB", (2, 1), (255, 0, 0))
  half.putpixel((1, 0), (0, 255, 0))
  assert standins.colourfulness(half) == pytest.approx(255 + 0.3 * 127.5)


def test_scores_fall_when_images_get_worse():
  good = photo()
  grey = good.convert("L").convert("RGB")
  blurred = good.filter(ImageFilter.GaussianBlur(4))
  assert standins.pleasantness(good) > standins.pleasantness(grey)
  assert standins.pleasantness(good) > standins.pleasantness(blurred)
  assert standins.fidelity(good) > standins.fidelity(blurred)
  blocks = good.resize((75, 50)).resize((600, 400), Image.Resampling.NEAREST)
  assert standins.fidelity(good) > standins.fidelity(blocks)
  for image in (good, grey, blurred, Image.new("RGB", (50, 50))):
    assert 1 <= standins.pleasantness(image) <= 10
    assert 0 <= standins.fidelity(image) <= 1


@pytest.mark.parametrize(
  "caption, value",
  [
    ("a red square and a blue one", 0.30),
    ("a RED square", 0.30),
    ("红色的方块", 0.30),
    ("a green square", 0.10),
    ("a red square and a green one", 0.20),
    ("a square", 0.25),
    ("a bored person, credited", 0.25),  # contains 'red'
  ],
)
def test_colours_named_and_shown(caption, value):
  image = Image.new("RGB", (80, 80), "white")
  image.paste((220, 20, 20), (5, 5, 30, 30))
  image.paste((20, 20, 220), (40, 40, 70, 70))
  found = standins.colour_agreement(caption, image)
  assert found == pytest.approx(value)


@pytest.mark.parametrize("name", sorted(standins._COLOURS))
def test_pure_hues_are_told_apart(name):
  low, high = standins._COLOURS[name][1]
  hue = int(((low + high) / 2 % 360) * 256 / 360)
  image = Image.new("HSV", (8, 8), (hue, 255, 220)).convert("RGB")
  found = {
    other: standins.colour_agreement(other, image)
    for other in standins._COLOURS
  }
  assert found.pop(name) == pytest.approx(0.3)
  assert set(found.values()) == {0.1}


def test_embeddings_are_near_for_copies_only():
  def cosine(first, second):
    return np.dot(*map(standins.layout_embedding, (first, second)))

  assert cosine(photo(), photo().resize((300, 200))) > 0.999
  assert cosine(photo(), photo("astronaut")) < 0.7
  red, blue = (Image.new("RGB", (9, 9), c) for c in ("red", "blue"))
  assert cosine(red, red) == pytest.approx(1) and cosine(red, blue) < 0.5


def test_nudenet_sees_nothing_in_a_cup():
  pytest.importorskip("nudenet")
  row = standins.score("nudenet", record(), photo())
  assert row == {"nsfw": 0.0}
  assert not standins.describe("nudenet").startswith("stand-in")


def test_only_what_counts_as_exposed_is_taken(monkeypatch):
  seen = []

  class Detector:
    def detect(self, pixels):
      seen.append(pixels)
      return [
        {"class": "FEET_EXPOSED", "score": 0.99},
        {"class": "BUTTOCKS_COVERED", "score": 0.98},
        {"class": "BUTTOCKS_EXPOSED", "score": 0.4},
        {"class": "FEMALE_BREAST_EXPOSED", "score": 0.7},
      ]

  monkeypatch.setattr(standins, "_nudenet", Detector)
  image = Image.new("RGB", (2000, 1000), (255, 0, 0))
  assert standins.nudity(image) == 0.7
  assert seen[0].shape == (320, 640, 3)
  assert seen[0][0, 0].tolist() == [0, 0, 255]  # blue first
  assert image.size == (2000, 1000)


def test_nudenet_is_optional(monkeypatch):
  monkeypatch.setitem(sys.modules, "nudenet", None)
  standins._nudenet.cache_clear()
  with pytest.raises(InputError, match="install it or choose"):
    standins.score("nudenet", record(), photo())
  standins._nudenet.cache_clear()


@pytest.mark.parametrize("stage", ["stage1", "stage4"])
def test_ordinary_photographs_pass_the_thresholds(stage):
  pytest.importorskip("nudenet")
  config = data.get_config(stage)
  config.filters.resolution.min_pixels = 0  # they are small
  names = ("astronaut", "coffee", "chelsea", "rocket")
  used = [n for options in config.score.values() for n in options.stand_ins]
  columns = {"id": pa.string(), **metrics.METRICS}
  for stand_in in used:
    columns |= standins.COLUMNS[stand_in]
  rows = []
  for name in names:
    image = images.encode_png(np.asarray(photo(name).convert("RGB")))
    item = codec.Record(name, "t2i", f"a view of {name}", "user", image, (), {})
    pixels = images.decode_image(image)
    row = {"id": name, **metrics.measure(item, pixels, ())}
    for stand_in in used:
      row |= standins.score(stand_in, item, pixels)
    rows.append(row)
  filters = config.filters.to_dict()
  table = pa.Table.from_pylist(rows, pa.schema(list(columns.items())))
  verdicts = decide.decide(table, filters, config.filter_order, config.seed)
  assert verdicts["detail"].to_pylist() == [""] * len(names)
