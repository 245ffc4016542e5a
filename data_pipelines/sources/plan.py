# SPDX-License-Identifier: Apache-2.0
"""Cuts inputs into parts, each of which becomes one shard of the stage.

The order of inputs, files and entries decides the number of a shard, and an
input that is added at the end changes no shard before it.
"""

import os
import pathlib
from collections.abc import Sequence

from data_pipelines.errors import InputError
from data_pipelines.images import SUFFIXES
from data_pipelines.sources import datasets, folder, jsonl, tables, tars, tfds
from data_pipelines.sources.items import Part, digest, printable

_PLANNERS = {
  "folder": folder.plan,
  "jsonl": jsonl.plan,
  "tar": tars.plan,
  "table": tables.plan,
  "dataset": datasets.plan_dataset,
  "stage": datasets.plan_stage,
}
# Kinds of which records are made; those of "records" exist already.
READERS = {
  "folder": folder.read,
  "jsonl": jsonl.read,
  "tar": tars.read,
  "table": tables.read,
  "tfds": tfds.read,
}


def plan(inputs: Sequence[str], size: int) -> list[Part]:
  """Cuts inputs into parts.

  Args:
    inputs: folders or files; a folder may hold images with captions, tars,
      Parquet files, a prepared builder of TensorFlow Datasets, a dataset, or
      an earlier stage.
    size: entries of a part, where the input can be cut freely.

  Returns:
    The parts, in order.

  Raises:
    InputError: an input is missing, empty, or of several kinds at once.
  """
  if not inputs:
    raise InputError("There is no input; give --input=FOLDER_OR_FILE.")
  parts: list[Part] = []
  taken: set[str] = set()
  for name in inputs:
    path = pathlib.Path(os.path.normpath(name))
    label = tfds.label(path) if tfds.is_builder(path) else path.name
    prefix = _unique(printable(label), taken)
    found = _plan_one(path, prefix, size)
    if not found:
      raise InputError(f"Input {path} is empty; check --input.")
    parts += found
  return parts


def _unique(name: str, taken: set[str]) -> str:
  """`photos`, and `photos-2` for another folder of that name."""
  unique, count = name, 1
  while unique in taken:
    count += 1
    unique = f"{name}-{count}"
  taken.add(unique)
  return unique


def _plan_one(path: pathlib.Path, prefix: str, size: int) -> list[Part]:
  if path.is_file():
    return _PLANNERS[_kind_of_file(path)](path, prefix, size)
  if not path.is_dir():
    raise InputError(f"Input {path} does not exist; check --input.")
  if datasets.is_stage(path):
    return datasets.plan_stage(path, prefix, size)
  if (path / "manifest.json").is_file():
    return datasets.plan_dataset(path, prefix, size)
  if tfds.is_builder(path):
    return tfds.plan(path, prefix, size)
  archives = _archives(path)
  if not archives:
    return folder.plan(path, prefix, size)
  parts = []
  for file in archives:
    inner = printable(file.relative_to(path).as_posix())
    planner = _PLANNERS[_kind_of_file(file)]
    parts += planner(file, f"{prefix}/{inner}", size)
  return parts


def _kind_of_file(path: pathlib.Path) -> str:
  name = path.name.lower()
  if name.endswith(tars.SUFFIXES):
    return "tar"
  if name.endswith(".parquet"):
    return "table"
  if name.endswith((".jsonl", ".ndjson")):
    return "jsonl"
  raise InputError(
    f"Input file {path} is of no known kind; use a .jsonl, .tar or .parquet "
    "file, or a folder."
  )


def _archives(path: pathlib.Path) -> list[pathlib.Path]:
  """The tars or Parquet files of a folder, sorted.

  Raises:
    InputError: images lie beside them, so that it is unclear what is meant.
  """
  files = [
    pathlib.Path(root, name)
    for root, _, names in os.walk(path)
    for name in names
    if not name.startswith(".")
  ]
  found = sorted(f for f in files if f.name.lower().endswith(tars.SUFFIXES))
  lists = sorted(f for f in files if f.suffix.lower() == ".parquet")
  # img2dataset writes a table of metadata beside its tars or images.
  found += [file for file in lists if tables.has_images(file)]
  pictures = [f for f in files if f.suffix.lower() in SUFFIXES]
  if found and pictures:
    raise InputError(
      f"Input {path} holds both {found[0].name} and images like "
      f"{pictures[0].name}; give them as separate inputs."
    )
  return found or ([] if pictures else lists)


def describe(inputs: Sequence[str]) -> list[dict[str, str]]:
  """What a manifest says of the inputs: name, kind and parent, if any."""
  described = []
  for name in inputs:
    path = pathlib.Path(os.path.normpath(name))
    entry = {"name": printable(path.name)}
    if path.is_dir() and datasets.is_stage(path):
      entry["parent"] = datasets.read_stage(path)["id"]
    elif (path / "manifest.json").is_file():
      text = (path / "manifest.json").read_text(encoding="utf-8")
      entry["dataset"] = digest(text)
    described.append(entry)
  return described
