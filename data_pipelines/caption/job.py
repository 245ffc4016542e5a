# SPDX-License-Identifier: Apache-2.0
"""Captions of one shard of records.

part-00000.parquet    one row per caption that was asked for: id, kind,
                      language, length, category, text, valid, reason,
                      model, prompt_id, tokens, answers
part-00000.done.json  marker, see `engine.shards`
"""

import collections
import concurrent.futures
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from data_pipelines import codec
from data_pipelines.caption import mix
from data_pipelines.caption import record as records
from data_pipelines.caption.endpoint import DeadError
from data_pipelines.caption.prepare import Prepared, prepare
from data_pipelines.caption.record import Ask, Settings
from data_pipelines.engine import pool, shards
from data_pipelines.errors import InputError
from data_pipelines.reasons import is_excessive, matches, tally
from data_pipelines.sources.items import Unusable

CODE = (
  "data_pipelines.caption", "data_pipelines.filters.text",
  "data_pipelines.filters.pixels",
  "data_pipelines.codec", "data_pipelines.images",
  "data_pipelines.engine.decoding",
)  # fmt: skip
# Records in work per request at a time: others go on behind a slow one.
_AHEAD = 4
_SECONDS = 10.0  # between two lines of progress

_Rows = list[dict[str, Any]]


class TooManyFailedError(InputError):
  """So many captions of a shard failed that something else must be wrong."""


def run(
  source: pathlib.Path,
  wanted: Sequence[bool] | None,
  folder: pathlib.Path,
  stem: str,
  fingerprint: str,
  settings: Settings,
  ask: Ask,
  retry: str | None = None,
) -> dict[str, int]:
  """Writes the captions of one shard.

  Args:
    source: ArrayRecord file of records.
    wanted: of every record; None: all.
    folder: of the captions.
    stem: of their files.
    fingerprint: see `shards`.
    settings: see there.
    ask: the captioner; see `record.plain` and `endpoint.Client`.
    retry: a reason, or 'all'. Only rows that failed for it are asked again;
      the others of the shard that is there stay.

  Returns:
    Rows that are 'valid', 'failed' and 'unrouted'.

  Raises:
    TooManyFailedError: too many rows failed.
    InputError: no captioner answers, or writing failed.
  """
  # Rows of other settings are not mixed with those of these.
  same = shards.is_done(folder, stem, fingerprint)
  known = mix.by_record(folder, stem) if retry and same else {}
  with shards.write(folder, stem, fingerprint) as shard:
    rows: _Rows = []
    progress = _Progress(f"{folder.name}/{stem}")
    for found in _rows(source, wanted, known, retry, settings, ask):
      rows += found
      progress.note(found)
    failed = [r["reason"] for r in rows if records.is_failed(r)]
    _check_failed(folder / stem, failed, len(rows), settings.max_error_rate)
    shard.table(pa.Table.from_pylist(rows, records.SCHEMA))
    valid = sum(row["valid"] for row in rows)
    shard.counts = {
      "valid": valid, "failed": len(failed),
      "unrouted": len(rows) - valid - len(failed),
    }  # fmt: skip
    progress.say()
  return shard.counts


def _check_failed(
  where: pathlib.Path, failed: Sequence[str], total: int, limit: float
) -> None:
  if not is_excessive(len(failed), total, limit):
    return
  reason, count = tally(failed).most_common(1)[0]
  raise TooManyFailedError(
    f"{len(failed)} of {total} captions of {where} failed, more than "
    f"--max_error_rate={limit:g} allows; most often ({count}): {reason}, for "
    f"example {next(r for r in failed if r.startswith(reason))!r}; look at "
    "the captioner, or raise the limit."
  )


def _rows(
  source: pathlib.Path,
  wanted: Sequence[bool] | None,
  known: Mapping[str, _Rows],
  retry: str | None,
  settings: Settings,
  ask: Ask,
) -> Iterator[_Rows]:
  """The rows of every record, in order."""
  plan: collections.deque[tuple[str, _Rows | None]] = collections.deque()

  def tasks() -> Iterator[tuple]:
    for position, data in enumerate(shards.read_records(source)):
      if wanted is not None and not wanted[position]:
        continue
      id = codec.decode(data).id
      old = known.get(id)
      if old and not any(matches(row["reason"], retry) for row in old):
        plan.append((id, old))
        continue
      plan.append((id, None))
      yield data, settings.max_side, settings.limits

  results = pool.shared(settings.processes).map(
    prepare, tasks(), settings.limits.seconds
  )

  def one(prepared: Prepared | Unusable, id: str) -> _Rows:
    if isinstance(prepared, Unusable):
      return [records.make_row(settings, id, reason=str(prepared))]
    old = known.get(id)
    # A row without a kind speaks of the whole record.
    if old and all(row["kind"] for row in old):
      return records.again(prepared, old, retry, settings, ask)
    return records.caption_record(prepared, settings, ask)

  threads = concurrent.futures.ThreadPoolExecutor(settings.concurrency)
  try:
    yield from _in_order(results, plan, threads, one, settings.concurrency)
  except DeadError as error:
    raise InputError(
      f"No captioner answers ({error}); start it, or check --url and --model, "
      "and run the same command again: answers so far are kept."
    ) from error
  finally:
    threads.shutdown(wait=True, cancel_futures=True)


def _in_order(
  results: Iterable[Any],
  plan: collections.deque,
  threads: concurrent.futures.Executor,
  one: Callable[[Any, str], _Rows],
  concurrency: int,
) -> Iterator[_Rows]:
  """Runs `one` in threads; a bounded number of records is held."""
  waiting: collections.deque = collections.deque()
  for prepared in results:
    while plan[0][1] is not None:
      waiting.append(plan.popleft()[1])
    id, _ = plan.popleft()
    waiting.append(threads.submit(one, prepared, id))
    while len(waiting) >= _AHEAD * concurrency:
      yield _take(waiting)
  waiting.extend(rows for _, rows in plan)
  while waiting:
    yield _take(waiting)


def _take(waiting: collections.deque) -> _Rows:
  first = waiting.popleft()
  return first if isinstance(first, list) else first.result()


class _Progress:
  """A line every few seconds."""

  def __init__(self, what: str):
    self._what = what
    self._start = self._last = time.monotonic()
    self._valid = self._rows = 0

  def note(self, rows: Sequence[Mapping[str, Any]]) -> None:
    self._rows += len(rows)
    self._valid += sum(row["valid"] for row in rows)
    if time.monotonic() - self._last >= _SECONDS:
      self.say()

  def say(self) -> None:
    self._last = time.monotonic()
    seconds = max(self._last - self._start, 1e-6)
    print(
      f"{self._what}: {self._rows} captions, {self._rows - self._valid} "
      f"unusable, {self._rows / seconds:.1f}/s",
      flush=True,
    )
