# SPDX-License-Identifier: Apache-2.0
"""Datasets and earlier stages as input: their shards are linked, not copied.

Of a dataset folder every record is taken as it is stored. Of a stage the
records are taken as they were found, at full resolution, without those that
the stage left out; its metrics and scores are taken over with them.
"""

import json
import os
import pathlib
from typing import Any

import pyarrow.parquet as pq

from data_pipelines.errors import InputError
from data_pipelines.records import read_image_manifest
from data_pipelines.sources.items import Part, digest

STAGE_MANIFEST = "qi2_jax stage"


def plan_dataset(path: pathlib.Path, prefix: str, size: int) -> list[Part]:
  """One part per shard with records.

  Raises:
    InputError: the dataset is damaged or a feature cache.
  """
  manifest = read_image_manifest(path)
  return [
    Part(
      "records", os.fspath(path / shard["path"]), prefix, 0, shard["records"],
      digest(shard["sha256"]),
    )
    for shard in manifest["shards"]
    if shard["records"]
  ]  # fmt: skip


def plan_stage(path: pathlib.Path, prefix: str, size: int) -> list[Part]:
  """One part per shard of the stage.

  Raises:
    InputError: the stage is not complete.
  """
  manifest = read_stage(path)
  parts = []
  for shard in manifest["ingest"]:
    stem = shard["name"]
    rows = path / "materialise" / f"{stem}.parquet"
    file = path / "ingest" / f"{stem}.array_record"
    if not file.is_file() or not rows.is_file():
      raise InputError(
        f"Stage {path} has lost {file.name} or {rows.name}; run the stage "
        "again, or give its data folder."
      )
    parts.append(
      Part(
        "records", os.fspath(file), prefix, 0, shard["records"],
        digest(shard["sha256"], shard["kept_sha256"]),
        ({"stage": os.fspath(path), "name": stem},),
      )
    )  # fmt: skip
  return parts


def read_stage(path: pathlib.Path) -> dict[str, Any]:
  """The manifest of a complete stage.

  Raises:
    InputError: it is missing or unreadable.
  """
  try:
    text = (path / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    if manifest.get("what") != STAGE_MANIFEST:
      raise ValueError("it is no stage")
  except (OSError, ValueError, AttributeError) as error:
    raise InputError(
      f"{path} is not a complete stage ({error}); run all of its verbs."
    ) from error
  return manifest


def is_stage(path: pathlib.Path) -> bool:
  """Whether a folder is the output of a stage, complete or not."""
  return (path / "ingest").is_dir()


def kept_ids(part: Part) -> set[str] | None:
  """Ids of the records that the stage of a part kept; None: all."""
  if not part.entries:
    return None
  (entry,) = part.entries
  rows = pathlib.Path(entry["stage"], "materialise", f"{entry['name']}.parquet")
  table = pq.read_table(rows, columns=["id", "status"])
  return {row["id"] for row in table.to_pylist() if row["status"] == "kept"}
