# SPDX-License-Identifier: Apache-2.0
"""What is found in folders, datasets, stages and tables."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from edit_pairs_inputs import cutout, user_folder
from pictures import encoded, jpeg, picture
from PIL import Image
from stages import run

from data_pipelines.edit_pairs import catalogue
from data_pipelines.edit_pairs.pair import OBJECT, Name
from data_pipelines.edit_pairs.supply import Candidates, Rules, Supply
from data_pipelines.errors import InputError
from data_pipelines.records import DatasetWriter, Record, encode_png
from data_pipelines.sources.items import Limits, Unusable

LIMITS = Limits()


def loaded(path):
  return {
    source.id: catalogue.load(source, LIMITS)
    for source in catalogue.find([str(path)])
  }


def supply(sources, sizes=((160, 128),), **given):
  candidates = Candidates(**{k: tuple(sources) for k in given})
  return Supply(candidates, Rules(sizes, embedded=False),
    np.random.default_rng(0))  # fmt: skip


def test_a_folder_gives_pictures_cutouts_and_masks(tmp_path):
  found = loaded(user_folder(tmp_path / "in"))
  assert sorted(found) == [
    "in/cut0.png", "in/cut1.png", "in/marked0.png", "in/photo0.jpg",
    "in/photo1.jpg", "in/photo2.jpg",
  ]  # fmt: skip
  cut, marked = found["in/cut0.png"], found["in/marked0.png"]
  assert cut.name == Name("blot 0", OBJECT.zh) and cut.mask is None
  assert cut.kept == {"license": "mine"} and cut.encoded.mode == "RGBA"
  assert marked.name == Name("soft moon", OBJECT.zh)
  assert marked.caption == "a soft moon"
  assert Image.open(io.BytesIO(marked.mask)).size == (200, 160)
  assert found["in/photo0.jpg"].name == OBJECT


def test_a_line_of_metadata_names_a_mask(tmp_path):
  (tmp_path / "a.png").write_bytes(encoded(picture(0), "PNG"))
  (tmp_path / "m.png").write_bytes(encoded(Image.new("L", (80, 72)), "PNG"))
  line = {"file_name": "a.png", "mask": "m.png", "name": "猫", "text": "一只猫"}
  text = json.dumps(line) + "\nnonsense\n[1]\n"
  (tmp_path / "metadata.jsonl").write_text(text)
  (found,) = loaded(tmp_path).values()
  assert found.mask and found.name == Name(OBJECT.en, "猫")
  (tmp_path / "m.png").unlink()
  (source,) = catalogue.find([str(tmp_path)])
  with pytest.raises(Unusable, match="unreadable file"):
    catalogue.load(source, LIMITS)


@pytest.mark.parametrize("fields, caption, name", [
  ({}, "a red mug", Name("red mug", OBJECT.zh)),
  ({}, "The mug.", Name("mug", OBJECT.zh)),
  ({}, "a mug on a table in the sun", OBJECT), ({}, "", OBJECT),
  ({"name": "mug", "name_zh": "杯子"}, "x", Name("mug", "杯子")),
  ({}, "杯子。", Name(OBJECT.en, "杯子")), ({"name": 3}, "", OBJECT),
])  # fmt: skip
def test_names_come_from_fields_or_short_captions(fields, caption, name):
  assert catalogue.name_of(fields, caption) == name


def test_tables_have_columns_of_masks(tmp_path):
  images = [encoded(picture(i, (200, 160)), "PNG") for i in range(5)]
  mask = encoded(Image.new("L", (200, 160), 255), "PNG")
  table = pa.table({
    "image": [{"bytes": i, "path": "x"} for i in images],
    "mask": [mask, None, None, None, mask],
    "caption": [f"mug {i}" for i in range(5)],
  })  # fmt: skip
  pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
  found = loaded(tmp_path / "t.parquet")
  assert list(found) == [f"t.parquet:{i}" for i in range(5)]
  assert [x.encoded.data for x in found.values()] == images
  assert [x.mask is not None for x in found.values()] == [1, 0, 0, 0, 1]
  assert found["t.parquet:3"].name.en == "mug 3"


def test_datasets_and_stages_give_their_targets(tmp_path):
  image = encode_png(np.asarray(picture(0)))
  edit = encode_png(np.asarray(picture(1)))
  with DatasetWriter(tmp_path / "set") as writer:
    writer.add(
      Record("a", "t2i", "my red mug", "k", image, (), {"license": "cc0"})
    )
    writer.add(Record("b", "ti2i", "remove it now", "k", edit, (image,), {}))
  found = loaded(tmp_path / "set")
  first, second = found.values()
  assert first.encoded == image and first.kept == {"license": "cc0"}
  assert first.name.en == "my red mug" and second.encoded == edit
  assert second.caption == "" and second.name == OBJECT
  run(tmp_path / "stage", tmp_path / "set")
  assert len(catalogue.find([str(tmp_path / "stage")])) > 0
  (tmp_path / "stage/manifest.json").unlink()
  with pytest.raises(InputError, match="not a complete stage"):
    catalogue.find([str(tmp_path / "stage")])


def test_inputs_of_no_use_are_named(tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "a.txt").write_text("x")
  pq.write_table(pa.table({"x": [1]}), tmp_path / "t.parquet")
  for name, message in (
    ("empty", "holds no image"), ("nowhere", "no folder, dataset or Parquet"),
    ("a.txt", "no folder, dataset"), ("t.parquet", "no column of images"),
  ):  # fmt: skip
    with pytest.raises(InputError, match=message):
      catalogue.find([str(tmp_path / name)])


def test_a_cutout_is_cropped_and_a_mask_becomes_its_alpha(tmp_path):
  folder = user_folder(tmp_path / "in")
  sources = {s.id: s for s in catalogue.find([str(folder)])}
  given = supply([sources["in/cut0.png"], sources["in/marked0.png"]], things=1)
  cut, marked = given.thing(), given.thing()
  alpha = np.asarray(cutout(0))[..., 3]
  rows, columns = np.nonzero(alpha)
  assert cut.image.size == (np.ptp(columns) + 1, np.ptp(rows) + 1)
  assert marked.image.size == (71, 81) and marked.name.en == "soft moon"
  inside = np.asarray(marked.image)[40, 35]
  source = picture(20, (200, 160)).getpixel((60 + 35, 40 + 40))
  assert tuple(inside) == (*source, 255)
  assert given.thing() is None and given.problems == []


def test_what_cannot_be_used_is_noted_and_the_next_is_taken(tmp_path):
  (tmp_path / "a_broken.jpg").write_bytes(jpeg(0, (200, 160))[:-900])
  (tmp_path / "b_small.png").write_bytes(encoded(picture(1), "PNG"))
  (tmp_path / "c_opaque.png").write_bytes(
    encoded(picture(2, (200, 160)).convert("RGBA"), "PNG")
  )
  (tmp_path / "d_fine.png").write_bytes(encoded(picture(3, (320, 256)), "PNG"))
  (tmp_path / "e_mask.png").write_bytes(b"")
  sources = catalogue.find([str(tmp_path)])
  assert len(sources) == 4
  given = supply(sources, things=1, places=1)
  place = given.place()
  assert place.id.endswith("d_fine.png") and place.image.size == (160, 128)
  reasons = {id.split("/")[-1][0]: why for id, why, _ in given.problems}
  assert "damaged image" in reasons["a"] and "too small" in reasons["b"]
  assert reasons["c"] == "no background (it is transparent)"
  assert given.thing() is None
  reasons = {id.split("/")[-1][0]: why for id, why, _ in given.problems[3:]}
  assert reasons["d"].startswith("no cut-out (neither")
  assert reasons["c"].startswith("no cut-out (all or nothing")


def test_a_mask_must_have_the_size_of_its_image(tmp_path):
  (tmp_path / "a.png").write_bytes(encoded(picture(0, (200, 160)), "PNG"))
  mask = Image.new("L", (100, 80), 255)
  (tmp_path / "a_mask.png").write_bytes(encoded(mask, "PNG"))
  given = supply(catalogue.find([str(tmp_path)]), marked=1)
  with pytest.raises(Unusable, match="no usable picture with a mask"):
    given.marked()
  assert "another size" in given.problems[0][1]


def test_the_first_picture_decides_the_size_of_a_pair(tmp_path):
  for i, size in enumerate(((400, 300), (300, 420))):
    (tmp_path / f"{i}.png").write_bytes(encoded(picture(i, size), "PNG"))
  sources = catalogue.find([str(tmp_path)])
  sizes = ((160, 128), (128, 160))
  for order, size in ((1, (160, 128)), (-1, (128, 160))):
    given = supply(sources[::order], sizes, pictures=1, places=1)
    assert given.picture().image.size == size
    assert given.place().image.size == size and given.size == size


def test_a_picture_of_another_shape_is_no_problem(tmp_path):
  for name, size in (("a", (160, 128)), ("b", (128, 160)), ("c", (90, 90))):
    data = encoded(picture(0, size), "PNG")
    (tmp_path / f"{name}.png").write_bytes(data)
  sources = catalogue.find([str(tmp_path)])
  given = supply(sources, ((160, 128), (128, 160)), places=1)
  assert given.place().id.endswith("a.png")
  with pytest.raises(Unusable, match="no usable background"):
    given.place()
  assert given.problems == []
  first = supply(sources[2:], places=1)
  with pytest.raises(Unusable):
    first.place()
  assert "too small (90 x 90" in first.problems[0][1]
