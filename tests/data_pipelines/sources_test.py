# SPDX-License-Identifier: Apache-2.0
"""Inputs of every kind become entries; nothing in them crashes a reader."""

import gzip
import io
import json
import os
import pathlib
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from pictures import encoded, folder, jpeg, lines, picture

from data_pipelines import records
from data_pipelines.errors import InputError
from data_pipelines.images import from_bytes
from data_pipelines.sources.items import Limits, Unusable
from data_pipelines.sources.plan import READERS, plan

LIMITS = Limits(image_bytes=100_000)


def read(*inputs, size=1000, limits=LIMITS):
  """id -> Item or the reason why there is none."""
  found = {}
  for part in plan([str(path) for path in inputs], size):
    for entry in READERS[part.kind](part, limits):
      assert entry.id not in found
      assert entry.id.encode("utf-8") and entry.where.encode("utf-8")
      try:
        found[entry.id] = entry.load()
      except Unusable as error:
        found[entry.id] = str(error)
      except OSError as error:
        found[entry.id] = f"OSError {error.strerror}"
  return found


def texts(found):
  return {
    id: item if isinstance(item, str) else item.caption or item.missing
    for id, item in found.items()
  }


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


def write_tar(path, samples):
  with webdataset.TarWriter(str(path), encoder=False) as writer:
    for sample in samples:
      writer.write(sample)
  return path


def test_tars_of_webdataset(tmp_path):
  (tmp_path / "in" / "deep").mkdir(parents=True)
  meta = json.dumps({"caption": "from json", "license": "cc0"}).encode()
  write_tar(
    tmp_path / "in" / "a.tar",
    [
      {"__key__": "x/0", "jpg": jpeg(0), "txt": b"zero"},
      {"__key__": "x/1", "png": encoded(picture(1), "PNG"), "json": meta},
      {
        "__key__": "x/2", "target.jpg": jpeg(2), "source.jpg": jpeg(3),
        "mask.png": encoded(picture(4), "PNG"), "txt": b"edit",
      },
      {"__key__": "x/3", "txt": b"no image"},
      {"__key__": "x/4", "jpg": jpeg(4), "png": jpeg(5), "txt": b"two"},
      {"__key__": "x/5", "jpg": bytes(200_000), "txt": b"large"},
      {"__key__": "x/6", "jpg": jpeg(6), "txt": b"\xff\xff"},
      {"__key__": "x/0", "jpg": jpeg(0), "txt": b"again"},
    ],
  )  # fmt: skip
  data = (tmp_path / "in" / "a.tar").read_bytes()
  (tmp_path / "in" / "deep" / "b.tar.gz").write_bytes(gzip.compress(data))
  found = read(tmp_path / "in")
  expected = {
    "x/0": "zero",
    "x/1": "from json",
    "x/2": "edit",
    "x/3": "no image",
    "x/4": "several target images",
    "x/5": "image over 100000 bytes (200000; limits.image_bytes)",
    "x/6": "caption is not UTF-8",
    "x/0#2": "again",
  }
  assert texts(found) == {
    f"in/{name}/{key}": text
    for name in ("a.tar", "deep/b.tar.gz")
    for key, text in expected.items()
  }
  edit = found["in/a.tar/x/2"]
  assert edit.target == jpeg(2)
  assert edit.references == (encoded(picture(4), "PNG"), jpeg(3))
  assert found["in/a.tar/x/1"].provenance["license"] == "cc0"


def write_plain_tar(path, samples):
  """Without the extended headers of webdataset, which fail more loudly."""
  with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
    for sample in samples:
      for extension in ("jpg", "txt"):
        info = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
        info.size = len(sample[extension])
        tar.addfile(info, io.BytesIO(sample[extension]))
  return path


