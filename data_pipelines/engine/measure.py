# SPDX-License-Identifier: Apache-2.0
"""The second verb: metrics of every record, measured once.

    measure/part-00000.parquet  one row per record of the ingested shard, in
                                its order: id, error, the columns of
                                `data_pipelines.filters.metrics`

Where an image cannot be decoded `error` says why and the metrics of pixels
are null; the *broken* filter drops the record.
"""

import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import codec, reasons
from data_pipelines.engine import decoding, ingest, pool, shards
from data_pipelines.engine.errors import check_error_rate
from data_pipelines.filters import metrics
from data_pipelines.sources.items import Limits, Unusable

FOLDER = "measure"
SCHEMA = pa.schema({
  "id": pa.string(), "error": pa.string(), **metrics.METRICS,
})  # fmt: skip
CODE = (
  "data_pipelines.filters.metrics", "data_pipelines.filters.encoded",
  "data_pipelines.filters.pixels", "data_pipelines.filters.text",
  "data_pipelines.codec", "data_pipelines.images",
  "data_pipelines.engine.decoding", "data_pipelines.engine.measure",
)  # fmt: skip


def run(
  out: pathlib.Path,
  index: int,
  fingerprint: str,
  settings: ingest.Settings,
  retry: str | None = None,
) -> None:
  """Writes one shard.

  Args:
    out: folder of the stage.
    index: number of the shard.
    fingerprint: see `shards`.
    settings: as those of *ingest*.
    retry: an error. Only records that failed with it are measured again.

  Raises:
    InputError: too many images are unreadable, or writing failed.
  """
  stem = shards.name(index)
  source = out / ingest.FOLDER / f"{stem}.array_record"
  folder = out / FOLDER
  known = _known(folder, stem, retry) if retry else {}
  with shards.write(folder, stem, fingerprint) as shard:
    rows = []
    results = pool.shared(settings.processes).map(
      measure_record,
      ((data, settings.limits) for data in _unknown(source, known)),
      settings.limits.seconds,
    )
    for position, data in enumerate(shards.read_records(source)):
      row = known.get(position)
      if row is None:
        row = next(results)
        if isinstance(row, Unusable):  # its process died
          row = _without_pixels(codec.decode(data), str(row))
      rows.append(row)
    errors = [row["error"] for row in rows if row["error"]]
    check_error_rate(
      f"{FOLDER}/{stem}", len(errors), len(rows), settings.max_error_rate,
      errors,
    )  # fmt: skip
    shard.table(pa.Table.from_pylist(rows, SCHEMA))
    shard.counts = {"ok": len(rows) - len(errors), "failed": len(errors)}


def _known(folder: pathlib.Path, stem: str, error: str) -> dict[int, dict]:
  """Rows that are there and did not fail with that error, by position."""
  if shards.read_marker(folder, stem) is None:
    return {}
  rows = pq.read_table(folder / f"{stem}.parquet").to_pylist()
  return {
    i: row
    for i, row in enumerate(rows)
    if not reasons.matches(row["error"] or "", error)
  }


def _unknown(source: pathlib.Path, known: dict[int, dict]):
  for position, data in enumerate(shards.read_records(source)):
    if position not in known:
      yield data


def measure_record(data: bytes, limits: Limits) -> dict[str, Any]:
  """The row of one record; runs in the pool."""
  record = codec.decode(data)
  try:
    target = decoding.decode(record.target, limits)
    references = tuple(
      decoding.decode(reference, limits) for reference in record.references
    )
    values = metrics.measure(record, target, references)
  except Unusable as error:
    return _without_pixels(record, str(error))
  except Exception as error:  # pixels or metadata that no metric foresaw
    text = f"no metrics ({type(error).__name__}: {error})"
    return _without_pixels(record, text)
  return {"id": record.id, "error": None, **values}


def _without_pixels(record: codec.Record, error: str) -> dict[str, Any]:
  return {"id": record.id, "error": error, **metrics.caption_only(record)}
