# SPDX-License-Identifier: Apache-2.0
"""Records and dataset folders: what goes in comes out, or nothing does."""

import dataclasses
import io
import json
import pathlib

import msgpack
import numpy as np
import pytest
from PIL import Image

from data_pipelines import images, records
from data_pipelines.errors import InputError


def _image(height=5, width=7, channels=3, seed=0):
  pixels = np.random.default_rng(seed).integers(
    0, 256, (height, width, channels), np.uint8
  )
  return records.encode_png(pixels)


def _record(name="a", references=0, **changes):
  record = records.Record(
    id=name,
    task="ti2i" if references else "t2i",
    caption="写着“你好”的 café 🎈",
    kind="text",
    target=_image(),
    references=tuple(_image(4, 3 + i, 4, i) for i in range(references)),
    provenance={"source": "é", "parents": [1, {"x": None}]},
  )
  return dataclasses.replace(record, **changes)


def _write(path, count, shards=1):
  with records.DatasetWriter(path, shards, {"name": "test"}) as writer:
    for i in range(count):
      writer.add(_record(f"r{i}", i % 3))


def _encoded(image, fmt="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, format=fmt, **options)
  return images.from_bytes(buffer.getvalue())


@pytest.mark.parametrize("references", [0, 1, 3])
def test_codec_round_trip(references):
  record = _record("字", references)
  assert records.decode(records.encode(record)) == record


@pytest.mark.parametrize("channels", [3, 4])
def test_png_is_lossless(channels):
  pixels = np.random.default_rng(1).integers(0, 256, (9, 4, channels), np.uint8)
  encoded = records.encode_png(pixels)
  assert (encoded.width, encoded.height) == (4, 9)
  np.testing.assert_array_equal(records.decode_image(encoded), pixels)


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"\xff" * 20,
    msgpack.packb([1]),
    msgpack.packb({"schema_version": 2}),
    msgpack.packb({"schema_version": 1, "id": "a"}),
  ],
)
def test_foreign_bytes_are_refused(data):
  with pytest.raises(InputError, match="rebuild"):
    records.decode(data)


def test_task_must_agree_with_references():
  with pytest.raises(InputError, match="references"):
    records.encode(_record(task="ti2i"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
  # Red top-left corner, in the picture as it should be seen.
  seen = Image.new("RGB", (40, 24))
  seen.paste((255, 0, 0), (0, 0, 8, 8))
  undo = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
  }
  stored = seen
  for step in undo[orientation]:
    stored = stored.transpose(step)
  exif = Image.Exif()
  exif[0x0112] = orientation
  encoded = _encoded(stored, "JPEG", quality=95, exif=exif)
  assert (encoded.width, encoded.height) == (40, 24)
  decoded = records.decode_image(encoded)
  assert decoded.size == (40, 24)
  assert decoded.getpixel((2, 2))[0] > 200
  assert decoded.getpixel((37, 21))[0] < 50


def test_transparency_survives_every_encoding():
  rgba = Image.new("RGBA", (6, 6), (10, 20, 30, 0))
  rgba.paste((200, 100, 50, 255), (3, 0, 6, 6))
  palette = rgba.convert("P")
  palette.info["transparency"] = palette.getpixel((0, 0))
  for image in (rgba, rgba.convert("LA"), palette):
    encoded = _encoded(image)
    assert encoded.mode == "RGBA", image.mode
    alpha = np.asarray(records.decode_image(encoded))[..., 3]
    assert (alpha[:, :3] == 0).all() and (alpha[:, 3:] == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
  grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
  decoded = records.decode_image(_encoded(Image.fromarray(grey)))
  np.testing.assert_array_equal(
    np.asarray(decoded)[..., 0], np.arange(256).reshape(16, 16)
  )


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_noticed(fmt):
  pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, format=fmt)
  data = buffer.getvalue()
  for share in (0, 0.01, 0.3, 0.6, 0.9):
    with pytest.raises(InputError, match=r"Empty|Unreadable"):
      images.from_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("shards", [1, 3, 12])
def test_dataset_round_trip(tmp_path, shards):
  path = tmp_path / "deep" / "data"
  with records.DatasetWriter(path, shards, {"name": "test"}) as writer:
    for i in range(10):
      writer.add(_record(f"r{i}", i % 3))
    writer.quarantine("bad", "破", "here")
  dataset = records.open_dataset(path)
  assert sorted(dataset[i].id for i in range(len(dataset))) == [
    f"r{i}" for i in range(10)
  ]
  manifest = dataset.manifest
  assert manifest["records"] == 10 and manifest["quarantined"] == 1
  assert manifest["by_task"] == {"t2i": 4, "ti2i": 6}
  assert manifest["by_kind"] == {"text": 10}
  assert manifest["source"] == {"name": "test"}
  assert len(manifest["shards"]) == shards
  rows = (path / "quarantine.jsonl").read_text("utf-8").splitlines()
  assert [json.loads(r) for r in rows] == [
    {"id": "bad", "reason": "破", "where": "here"}
  ]
  for i in range(10):  # the sidecars describe the same records, in order
    record, index = dataset[i], dataset.index
    assert index.task[i] == record.task
    assert (index.width[i], index.height[i]) == (7, 5)
    assert index.reference_sizes(i) == tuple(
      (r.width, r.height) for r in record.references
    )
  assert [p.name for p in path.parent.iterdir()] == ["data"]


def test_bytes_depend_on_content_only(tmp_path):
  _write(tmp_path / "a", 9, 2)
  _write(tmp_path / "b", 9, 2)
  first, second = (records.read_manifest(tmp_path / n) for n in "ab")
  assert first == second


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_interrupted_writer_leaves_nothing(tmp_path, error):
  with pytest.raises(error):
    with records.DatasetWriter(tmp_path / "data", 2, {}) as writer:
      writer.add(_record())
      raise error
  assert list(tmp_path.iterdir()) == []


def test_empty_dataset_is_refused(tmp_path):
  with pytest.raises(InputError, match="No record"):
    _write(tmp_path / "data", 0)
  assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_and_untouched(tmp_path):
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "mine.txt").write_text("x")
  with pytest.raises(InputError, match="exists"):
    records.DatasetWriter(tmp_path / "data", 1, {})
  assert (tmp_path / "data" / "mine.txt").read_text() == "x"


