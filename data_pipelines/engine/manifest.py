# SPDX-License-Identifier: Apache-2.0
"""The end of a stage: its dataset folder, its manifest, its quarantine list.

    data/             a dataset folder, see `data_pipelines.records`; its
                      shards are links to those of *materialise*
    manifest.json     what went in, what stayed, and what made it so
    quarantine.jsonl  one line per item that could not be used

The manifest names itself by its content (`id`), so equal runs have equal
manifests and a later stage can say exactly what it was made of.
"""

import collections
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq

from data_pipelines import reasons
from data_pipelines.codec import SCHEMA_VERSION
from data_pipelines.engine import (
  deciding,
  fingerprints,
  ingest,
  materialise,
  measure,
  shards,
)
from data_pipelines.engine.config import StageConfig
from data_pipelines.errors import InputError
from data_pipelines.sources.datasets import STAGE_MANIFEST
from data_pipelines.sources.items import digest

DATA = "data"
NAME = "manifest.json"
QUARANTINE = "quarantine.jsonl"


def finish(
  out: pathlib.Path,
  count: int,
  config: StageConfig,
  inputs: Sequence[dict[str, Any]],
  scores: dict[str, str],
) -> tuple[dict[str, Any], bool]:
  """Writes the dataset folder and the manifest, unless they are there.

  Args:
    out: folder of the stage; all verbs are done.
    count: number of shards.
    config: of the stage.
    inputs: see `sources.plan.describe`.
    scores: what made each score.

  Returns:
    The manifest, and whether it is new. Without any record left there is no
    dataset folder.

  Raises:
    InputError: a verb is not done, or writing failed.
  """
  manifest = _describe(out, count, config, inputs, scores)
  if _read(out / NAME) == manifest and (
    not manifest["kept"] or _read(out / DATA / NAME) == _about(manifest)
  ):
    return manifest, False
  rows = list(_quarantined(out, count))
  if len(rows) != manifest["quarantined"]:
    raise AssertionError(f"{len(rows)} rows, {manifest['quarantined']} counted")
  try:
    _write_lines(out / QUARANTINE, rows)
    if manifest["kept"]:
      _write_data(out, manifest, rows)
    else:  # a dataset of an earlier run would contradict the manifest
      shutil.rmtree(out / DATA, ignore_errors=True)
    shards.write_json(out / NAME, manifest)
  except OSError as error:
    raise InputError(
      f"Writing {out / DATA} failed ({error.strerror}); check the free space "
      "and run the same command again."
    ) from error
  return manifest, True


