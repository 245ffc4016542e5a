# SPDX-License-Identifier: Apache-2.0
"""Tars of samples: whole, cut into parts, damaged."""

import gzip
import io
import json
import tarfile

import pytest
from pictures import encoded, jpeg, picture
from source_items import read, texts, write_tar

from data_pipelines.sources.items import Limits, Unusable
from data_pipelines.sources.plan import READERS, plan


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
