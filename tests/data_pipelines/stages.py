# SPDX-License-Identifier: Apache-2.0
"""Runs of stages on small folders, and what they wrote."""

import json
import pathlib

from pictures import encoded, folder, jpeg, lines, picture

from data_pipelines import records
from data_pipelines.engine import stage
from data_pipelines.engine.config import parse
from experiments import data


def config(**changes):
  """The tiny stage with small shards; `changes` are dotted paths with __."""
  values = data.get_config("tiny").to_dict()
  values["shard_records"] = 8
  for name, value in changes.items():
    *path, last = name.split("__")
    inner = values
    for key in path:
      inner = inner[key]
    inner[last] = value
  return parse(values)


def run(out, *inputs, **options):
  options.setdefault("config", config())
  options.setdefault("processes", 1)
  return stage.run(
    stage.Run(out=out, inputs=tuple(map(str, inputs)), **options)
  )


def content(out):
  """Bytes of everything that a run writes, but its log."""
  return {
    path.relative_to(out).as_posix(): path.read_bytes()
    for path in sorted(pathlib.Path(out).rglob("*"))
    if path.is_file() and path.name not in ("log.jsonl", "report.html")
  }


def reasons(out):
  rows = (out / "quarantine.jsonl").read_text("utf-8").splitlines()
  return {row["id"]: row["reason"] for row in map(json.loads, rows)}


def all_records(out):
  dataset = records.open_dataset(out / "data")
  return {r.id: r for r in (dataset[i] for i in range(len(dataset)))}


def mixed_input(path):
  """Good pictures, edits and RGBA, and some of everything that is not."""
  folder(path, 10)
  (path / "alpha.png").write_bytes(encoded(picture(50, mode="RGBA"), "PNG"))
  (path / "alpha.txt").write_text("a soft picture, half transparent")
  (path / "cut.jpg").write_bytes(jpeg(51)[:-900])
  (path / "cut.txt").write_text("a soft picture, cut off")
  (path / "zero.jpg").write_bytes(b"")
  (path / "zero.txt").write_text("nothing at all here")
  (path / "small.jpg").write_bytes(jpeg(52, (50, 70)))
  (path / "small.txt").write_text("a soft picture, too small")
  (path / "twin.jpg").write_bytes(jpeg(3))
  (path / "twin.txt").write_text("a soft picture, seen before")
  (path / "mute.jpg").write_bytes(jpeg(53))
  for name, seed in (("t", 60), ("r1", 61), ("r2", 62)):
    image = picture(seed, (160, 90))
    (path / f"{name}.webp").write_bytes(encoded(image, "WEBP"))
  edit = {
    "file_name": "t.webp", "text": "blend the two of them", "kind": "edit",
    "references": ["r1.webp", "r2.webp"],
  }  # fmt: skip
  lines(path / "metadata.jsonl", [edit])
  return path
