# SPDX-License-Identifier: Apache-2.0
"""The shards that a captioner goes through, of a stage or of a dataset."""

import dataclasses
import json
import pathlib
from typing import Any

from data_pipelines.engine import deciding, ingest, shards
from data_pipelines.errors import InputError
from data_pipelines.records import read_image_manifest
from data_pipelines.sources.datasets import is_stage


@dataclasses.dataclass(frozen=True)
class Source:
  """One shard.

  Attributes:
    path: ArrayRecord file of records.
    stem: of the files to be written.
    wanted: of every record; None: all.
    identity: plain JSON that changes with the records or the choice.
  """

  path: pathlib.Path
  stem: str
  wanted: tuple[bool, ...] | None
  identity: Any


def find(path: pathlib.Path) -> list[Source]:
  """The shards of a stage or dataset folder.

  Of a stage, the records that *decide* kept, or all of its inputs where
  *decide* has not run.

  Raises:
    InputError: the folder is neither, incomplete or damaged.
  """
  return _of_stage(path) if is_stage(path) else _of_dataset(path)


def _of_dataset(path: pathlib.Path) -> list[Source]:
  manifest = read_image_manifest(path)
  return [
    Source(path / shard["path"], shards.name(i), None, shard["sha256"])
    for i, shard in enumerate(manifest["shards"])
    if shard["records"]
  ]


def _of_stage(path: pathlib.Path) -> list[Source]:
  folder = path / ingest.FOLDER
  try:
    count = json.loads((folder / "plan.json").read_text("utf-8"))["shards"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{path} holds no ingested input ({error}); run "
      "`python -m data_pipelines.run --verbs=ingest` on it first."
    ) from error
  stems = shards.names(count)
  sums = [shards.sha256_of(folder, stem, ".array_record") for stem in stems]
  decided = shards.read_marker(path / deciding.FOLDER, deciding.STEM)
  if decided is not None:
    bits = deciding.kept_bits(path, count)
  else:
    bits = [_inputs(path, stem) for stem in stems]
  return [
    Source(
      folder / f"{stem}.array_record", stem,
      tuple(bit == "1" for bit in chosen), [sha256, chosen],
    )
    for stem, sha256, chosen in zip(stems, sums, bits)
  ]  # fmt: skip


def _inputs(path: pathlib.Path, stem: str) -> str:
  found = ingest.record_rows(path, stem)["status"].to_pylist()
  return "".join("1" if status == "ok" else "0" for status in found)
