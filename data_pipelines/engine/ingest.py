# SPDX-License-Identifier: Apache-2.0
"""The first verb: inputs become records, images exactly as found.

    ingest/part-00000.array_record  records, see `data_pipelines.codec`
    ingest/part-00000.parquet       one row per input: id, position of the
                                    record or -1, where, status, reason

A status is 'ok', 'quarantined', or 'excluded' for a record that lies in the
file of an earlier stage but was not kept there; it is no input of this one.
"""

import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import codec, reasons
from data_pipelines.engine import decoding, pool, shards
from data_pipelines.engine.errors import check_error_rate
from data_pipelines.errors import InputError
from data_pipelines.sources import datasets
from data_pipelines.sources.items import (
  Entry,
  Item,
  Limits,
  Part,
  Unusable,
  printable,
)
from data_pipelines.sources.plan import READERS

FOLDER = "ingest"
SCHEMA = pa.schema({
  "id": pa.string(),
  "position": pa.int64(),
  "where": pa.string(),
  "status": pa.string(),
  "reason": pa.string(),
})  # fmt: skip
CODE = (
  "data_pipelines.sources", "data_pipelines.pairing",
  "data_pipelines.codec", "data_pipelines.images",
  "data_pipelines.engine.decoding", "data_pipelines.engine.ingest",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the verb needs besides the part.

  Attributes:
    limits: what an item may be at most.
    max_error_rate: share of quarantined items at which a shard is refused.
    processes: of the pool; 0: one per core.
  """

  limits: Limits
  max_error_rate: float
  processes: int = 0


def run(
  out: pathlib.Path,
  index: int,
  fingerprint: str,
  part: Part,
  settings: Settings,
  retry: str | None = None,
) -> None:
  """Writes one shard.

  Args:
    out: folder of the stage.
    index: number of the shard.
    fingerprint: see `shards`.
    part: its input.
    settings: see there.
    retry: a reason. Only items that were left out for it are read again; what
      is known of the others is taken from the shard that is there.

  Raises:
    InputError: too many items are unusable, or writing failed.
  """
  folder = out / FOLDER
  stem = shards.name(index)
  with shards.write(folder, stem, fingerprint) as shard:
    if part.kind == "records":
      rows = _link(part, shard)
    else:
      known = Known(folder, stem, retry) if retry else None
      rows = _make(part, settings, shard, known)
    bad = sum(row["status"] == "quarantined" for row in rows)
    check_error_rate(
      f"{FOLDER}/{stem}", bad, len(rows), settings.max_error_rate,
      [row["reason"] for row in rows if row["reason"]],
    )  # fmt: skip
    shard.table(pa.Table.from_pylist(rows, SCHEMA))
    shard.counts = {
      status: sum(row["status"] == status for row in rows)
      for status in ("ok", "quarantined", "excluded")
    }


def _link(part: Part, shard: shards.Shard) -> list[dict[str, Any]]:
  """Takes over a file of records."""
  source = pathlib.Path(part.path)
  target = shard.path(".array_record")
  try:
    os.link(source, target)
  except OSError:  # another file system, or one without links
    shutil.copyfile(source, target)
  kept = datasets.kept_ids(part)
  rows = []
  for position, data in enumerate(shards.read_records(source)):
    record = codec.decode(data)
    status = "ok" if kept is None or record.id in kept else "excluded"
    rows.append(_row(record.id, str(source), position, status))
  if len(rows) != part.stop:
    raise InputError(
      f"Shard {source} holds {len(rows)} records, its manifest says "
      f"{part.stop}; copy the file again or rebuild it."
    )
  return rows


def record_rows(out: pathlib.Path, stem: str) -> pa.Table:
  """Rows of what became a record, in the order of the file of records.

  Args:
    out: folder of the stage.
    stem: of the shard.

  Returns:
    `id` and `status`; one that is not 'ok' is no input of this stage.
  """
  return pq.read_table(
    out / FOLDER / f"{stem}.parquet", columns=["id", "position", "status"],
    filters=[("position", ">=", 0)],
  ).select(["id", "status"])  # fmt: skip


def _row(
  id: str, where: str, position: int, status: str, reason: str = ""
) -> dict[str, Any]:
  return {
    "id": id, "position": position, "where": where, "status": status,
    "reason": reason,
  }  # fmt: skip


class Known:
  """What is known of the items of a shard, but for one reason to retry."""

  def __init__(self, folder: pathlib.Path, stem: str, reason: str):
    """Reads the rows of the shard that is there, if it is complete."""
    self._rows: dict[str, dict[str, Any]] = {}
    self._records = None
    if shards.read_marker(folder, stem) is not None:
      rows = pq.read_table(folder / f"{stem}.parquet").to_pylist()
      self._rows = {
        row["id"]: row
        for row in rows
        if not reasons.matches(row["reason"], reason)
      }
      self._path = folder / f"{stem}.array_record"

  def __call__(self, id: str) -> bytes | Unusable | None:
    """The record or the reason of an item; None if it is to be read."""
    row = self._rows.get(id)
    if row is None:
      return None
    if row["status"] == "quarantined":
      return Unusable(row["reason"])
    if self._records is None:
      self._records = list(shards.read_records(self._path))
    return self._records[row["position"]]


def _make(
  part: Part, settings: Settings, shard: shards.Shard, known: Known | None
) -> list[dict[str, Any]]:
  """Reads items and writes their records."""
  listed: list[tuple[str, str]] = []  # entries themselves hold images
  used: dict[str, int] = {}

  def tasks() -> Iterator[tuple]:
    for entry in READERS[part.kind](part, settings.limits):
      used[entry.id] = used.get(entry.id, 0) + 1
      if used[entry.id] > 1:
        new = f"{entry.id}#{used[entry.id]}"
        entry = dataclasses.replace(entry, id=new)
      listed.append((entry.id, entry.where))
      found = known(entry.id) if known else None
      yield entry.id, _load(entry) if found is None else found, settings.limits

  writer = shard.records()
  processes = pool.shared(settings.processes)
  results = processes.map(make_record, tasks(), settings.limits.seconds)
  rows, position = [], 0
  for number, result in enumerate(results):
    id, where = listed[number]
    if isinstance(result, Unusable):
      reason = printable(str(result))
      rows.append(_row(id, where, -1, "quarantined", reason))
    else:
      writer.write(result)
      rows.append(_row(id, where, position, "ok"))
      position += 1
  return rows


def _load(entry: Entry) -> Item | Unusable:
  try:
    return entry.load()
  except Unusable as error:
    return error
  except OSError as error:
    return Unusable(f"unreadable file ({error.strerror})")


def make_record(
  id: str, item: Item | Unusable | bytes, limits: Limits
) -> bytes:
  """Checks an item and encodes it as a record; runs in the pool.

  Args:
    id: of the record.
    item: what was read; bytes are a finished record.
    limits: what it may be at most.

  Raises:
    Unusable: it cannot be a record.
  """
  if isinstance(item, bytes):
    return item
  if isinstance(item, Unusable):
    raise item
  caption = _check_caption(item.caption, item.missing, limits)
  if len(item.references) > limits.references:
    raise Unusable(
      f"over {limits.references} references ({len(item.references)}; "
      "limits.references)"
    )
  record = codec.Record(
    id=id,
    task="ti2i" if item.references else "t2i",
    caption=caption,
    kind=item.kind.encode("utf-8", "replace").decode(),
    target=decoding.probe(item.target, limits),
    references=tuple(decoding.probe(r, limits) for r in item.references),
    provenance={
      **item.provenance,
      "sha256": hashlib.sha256(item.target).hexdigest(),
    },
  )
  return codec.encode(record)


def _check_caption(caption: str, missing: str, limits: Limits) -> str:
  caption = caption.strip()
  if not caption and not limits.uncaptioned:
    raise Unusable(missing)
  try:
    size = len(caption.encode("utf-8"))
  except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
    raise Unusable("caption is not Unicode") from error
  if size > limits.caption_bytes:
    raise Unusable(
      f"caption over {limits.caption_bytes} bytes ({size}; "
      "limits.caption_bytes)"
    )
  return caption
