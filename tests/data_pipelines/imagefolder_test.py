# SPDX-License-Identifier: Apache-2.0
"""A user's folder becomes a dataset; whatever does not is accounted for."""

import json
import os
import signal
import subprocess
import sys
import time

import interrupts
import numpy as np
import pytest
from PIL import Image

from data_pipelines import imagefolder, records
from data_pipelines.errors import InputError


def _picture(path, seed=0, size=(12, 8), **options):
  pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3))
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels.astype(np.uint8)).save(path, **options)


def _captioned(folder, count, prefix="p"):
  for i in range(count):
    _picture(folder / f"{prefix}{i}.png", i)
    (folder / f"{prefix}{i}.txt").write_text(f"picture {i}")


def _quarantine(path):
  lines = (path / "quarantine.jsonl").read_text("utf-8").splitlines()
  return {row["id"]: row["reason"] for row in map(json.loads, lines)}


def _records(path):
  dataset = records.open_dataset(path)
  return {r.id: r for r in (dataset[i] for i in range(len(dataset)))}


def test_text_files_beside_images(tmp_path):
  folder, out = tmp_path / "in", tmp_path / "out"
  _picture(folder / "a.jpg", 1)
  (folder / "a.txt").write_text("\ufeff 猫 \n", encoding="utf-8")
  _picture(folder / "deep" / "B.WEBP", 2)
  (folder / "deep" / "B.txt").write_text("a dog")
  _picture(folder / ".hidden" / "c.png", 3)
  manifest = imagefolder.convert(folder, out, shards=2)
  found = _records(out)
  assert {i: (r.task, r.caption) for i, r in found.items()} == {
    "a.jpg": ("t2i", "猫"),
    "deep/B.WEBP": ("t2i", "a dog"),
  }
  assert found["a.jpg"].target.data == (folder / "a.jpg").read_bytes()
  assert manifest["records"] == 2 and manifest["quarantined"] == 0