@pytest.mark.parametrize("write", [write_tar, write_plain_tar])
@pytest.mark.parametrize("harm", ["cut", "cut_header", "flip", "gzip", "text"])
def test_damaged_tars_say_what_is_lost(tmp_path, harm, write):
  path = write(
    tmp_path / "a.tar",
    [
      {"__key__": str(i), "jpg": jpeg(i), "txt": str(i).encode()}
      for i in range(6)
    ],
  )
  data = path.read_bytes()
  middle = data.index(b"3.jpg")
  if harm == "cut":
    path.write_bytes(data[: middle + 1000])
  elif harm == "cut_header":
    path.write_bytes(data[: middle + 100])
  elif harm == "flip":
    path.write_bytes(data[:middle] + b"!!!!" + data[middle + 4 :])
  elif harm == "gzip":
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(data)[:9000])
  else:
    path.write_text("this is no tar at all " * 100)
  found = texts(read(path))
  lost = found.pop(f"{path.name}#rest")
  assert lost.startswith("damaged tar (")
  assert found == {f"{path.name}/{i}": str(i) for i in range(len(found))}
  if harm in ("cut", "cut_header", "flip"):
    assert len(found) == 3 and "everything after 2 is lost" in lost
  if harm == "text":
    assert not found and "from the start" in lost


def in_parts(path, size):
  """Ids and captions, part by part."""
  parts = plan([str(path)], size)
  return [
    {e.id: caption_or_reason(e) for e in READERS[p.kind](p, Limits())}
    for p in parts
  ]


def caption_or_reason(entry):
  try:
    return entry.load().caption
  except Unusable as error:
    return str(error)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 100])
@pytest.mark.parametrize("write", [write_tar, write_plain_tar])
def test_parts_of_a_tar_are_the_whole(tmp_path, write, size):
  keys = ["a", "b", "a", "c", "d", "a", "b", f"{'long' * 30}/e" * 2]
  if write is write_plain_tar:
    keys[-1] = "e"
  path = write(
    tmp_path / "a.tar",
    [
      {"__key__": key, "jpg": jpeg(i), "txt": f"text {i}".encode()}
      for i, key in enumerate(keys)
    ],
  )
  (whole,) = in_parts(path, 1000)
  assert list(whole.values()) == [f"text {i}" for i in range(8)]
  assert list(whole)[:3] == ["a.tar/a", "a.tar/b", "a.tar/a#2"]
  found = in_parts(path, size)
  assert [len(part) for part in found] == [
    min(size, 8 - start) for start in range(0, 8, size)
  ]
  joined = [pair for part in found for pair in part.items()]
  assert joined == list(whole.items())


def test_damage_in_a_tar_costs_only_the_parts_behind_it(tmp_path):
  samples = [
    {"__key__": str(i), "jpg": jpeg(i), "txt": str(i).encode()}
    for i in range(6)
  ]
  path = write_plain_tar(tmp_path / "a.tar", samples)
  data = path.read_bytes()
  middle = data.index(b"3.jpg")
  path.write_bytes(data[:middle] + b"!!!!" + data[middle + 4 :])
  parts = in_parts(path, 2)
  assert [list(part) for part in parts] == [
    ["a.tar/0", "a.tar/1"], ["a.tar/2", "a.tar#rest"],
  ]  # fmt: skip
  assert "everything after 2 is lost" in parts[1]["a.tar#rest"]
  # A compressed tar cannot be started in the middle.
  whole = write_plain_tar(tmp_path / "b.tar", samples).read_bytes()
  (tmp_path / "b.tar.gz").write_bytes(gzip.compress(whole))
  assert len(in_parts(tmp_path / "b.tar.gz", 2)) == 1


def test_an_intact_tar_without_end_loses_nothing(tmp_path):
  path = write_tar(
    tmp_path / "a.tar", [{"__key__": "0", "jpg": jpeg(0), "txt": b"zero"}]
  )
  data = path.read_bytes().rstrip(b"\0")
  path.write_bytes(data + bytes(-len(data) % 512))
  assert texts(read(path)) == {"a.tar/0": "zero"}


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
