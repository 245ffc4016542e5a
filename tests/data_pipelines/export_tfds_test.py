# SPDX-License-Identifier: Apache-2.0
"""TensorFlow Datasets reads what we export, without TensorFlow."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import encoded, folder, jpeg, picture
from PIL import Image
from stages import run

from data_pipelines import codec, export_tfds, records
from data_pipelines.errors import InputError
from data_pipelines.images import decode_image, from_bytes
from data_pipelines.sources.items import Limits
from data_pipelines.sources.plan import READERS, plan


def awkward():
  """Images of every kind that a record may hold."""
  turned = Image.Exif()
  turned[0x0112] = 6
  palette = picture(4).convert("P")
  return [
    jpeg(0), encoded(picture(1, mode="RGBA"), "PNG"),
    encoded(picture(2), "WEBP", lossless=True),
    encoded(picture(3, (90, 40)), "JPEG", exif=turned, quality=95),
    encoded(palette, "PNG"), encoded(picture(5).convert("L"), "PNG"),
    encoded(picture(6, mode="RGBA"), "WEBP", lossless=True),
  ]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  path = tmp_path_factory.mktemp("tfds") / "data"
  images = [from_bytes(data) for data in awkward()]
  with records.DatasetWriter(path, shards=2) as writer:
    for i, image in enumerate(images):
      references = tuple(images[: i % 3])
      writer.add(
        codec.Record(
          id=f"a/{i}", task="ti2i" if references else "t2i",
          caption=f"a picture “{i}” 图", kind="user", target=image,
          references=references, provenance={"size": [i, 2], "mask": b"\0\1"},
        )
      )  # fmt: skip
  return path


def test_every_record_comes_back(dataset, tmp_path):
  out = tmp_path / "mine"
  assert export_tfds.export(dataset, out, shard_records=3) == 7
  assert [p.name for p in tmp_path.iterdir()] == ["mine"]
  assert len(list(out.glob("*array_record*"))) == 3
  builder = tfds.builder_from_directory(out)
  assert builder.info.full_name == "mine/1.0.0"
  source = builder.as_data_source("train")
  data = records.open_dataset(dataset)
  assert len(source) == len(data) == 7
  for i in range(7):
    record, found = data[i], source[i]
    for name in ("id", "task", "kind", "caption"):
      assert found[name].decode() == getattr(record, name)
    np.testing.assert_array_equal(found["image"], decode_image(record.target))
    assert len(found["references"]) == len(record.references)
    for image, reference in zip(found["references"], record.references):
      np.testing.assert_array_equal(image, decode_image(reference))
    about = json.loads(found["provenance"])
    assert about == {"size": record.provenance["size"], "mask": "AAE="}
  assert "tensorflow" not in sys.modules


def test_plain_images_keep_their_bytes_and_the_pipeline_reads_them(
  dataset, tmp_path
):
  export_tfds.export(dataset, tmp_path / "mine")
  (part,) = plan([str(tmp_path / "mine")], 100)
  items = {
    item.caption: item
    for item in (entry.load() for entry in READERS["tfds"](part, Limits()))
  }
  data = records.open_dataset(dataset)
  for record in (data[i] for i in range(7)):
    item = items[record.caption]
    same = item.target == record.target.data
    assert same == (record.id not in ("a/3", "a/4", "a/5"))
    assert len(item.references) == len(record.references)


def test_the_command_takes_a_stage(tmp_path):
  run(tmp_path / "stage", folder(tmp_path / "in", 5))
  done = subprocess.run(
    [sys.executable, "-m", "data_pipelines.export_tfds",
     f"--input={tmp_path / 'stage'}", f"--out={tmp_path / 'out-1'}"],
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  builder = tfds.builder_from_directory(tmp_path / "out-1")
  assert builder.info.splits["train"].num_examples == 5
  assert builder.info.features["image"].shape == (None, None, 3)


def test_bad_input_leaves_nothing(dataset, tmp_path, monkeypatch):
  (tmp_path / "there").mkdir()
  for path, out, why in (
    (dataset, "there", "already exists"), (dataset, "1st", "letters"),
    (tmp_path / "none", "new", "does not exist"),
  ):  # fmt: skip
    with pytest.raises(InputError, match=why):
      export_tfds.export(pathlib.Path(path), tmp_path / out)

  def full(record):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(export_tfds, "example", full)
  with pytest.raises(InputError, match="No space left"):
    export_tfds.export(dataset, tmp_path / "new")
  assert [p.name for p in tmp_path.iterdir()] == ["there"]
