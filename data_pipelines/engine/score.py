# SPDX-License-Identifier: Apache-2.0
"""The third verb: scores by models, or by their embedded stand-ins.

    score/NAME/part-00000.parquet  id and the columns of one model, for every
                                   record of the ingested shard

Models run in jobs of their own, on accelerators (`python -m qi2_jax.score`),
and write the same files and markers; those are taken as they are. Where a
shard has none, the stand-ins of the config are run here, and the manifest
names them.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from data_pipelines import codec
from data_pipelines.engine import decoding, ingest, pool, shards
from data_pipelines.errors import InputError
from data_pipelines.filters import standins
from data_pipelines.sources.items import Limits, Unusable

FOLDER = "score"
CODE = (
  "data_pipelines.filters.standins", "data_pipelines.filters.pixels",
  "data_pipelines.codec", "data_pipelines.images",
  "data_pipelines.engine.decoding", "data_pipelines.engine.score",
)  # fmt: skip
_STAND_INS = "stand_ins"  # in the counts of a shard that was made here
SOURCE = "source_sha256"  # in the counts of a shard that a model has scored


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the verb needs.

  Attributes:
    stand_ins: names of `data_pipelines.filters.standins`.
    limits: of the images.
    processes: of the pool; 0: one per core.
  """

  stand_ins: tuple[str, ...]
  limits: Limits
  processes: int = 0


def check(name: str, options: dict[str, Any]) -> tuple[str, ...]:
  """The stand-ins of a score.

  Raises:
    InputError: the options are something else, or a stand-in is unknown.
  """
  names = options.get(_STAND_INS)
  if set(options) != {_STAND_INS} or not isinstance(names, (list, tuple)):
    raise InputError(
      f"config.score.{name} needs exactly the field {_STAND_INS!r}, a tuple "
      "of names, () if a model must have run."
    )
  unknown = sorted(set(names) - set(standins.NAMES))
  if unknown:
    raise InputError(
      f"config.score.{name} names the stand-ins {unknown}; there are "
      f"{sorted(standins.NAMES)}."
    )
  return tuple(names)


def by_model(folder: pathlib.Path, stem: str) -> bool:
  """Whether a model has scored a shard."""
  table = folder / f"{stem}.parquet"
  if not (shards.marker_path(folder, stem).exists() and table.exists()):
    return False
  marker = shards.read_marker(folder, stem)
  # A marker of another program may have other fields.
  return marker is None or _STAND_INS not in marker["counts"]


def take_over(
  source: pathlib.Path, source_stem: str, folder: pathlib.Path, stem: str
) -> None:
  """Copies what a model has said of the same records in an earlier stage."""
  if by_model(folder, stem) or not by_model(source, source_stem):
    return
  folder.mkdir(parents=True, exist_ok=True)
  for suffix in (".parquet", ".done.json"):  # the marker last
    temporary = folder / f"{stem}{suffix}{shards.TEMPORARY}copy"
    shutil.copyfile(source / f"{source_stem}{suffix}", temporary)
    os.replace(temporary, folder / f"{stem}{suffix}")


def check_source(
  folder: pathlib.Path, stem: str, ingested: pathlib.Path
) -> None:
  """Checks that a model has scored the records that are there now.

  Raises:
    InputError: its marker names another checksum.
  """
  marker = shards.read_marker(folder, stem) or {"counts": {}}
  found = marker["counts"].get(SOURCE)
  if found not in (None, shards.sha256_of(ingested, stem, ".array_record")):
    raise InputError(
      f"Score {folder / stem} was made of records that have changed since; "
      "run `python -m qi2_jax.score` again, or delete that folder."
    )


def describe(
  folder: pathlib.Path, stems: Sequence[str], stand_ins: Sequence[str]
) -> str:
  """What made the scores of a folder, for the manifest."""
  models = []
  for stem in stems:
    if by_model(folder, stem):
      marker = shards.read_marker(folder, stem) or {"counts": {}}
      models.append(str(marker["counts"].get("model", "")))
  names = "model " + ", ".join(sorted(set(models)))
  if len(models) == len(stems):
    return names.strip()
  text = "; ".join(standins.describe(name) for name in stand_ins)
  if not models:
    return text
  return f"{names} ({len(models)} of {len(stems)} shards); {text}"


def run(
  out: pathlib.Path,
  name: str,
  index: int,
  fingerprint: str,
  settings: Settings,
) -> None:
  """Writes one shard of a score with its stand-ins.

  Raises:
    InputError: a model must run, a package is missing, or writing failed.
  """
  stem = shards.name(index)
  if not settings.stand_ins:
    raise InputError(
      f"Score {name!r} has no {stem}.parquet in {out / FOLDER / name} and no "
      "stand-in; run `python -m qi2_jax.score` on the stage first."
    )
  source = out / ingest.FOLDER / f"{stem}.array_record"
  columns = {
    column: _readable(kind)
    for stand_in in settings.stand_ins
    for column, kind in standins.COLUMNS[stand_in].items()
  }
  schema = pa.schema({"id": pa.string(), **columns})
  with shards.write(out / FOLDER / name, stem, fingerprint) as shard:
    results = pool.shared(settings.processes).map(
      score_record,
      (
        (data, settings.stand_ins, settings.limits)
        for data in shards.read_records(source)
      ),
      settings.limits.seconds,
    )
    rows = []
    for data, result in zip(shards.read_records(source), results, strict=True):
      if isinstance(result, Unusable):
        result = {"id": codec.decode(data).id}
      rows.append(result)
    shard.table(pa.Table.from_pylist(rows, schema))
    scored = sum(len(row) > 1 for row in rows)
    shard.counts = {
      "ok": scored, "failed": len(rows) - scored,
      _STAND_INS: list(settings.stand_ins),
    }  # fmt: skip


def _readable(kind: pa.DataType) -> pa.DataType:
  """Parquet cannot read back lists of fixed size of which some are null."""
  if pa.types.is_fixed_size_list(kind):
    return pa.list_(kind.value_type)
  return kind


def score_record(
  data: bytes, stand_ins: tuple[str, ...], limits: Limits
) -> dict[str, Any]:
  """The row of one record; runs in the pool.

  Raises:
    Unusable: its target cannot be read.
  """
  record = codec.decode(data)
  target = decoding.decode(record.target, limits)
  row = {"id": record.id}
  for name in stand_ins:
    row |= standins.score(name, record, target)
  return row
