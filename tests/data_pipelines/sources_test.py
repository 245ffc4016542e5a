# SPDX-License-Identifier: Apache-2.0
"""Inputs of every kind become entries; nothing in them crashes a reader."""

import os
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, folder, jpeg, lines, picture
from source_items import LIMITS, read, texts, write_tar

from data_pipelines import records
from data_pipelines.errors import InputError
from data_pipelines.images import from_bytes
from data_pipelines.sources.items import Limits
from data_pipelines.sources.plan import READERS, plan


def test_folder(tmp_path):
  where = folder(tmp_path / "in", 2)
  (where / "none.png").write_bytes(b"")
  (where / "lost.txt").write_text("no image")
  (where / "bad.jpg").write_bytes(jpeg())
  (where / "bad.txt").write_bytes(b"\xff\xfe\xfa")
  edit = {"file_name": "t.png", "text": "turn it", "references": ["r.png"]}
  lines(where / "metadata.jsonl", [edit, b"\xff{", b"[" * 100_000])
  for name in ("t.png", "r.png"):
    (where / name).write_bytes(encoded(picture(5), "PNG"))
  (where / "big.png").write_bytes(bytes(200_000))
  (where / "big.txt").write_text("too large")
  found = read(where)
  assert texts(found) == {
    "in/p000.jpg": "a soft picture, number 0",
    "in/p001.jpg": "a soft picture, number 1",
    "in/none.png": "image without caption",
    "in/lost.txt": "caption without image",
    "in/bad.jpg": "caption is not UTF-8",
    "in/t.png": "turn it",
    "in/big.png": "image over 100000 bytes (200000; limits.image_bytes)",
    **{
      id: reason
      for id, reason in texts(found).items()
      if id.startswith("in/metadata.jsonl")
    },
  }
  assert found["in/p000.jpg"].target == (where / "p000.jpg").read_bytes()
  assert found["in/t.png"].references == ((where / "r.png").read_bytes(),)
  bad = [id for id in found if id.startswith("in/metadata.jsonl")]
  assert len(bad) == 2
  assert all(texts(found)[id].startswith("metadata line") for id in bad)


def test_links_in_folders(tmp_path):
  where = folder(tmp_path / "in", 1)
  (where / "loop").symlink_to(where)
  (where / "self.jpg").symlink_to(where / "self.jpg")
  (where / "self.txt").write_text("beside a loop")
  (where / "gone.png").symlink_to(where / "nothing.png")
  (where / "other.jpg").symlink_to(where / "p000.jpg")
  (where / "other.txt").write_text("a good link")
  assert texts(read(where)) == {
    "in/p000.jpg": "a soft picture, number 0",
    "in/self.jpg": "broken link",
    "in/gone.png": "broken link",
    "in/other.jpg": "a good link",
  }


def test_names_that_are_no_unicode(tmp_path):
  where = folder(tmp_path / "in", 1)
  name = os.fsencode(where) + b"/n\xff"
  with open(name + b".jpg", "wb") as file:
    file.write(jpeg())
  with open(name + b".txt", "w") as file:
    file.write("odd name")
  assert texts(read(where))["in/n\\xff.jpg"] == "odd name"


def test_parts_of_a_folder_and_their_digests(tmp_path):
  where = folder(tmp_path / "in", 5)
  parts = plan([str(where)], 2)
  assert [(p.start, p.stop) for p in parts] == [(0, 2), (2, 4), (4, 5)]
  ids = [e.id for p in parts for e in READERS["folder"](p, LIMITS)]
  assert ids == sorted(ids) and len(ids) == 5
  assert plan([str(where)], 2) == parts
  (where / "p003.txt").write_text("another caption")
  changed = plan([str(where)], 2)
  assert [a.digest == b.digest for a, b in zip(parts, changed)] == [
    True, False, True,
  ]  # fmt: skip
  (where / "p004.jpg").write_bytes(jpeg(77, (90, 72)))
  assert plan([str(where)], 2)[2].digest != changed[2].digest
  # What is added at the end changes no shard before it.
  folder(where, 2, first=5)
  assert plan([str(where)], 2)[:2] == changed[:2]


def test_jsonl(tmp_path):
  folder(tmp_path, 2)
  path = lines(
    tmp_path / "list.jsonl",
    [
      {"file_name": "p000.jpg", "text": "one", "kind": "k", "url": "u", "x": 1},
      b"",
      {"image": "p001.jpg", "instruction": "two", "references": "p000.jpg"},
      {"file_name": "gone.jpg", "text": "three"},
      {"file_name": "p000.jpg"},
      {"text": "no file"},
      b"\xff\xfe",
      b"[" * 100_000,
      {"file_name": ["list"], "text": "x"},
      {"file_name": "nul\0.jpg", "text": "x"},
    ],
  )
  found = read(path, size=4)
  assert texts(found) == {
    "list.jsonl:1": "one",
    "list.jsonl:3": "two",
    "list.jsonl:4": "OSError No such file or directory",
    "list.jsonl:5": "no caption",
    **{
      f"list.jsonl:{n}": texts(found)[f"list.jsonl:{n}"] for n in range(6, 11)
    },
  }
  for number in range(6, 10):
    reason = found[f"list.jsonl:{number}"]
    assert reason.startswith("line without a usable file_name")
  assert "null byte" in found["list.jsonl:10"]
  one, two = found["list.jsonl:1"], found["list.jsonl:3"]
  assert one.kind == "k" and not found["list.jsonl:5"].caption
  assert one.provenance == {"where": "list.jsonl:1", "url": "u"}
  assert two.references == (one.target,)
  assert read(path, size=100) == found
  # A changed image reaches the parts that name it, and no other.
  parts = plan([str(path)], 2)
  assert plan([str(path)], 2) == parts
  (tmp_path / "p001.jpg").write_bytes(jpeg(7, (90, 72)))
  changed = plan([str(path)], 2)
  assert [a.digest == b.digest for a, b in zip(parts, changed)] == [
    True, False, True, True, True,
  ]  # fmt: skip