def _read(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None


def funnel(manifest: dict[str, Any]) -> str:
  """One line: what went in and where it went."""
  return (
    f"{manifest['in']} in = {manifest['kept']} kept + "
    f"{manifest['in'] - manifest['kept'] - manifest['quarantined']} dropped + "
    f"{manifest['quarantined']} quarantined ({why(manifest) or 'none lost'})"
  )


def why(manifest: dict[str, Any]) -> str:
  """'3 dropped by entropy, 1 empty file'."""
  lost = [(f"dropped by {n}", k) for n, k in manifest["dropped"].items() if k]
  lost += [(reason, k) for reason, k in manifest["reasons"].items()]
  return ", ".join(f"{count} {what}" for what, count in lost)


def _describe(out, count, config, inputs, scores) -> dict[str, Any]:
  """The manifest; its sums are checked."""
  stems = shards.names(count)
  read = [_counts(out / ingest.FOLDER, stem) for stem in stems]
  made = [_counts(out / materialise.FOLDER, stem) for stem in stems]
  verdicts = _counts(out / deciding.FOLDER, deciding.STEM)
  dropped = dict(verdicts["dropped"])
  for status, name in materialise.DROPPED.items():
    lost = sum(c[status] for c in made)
    if lost or status == "dropped":
      dropped[name] = lost
  total = sum(c["ok"] + c["quarantined"] for c in read)
  kept = sum(c["kept"] for c in made)
  quarantined = sum(c["quarantined"] for c in (*read, *made))
  if total != kept + sum(dropped.values()) + quarantined:
    raise AssertionError(
      f"{total} in, but {kept} kept, {dropped} dropped, {quarantined} "
      "quarantined"
    )
  tally = reasons.tally(row["reason"] for row in _quarantined(out, count))
  manifest = {
    "what": STAGE_MANIFEST,
    "schema_version": SCHEMA_VERSION,
    "stage": config.name,
    "in": total,
    "kept": kept,
    "dropped": dropped,
    "quarantined": quarantined,
    "reasons": dict(sorted(tally.items())),
    "by_task": _sum(c["by_task"] for c in made),
    "by_kind": _sum(c["by_kind"] for c in made),
    **_by_caption(made),
    "ingest": [_ingested(out, stem) for stem in stems],
    "data": [_data_shard(out, stem) for stem in stems],
    "scores": scores,
    "inputs": list(inputs),
    "config": config.plain,
    "config_sha256": digest(config.plain),
    "code": {
      module.FOLDER: fingerprints.code(module.CODE)
      for module in (ingest, measure, deciding, materialise)
    },
    "libraries": fingerprints.versions(),
  }
  manifest["data"] = [shard for shard in manifest["data"] if shard["records"]]
  return {**manifest, "id": digest(manifest)}


def _counts(folder: pathlib.Path, stem: str) -> dict[str, Any]:
  marker = shards.read_marker(folder, stem)
  if marker is None:
    raise InputError(
      f"Shard {folder / stem} is not complete; run all verbs (--verbs)."
    )
  return marker["counts"]


def _sum(counts: Iterator[dict[str, int]]) -> dict[str, int]:
  total: collections.Counter = collections.Counter()
  for count in counts:
    total.update(count)
  return dict(sorted(total.items()))


def _by_caption(made: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Records by kind of caption, where captions were mixed."""
  found = _sum(c.get("by_caption", {}) for c in made)
  return {"by_caption": found} if found else {}


def _ingested(out: pathlib.Path, stem: str) -> dict[str, Any]:
  folder = out / ingest.FOLDER
  counts = _counts(folder, stem)
  return {
    "name": stem,
    "records": counts["ok"] + counts["excluded"],
    "sha256": shards.sha256_of(folder, stem, ".array_record"),
    "kept_sha256": shards.sha256_of(out / materialise.FOLDER, stem, ".parquet"),
  }


def _data_shard(out: pathlib.Path, stem: str) -> dict[str, Any]:
  folder = out / materialise.FOLDER
  return {
    "path": f"{stem}.array_record",
    "records": _counts(folder, stem)["kept"],
    "sha256": shards.sha256_of(folder, stem, ".array_record"),
  }


def _quarantined(out: pathlib.Path, count: int) -> Iterator[dict[str, str]]:
  for i in range(count):
    stem = shards.name(i)
    where = {}
    rows = pq.read_table(out / ingest.FOLDER / f"{stem}.parquet").to_pylist()
    for row in rows:
      where[row["id"]] = row["where"]
      if row["status"] == "quarantined":
        yield _line(row["id"], row["reason"], row["where"], ingest.FOLDER)
    made = pq.read_table(
      out / materialise.FOLDER / f"{stem}.parquet",
      filters=[("status", "==", "quarantined")],
    )
    for row in made.to_pylist():
      yield _line(
        row["id"], row["reason"], where[row["id"]], materialise.FOLDER
      )


def _line(id: str, reason: str, where: str, verb: str) -> dict[str, str]:
  return {"id": id, "reason": reason, "where": where, "verb": verb}


def _write_lines(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  temporary = path.with_name(f"{path.name}.tmp")
  with temporary.open("w", encoding="utf-8") as file:
    for row in rows:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
  os.replace(temporary, path)


def _about(manifest: dict[str, Any]) -> dict[str, Any]:
  """The manifest of the dataset folder."""
  return {
    "schema_version": SCHEMA_VERSION,
    "source": {
      "name": "stage", "stage": manifest["stage"], "manifest": manifest["id"],
    },
    "shards": manifest["data"],
    "records": manifest["kept"],
    "quarantined": manifest["quarantined"],
    "by_task": manifest["by_task"],
    "by_kind": manifest["by_kind"],
  }  # fmt: skip


def _write_data(
  out: pathlib.Path,
  manifest: dict[str, Any],
  rows: Sequence[dict[str, Any]],
) -> None:
  """The dataset folder; an older one is replaced."""
  data, new, old = (
    out / name for name in (DATA, f"{DATA}.partial", f"{DATA}.old")
  )
  for leftover in (new, old):
    shutil.rmtree(leftover, ignore_errors=True)
  new.mkdir()
  for shard in manifest["data"]:
    stem = shard["path"].partition(".")[0]
    for suffix in (".array_record", ".npz"):
      name = f"{stem}{suffix}"
      _link(out / materialise.FOLDER / name, new / name)
  _write_lines(new / QUARANTINE, rows)
  shards.write_json(new / NAME, _about(manifest))
  if data.exists():
    os.rename(data, old)
  os.rename(new, data)
  shutil.rmtree(old, ignore_errors=True)


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  try:
    os.link(source, target)
  except OSError:  # a file system without links
    shutil.copyfile(source, target)