def test_unwritable_output_is_an_input_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="Cannot write"):
    _write(tmp_path / "file" / "data", 1)


def test_full_disk_is_an_input_error(tmp_path, monkeypatch):
  full = pathlib.Path("/dev/full")
  if not full.exists():
    pytest.skip("no /dev/full here")
  writer = records.array_record_module.ArrayRecordWriter
  monkeypatch.setattr(
    records.array_record_module,
    "ArrayRecordWriter",
    lambda path, options: writer(str(full), options),
  )
  with pytest.raises(InputError, match="space"):
    _write(tmp_path / "data", 2)
  assert list(tmp_path.iterdir()) == []


def test_damaged_folders_are_named(tmp_path):
  path = tmp_path / "data"
  with pytest.raises(InputError, match="does not exist"):
    records.read_manifest(path)
  path.mkdir()
  with pytest.raises(InputError, match="not a dataset"):
    records.read_manifest(path)
  path.rmdir()

  _write(path, 4, 2)
  manifest = json.loads((path / "manifest.json").read_text())
  shard = path / manifest["shards"][1]["path"]
  data = shard.read_bytes()
  shard.write_bytes(data[: len(data) // 2])  # ArrayRecord sees 0 records
  with pytest.raises(InputError, match="holds 0 records, its manifest says 2"):
    records.open_dataset(path)
  shard.unlink()
  with pytest.raises(InputError, match="holds 0 records"):
    records.open_dataset(path)
  shard.write_bytes(data)
  shard.with_suffix(".npz").unlink()
  with pytest.raises(InputError, match="Sidecar"):
    records.open_dataset(path)

  for change, message in (
    ({"schema_version": 9}, "schema version 9"),
    ({"records": 0, "shards": []}, "no records"),
  ):
    text = json.dumps({**manifest, **change})
    (path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=message):
      records.read_manifest(path)
  (path / "manifest.json").write_text("{")
  with pytest.raises(InputError, match="unreadable"):
    records.read_manifest(path)


def test_record_damaged_on_disk(tmp_path):
  path = tmp_path / "data"
  _write(path, 5)
  shard = path / "part-00000-of-00001.array_record"
  data = bytearray(shard.read_bytes())
  data[data.find(b"r3")] ^= 1
  shard.write_bytes(data)
  dataset = records.open_dataset(path)
  with pytest.raises(InputError, match="Record 3 of"):
    dataset[3]
  assert dataset[4].id == "r4"
  with pytest.raises(IndexError):
    dataset[5]