def test_metadata_lines(tmp_path):
  folder, out = tmp_path / "in", tmp_path / "out"
  for i, name in enumerate(["t.png", "r1.png", "r2.png", "free.png"]):
    _picture(folder / "x" / name, i)
  (folder / "x" / "free.txt").write_text("by its side")
  rows = [
    {"file_name": "t.png", "text": "plain"},
    {
      "file_name": "t.png",
      "text": "edit",
      "references": ["r1.png", "r2.png"],
      "kind": "mine",
    },
    {"file_name": "t.png", "text": "one", "references": "r1.png"},
  ]
  (folder / "x" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
  manifest = imagefolder.convert(folder, out)
  found = _records(out)
  assert {i: (r.task, r.caption, r.kind) for i, r in found.items()} == {
    "x/t.png": ("t2i", "plain", "user"),
    "x/t.png#2": ("ti2i", "edit", "mine"),
    "x/t.png#3": ("ti2i", "one", "user"),
    "x/free.png": ("t2i", "by its side", "user"),
  }
  assert [r.data for r in found["x/t.png#2"].references] == [
    (folder / "x" / n).read_bytes() for n in ("r1.png", "r2.png")
  ]
  # Images that only serve as references need no caption.
  assert manifest["quarantined"] == 0


def test_everything_left_out_has_a_reason(tmp_path):
  folder, out = tmp_path / "in", tmp_path / "out"
  _captioned(folder, 7)
  (folder / "p0.txt").unlink()
  (folder / "p1.txt").write_text(" \n")
  (folder / "p2.txt").write_bytes(b"\xff\xfe\xff")
  data = (folder / "p3.png").read_bytes()
  (folder / "p3.png").write_bytes(data[: len(data) // 2])
  (folder / "p4.png").write_bytes(b"")
  (folder / "p5.png").write_bytes(b"not an image")
  (folder / "README.txt").write_text("no image of that name")
  rows = [{"file_name": "gone.png", "text": "x"}, {"file_name": "p6.png"}]
  lines = [json.dumps(row) for row in rows] + ["{", "[1]", '{"text": "x"}']
  (folder / "metadata.jsonl").write_text("\n".join(lines))
  _picture(folder / "good.png")
  (folder / "good.txt").write_text("good")

  manifest = imagefolder.convert(folder, out)
  reasons = _quarantine(out)
  expected = {
    "p0.png": "image without caption",
    "p1.png": "empty caption",
    "p2.png": "UTF-8",
    "p3.png": "Unreadable",
    "p4.png": "0 bytes",
    "p5.png": "Unreadable",
    "p6.png": "no `text`",
    "README.txt": "caption without image",
    "gone.png": "no file gone.png",
    "metadata.jsonl:3": "metadata line",
    "metadata.jsonl:4": "metadata line",
    "metadata.jsonl:5": "metadata line",
  }
  assert reasons.keys() == expected.keys()
  for name, part in expected.items():
    assert part in reasons[name], (name, reasons[name])
  assert manifest["records"] == 1
  assert manifest["quarantined"] == len(expected)
  summary = imagefolder.summarise(out)
  assert "1 records" in summary and "12 left out" in summary


def test_held_out_is_disjoint_and_stable(tmp_path):
  folder = tmp_path / "in"
  _captioned(folder, 40)
  imagefolder.convert(folder, tmp_path / "a", held_out=0.25)
  train = set(_records(tmp_path / "a"))
  held_out = set(_records(tmp_path / "a-held_out"))
  assert not train & held_out
  assert train | held_out == {f"p{i}.png" for i in range(40)}
  assert 3 <= len(held_out) <= 17
  _captioned(folder, 10, "new")
  imagefolder.convert(folder, tmp_path / "b", held_out=0.25)
  assert held_out <= set(_records(tmp_path / "b-held_out"))
  assert train <= set(_records(tmp_path / "b"))


def test_captions_of_one_image_are_held_out_together(tmp_path):
  rows = []
  for i in range(20):
    _picture(tmp_path / "in" / f"photo #{i}.png", i)
    rows += [{"file_name": f"photo #{i}.png", "text": t} for t in "ab"]
  lines = "\n".join(map(json.dumps, rows))
  (tmp_path / "in" / "metadata.jsonl").write_text(lines)
  imagefolder.convert(tmp_path / "in", tmp_path / "out", held_out=0.3)
  sides = [_records(tmp_path / name) for name in ("out", "out-held_out")]
  found = [{r.target.data for r in side.values()} for side in sides]
  assert all(len(side) == 2 * len(data) for side, data in zip(sides, found))
  assert not found[0] & found[1] and len(found[0] | found[1]) == 20


def test_unusable_input_is_named(tmp_path):
  out = tmp_path / "out"
  with pytest.raises(InputError, match="does not exist"):
    imagefolder.convert(tmp_path / "none", out)
  folder = tmp_path / "in"
  folder.mkdir()
  with pytest.raises(InputError, match="No captioned image"):
    imagefolder.convert(folder, out)
  (folder / "a.png").write_bytes(b"x")
  (folder / "a.txt").write_text("x")
  with pytest.raises(InputError, match=r"None of the 1 images .*Unreadable"):
    imagefolder.convert(folder, out)
  with pytest.raises(InputError, match="one side empty"):
    imagefolder.convert(folder, out, held_out=0.01)
  assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_leaves_nothing(tmp_path, how):
  folder = tmp_path / "in"
  _picture(folder / "p.png", size=(900, 900), compress_level=1)
  rows = [{"file_name": "p.png", "text": f"caption {i}"} for i in range(5000)]
  (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
  command = [sys.executable, "-m", "data_pipelines.imagefolder"]
  command += [f"--input={folder}", f"--out={tmp_path / 'out'}"]
  with subprocess.Popen(
    command, stderr=subprocess.PIPE, text=True, preexec_fn=interrupts.heard
  ) as process:
    for _ in range(1000):
      if list(tmp_path.glob("out.tmp-*")):
        break
      time.sleep(0.01)
    os.kill(process.pid, how)
    _, errors = process.communicate(timeout=10)
  assert process.returncode == {2: 130, 15: 143}[how], errors
  assert "Traceback" not in errors
  assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_command_line(tmp_path):
  _captioned(tmp_path / "in", 3)
  command = [sys.executable, "-m", "data_pipelines.imagefolder"]
  command += [f"--input={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]
  first = subprocess.run(command, capture_output=True, text=True)
  assert first.returncode == 0 and "3 records" in first.stdout, first.stderr
  second = subprocess.run(command, capture_output=True, text=True)
  assert second.returncode == 2
  assert second.stderr.startswith("Error: Output")
  assert second.stderr.count("\n") == 1
