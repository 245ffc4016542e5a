# SPDX-License-Identifier: Apache-2.0
"""What TensorFlow Datasets has prepared is read without TensorFlow."""

import json
import shutil
import sys

import pytest
import tensorflow_datasets as tfds
from pictures import jpeg
from stages import all_records, run

from data_pipelines.errors import InputError
from data_pipelines.sources.items import Limits
from data_pipelines.sources.plan import READERS, plan


class Pictures(tfds.core.GeneratorBasedBuilder):
  """Five captioned pictures and two edits."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    image = tfds.features.Image(encoding_format="jpeg")
    features = tfds.features.FeaturesDict({
      "image": image, "caption": tfds.features.Text(),
      "references": tfds.features.Sequence(image),
      "label": tfds.features.ClassLabel(num_classes=9),
    })  # fmt: skip
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._examples(5, 0), "test": self._examples(2, 2)}

  def _examples(self, count, references):
    for i in range(count):
      yield str(i), {
        "image": self.folder / f"{i}.jpg", "caption": f"picture {i}",
        "references": [self.folder / "9.jpg"] * references, "label": i,
      }  # fmt: skip

  def _generate_examples(self):
    raise NotImplementedError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  path = tmp_path_factory.mktemp("tfds")
  for i in (*range(5), 9):
    (path / f"{i}.jpg").write_bytes(jpeg(i))
  Pictures.folder = path
  builder = Pictures(data_dir=str(path), file_format="array_record")
  builder.download_and_prepare()
  return path / "pictures" / "1.0.0"


def test_every_example_is_an_entry_with_its_bytes(prepared):
  parts = plan([str(prepared)], 2)
  assert [(p.prefix, p.start, p.stop) for p in parts] == [
    ("pictures-1.0.0/train", 0, 2), ("pictures-1.0.0/train", 2, 4),
    ("pictures-1.0.0/train", 4, 5), ("pictures-1.0.0/test", 0, 2),
  ]  # fmt: skip
  entries = [e for p in parts for e in READERS["tfds"](p, Limits())]
  items = [entry.load() for entry in entries]
  assert sorted(item.caption for item in items[:5]) == [
    f"picture {i}" for i in range(5)
  ]
  for item in items:
    number = int(item.caption.split()[1])
    assert item.target == jpeg(number)
  assert [item.references for item in items[5:]] == [(jpeg(9),) * 2] * 2
  assert entries[5].id == "pictures-1.0.0/test:0"
  assert entries[5].where == "pictures/1.0.0 test:0"
  assert "tensorflow" not in sys.modules


def test_a_stage_takes_it(prepared, tmp_path):
  manifest = run(tmp_path / "out", prepared)
  assert manifest["in"] == 7 and manifest["by_task"]["ti2i"] == 2
  assert len(all_records(tmp_path / "out")) == manifest["kept"] >= 5


def test_other_formats_and_features_are_refused(prepared, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(prepared, copy)
  info = json.loads((copy / "dataset_info.json").read_text())
  (copy / "dataset_info.json").write_text(
    json.dumps({**info, "fileFormat": "tfrecord"})
  )
  with pytest.raises(InputError, match="is stored as tfrecord"):
    plan([str(copy)], 2)
  (copy / "dataset_info.json").write_text("{")
  with pytest.raises(InputError, match="is unreadable"):
    plan([str(copy)], 2)
  (copy / "dataset_info.json").write_text(json.dumps(info))
  features = json.loads((copy / "features.json").read_text())
  named = features["featuresDict"]["features"]
  named["photo"] = named.pop("image")
  (copy / "features.json").write_text(json.dumps(features))
  with pytest.raises(InputError, match="has no image feature"):
    plan([str(copy)], 2)