def test_tables_of_img2dataset(tmp_path):
  table = pa.table({
    "jpg": pa.array([jpeg(0), None, jpeg(2), bytes(200_000)], pa.binary()),
    "caption": ["zero", "one", None, "three"],
    "key": ["00", "01", "02", "03"],
    "url": ["http://a", "http://b", "http://c", "http://d"],
    "status": ["success", "failed_to_download", "success", "success"],
    "error_message": [None, "404", None, None],
  })  # fmt: skip
  pq.write_table(table, tmp_path / "00000.parquet", row_group_size=3)
  parts = plan([str(tmp_path / "00000.parquet")], 1000)
  assert len(parts) == 2
  found = read(tmp_path / "00000.parquet")
  assert texts(found) == {
    "00000.parquet:0": "zero",
    "00000.parquet:1": "no image (404)",
    "00000.parquet:2": "no caption",
    "00000.parquet:3": "image over 100000 bytes (200000; limits.image_bytes)",
  }
  assert found["00000.parquet:0"].provenance == {
    "where": "00000.parquet:0", "key": "00", "url": "http://a",
  }  # fmt: skip


def test_tables_of_structs_and_edits(tmp_path):
  image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
  struct = {"bytes": jpeg(0), "path": "x.jpg"}
  table = pa.table({
    "image": pa.array([struct, struct, struct], image),
    "references": pa.array(
      [[{"bytes": jpeg(1), "path": None}, struct], [], [None]], pa.list_(image)
    ),
    "prompt": ["edit", "plain", "hollow"],
  })  # fmt: skip
  pq.write_table(table, tmp_path / "t.parquet")
  found = read(tmp_path)
  prefix = f"{tmp_path.name}/t.parquet"
  assert found[f"{prefix}:0"].references == (jpeg(1), jpeg(0))
  assert found[f"{prefix}:1"].references == ()
  assert found[f"{prefix}:2"] == "no reference image"


def test_damaged_tables(tmp_path):
  rows = [encoded(picture(i, (64, 64)), "PNG") for i in range(300)]
  table = pa.table({"image": rows, "text": [str(i) for i in range(300)]})
  path = tmp_path / "t.parquet"
  pq.write_table(table, path, row_group_size=150, compression="none")
  data = path.read_bytes()
  whole = read(path, limits=Limits())
  path.write_bytes(data[:2000])
  (reason,) = read(path).values()
  assert reason.startswith("damaged Parquet file (")
  broken = bytearray(data)
  middle = len(data) * 3 // 4
  broken[middle - 60_000 : middle + 60_000] = bytes(120_000)
  path.write_bytes(bytes(broken))
  found = read(path, limits=Limits())
  assert all(found[f"t.parquet:{i}"] == whole[f"t.parquet:{i}"]
             for i in range(150))  # fmt: skip


def test_a_table_without_images(tmp_path):
  pq.write_table(pa.table({"text": ["x"]}), tmp_path / "t.parquet")
  with pytest.raises(InputError, match="no column of images"):
    plan([str(tmp_path)], 10)


def test_tables_of_metadata_beside_images_or_tars_are_ignored(tmp_path):
  where = folder(tmp_path / "files", 1)
  pq.write_table(pa.table({"text": ["x"]}), where / "meta.parquet")
  assert list(read(where)) == ["files/p000.jpg"]
  where = tmp_path / "tars"
  where.mkdir()
  write_tar(where / "0.tar", [{"__key__": "0", "jpg": jpeg(), "txt": b"t"}])
  pq.write_table(pa.table({"text": ["x"]}), where / "0.parquet")
  assert list(read(where)) == ["tars/0.tar/0"]


def test_unclear_missing_and_empty_inputs(tmp_path):
  where = folder(tmp_path / "in", 1)
  write_tar(where / "0.tar", [{"__key__": "0", "jpg": jpeg(), "txt": b"t"}])
  with pytest.raises(InputError, match="holds both 0"):
    plan([str(where)], 10)
  with pytest.raises(InputError, match="does not exist"):
    plan([str(tmp_path / "nowhere")], 10)
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match="is empty"):
    plan([str(tmp_path / "empty")], 10)
  (tmp_path / "file.xyz").write_text("")
  with pytest.raises(InputError, match="of no known kind"):
    plan([str(tmp_path / "file.xyz")], 10)
  with pytest.raises(InputError, match="no input"):
    plan([], 10)


def test_equal_names_of_inputs(tmp_path):
  first = folder(tmp_path / "a" / "in", 1)
  second = folder(tmp_path / "b" / "in", 1)
  assert list(read(first, second)) == ["in/p000.jpg", "in-2/p000.jpg"]


def test_datasets_are_parts_of_records(tmp_path):
  out = tmp_path / "data"
  with records.DatasetWriter(out, 3) as writer:
    for i in range(2):  # the last shard stays empty
      image = from_bytes(jpeg(i))
      record = records.Record(str(i), "t2i", "c", "k", image, (), {})
      writer.add(record)
  parts = plan([str(out)], 1000)
  assert [p.kind for p in parts] == ["records"] * 2
  assert [pathlib.Path(p.path).name for p in parts] == [
    "part-00000-of-00003.array_record", "part-00001-of-00003.array_record",
  ]  # fmt: skip
