# SPDX-License-Identifier: Apache-2.0
"""A run of a stage: which shards of which verb have to be made, in order."""

import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.parquet as pq

from data_pipelines import reasons
from data_pipelines.cli import exclusive
from data_pipelines.engine import (
  beam,
  deciding,
  fingerprints,
  ingest,
  manifest,
  materialise,
  measure,
  score,
  shards,
  tasks,
)
from data_pipelines.engine.config import StageConfig
from data_pipelines.errors import InputError
from data_pipelines.report import page
from data_pipelines.sources.plan import describe, plan

VERBS = ("ingest", "measure", "score", "decide", "materialise")


@dataclasses.dataclass(frozen=True)
class Run:
  """What the command line says.

  Attributes:
    config: of the stage.
    out: folder of the stage.
    inputs: folders and files; empty: those of the last *ingest*.
    verbs: some of VERBS.
    retry: a reason of quarantine or an error of *measure* to try again.
    runner: name of a Beam runner.
    beam_arguments: for Beam.
    processes: of the pool of every Beam worker; 0: one per core.
  """

  config: StageConfig
  out: pathlib.Path
  inputs: tuple[str, ...] = ()
  verbs: tuple[str, ...] = VERBS
  retry: str | None = None
  runner: str = "FnApiRunner"
  beam_arguments: tuple[str, ...] = ()
  processes: int = 0


def run(run: Run) -> dict[str, Any] | None:
  """Does what is missing of the verbs.

  Args:
    run: see there.

  Returns:
    The manifest after *materialise*, else None.

  Raises:
    InputError: anything that the user can fix.
  """
  unknown = sorted(set(run.verbs) - set(VERBS))
  if unknown or not run.verbs:
    raise InputError(f"Verbs {unknown} are unknown; use some of {VERBS}.")
  result = None
  with exclusive(run.out):
    try:
      if run.retry:
        _check_reason(run.out, run.retry)
      for verb in VERBS:
        if verb in run.verbs:
          result = _DO[verb](run)
    except OSError as error:
      raise InputError(
        f"{error.filename or run.out} cannot be read or written "
        f"({error.strerror}); check it and the free space, and run the same "
        "command again."
      ) from error
  return result


def _ingest(run: Run) -> None:
  if not run.inputs:
    _shard_count(run.out)
    return
  parts = plan(run.inputs, run.config.shard_records)
  folder = run.out / ingest.FOLDER
  shards.clean(folder, shards.names(len(parts)))
  folder.mkdir(exist_ok=True)
  origins = [
    part.entries[0] if part.kind == "records" and part.entries else {}
    for part in parts
  ]
  shards.write_json(
    folder / "plan.json",
    {"shards": len(parts), "inputs": describe(run.inputs), "stages": origins},
  )

  def prepare(index: int) -> str:
    return fingerprints.of_ingest(run.config, parts[index])

  def before(todo: Sequence[int]) -> None:
    for index in todo:
      tasks.write_part(run.out, index, parts[index])

  try:
    _do_shards(run, ingest.FOLDER, prepare, before=before)
  finally:
    shutil.rmtree(folder / tasks.PARTS, ignore_errors=True)


def _shard_count(out: pathlib.Path) -> int:
  return _plan(out)["shards"]


def _plan(out: pathlib.Path) -> dict[str, Any]:
  try:
    text = (out / ingest.FOLDER / "plan.json").read_text(encoding="utf-8")
    return json.loads(text)
  except (OSError, ValueError) as error:
    raise InputError(
      f"{out} holds no ingested input; give --input=FOLDER_OR_FILE."
    ) from error


def _measure(run: Run) -> None:
  stages = _plan(run.out)["stages"]

  def prepare(index: int) -> str:
    stem = shards.name(index)
    fingerprint = fingerprints.of_measure(run.config, run.out, stem)
    origin = stages[index]
    if origin:
      folder = pathlib.Path(origin["stage"]) / measure.FOLDER
      adopt(folder, origin["name"], run.out / measure.FOLDER, stem, fingerprint)
    return fingerprint

  _do_shards(run, measure.FOLDER, prepare)


def adopt(
  source: pathlib.Path,
  source_stem: str,
  folder: pathlib.Path,
  stem: str,
  fingerprint: str,
) -> None:
  """Takes over a table that another stage has made of the same records."""
  if shards.is_done(folder, stem, fingerprint):
    return
  if shards.is_done(source, source_stem, fingerprint):
    with shards.write(folder, stem, fingerprint) as shard:
      shutil.copyfile(source / f"{source_stem}.parquet", shard.path(".parquet"))
      shard.counts = shards.read_marker(source, source_stem)["counts"]


def _do_shards(
  run: Run,
  verb: str,
  prepare: Callable[[int], str | None],
  before: Callable[[Sequence[int]], None] | None = None,
  kept: Sequence[str] | None = None,
  score_name: str = "",
) -> None:
  """Makes the shards of a verb that are missing or to be tried again.

  Args:
    run: what to do.
    verb: name of its folder.
    prepare: number of a shard -> its fingerprint, or None if it is complete.
    before: called with the shards to be made, if any.
    kept: for *materialise*.
    score_name: for *score*.
  """
  folder = run.out / verb / score_name
  count = _shard_count(run.out)
  shards.clean(folder, shards.names(count))
  wanted = {i: prepare(i) for i in range(count)}
  again: set[int] = set()
  if run.retry and verb != score.FOLDER:
    again.update(_with_reason(folder, count, run.retry))
  todo = [
    i
    for i, fingerprint in wanted.items()
    if fingerprint is not None
    and (i in again or not shards.is_done(folder, shards.name(i), fingerprint))
  ]
  label = f"{verb}/{score_name}" if score_name else verb
  if not todo:
    print(f"{label}: nothing to do", flush=True)
    return
  # A manifest would vouch for what is about to change.
  (run.out / manifest.NAME).unlink(missing_ok=True)
  if before is not None:
    before(todo)
  elements = [
    dataclasses.asdict(
      tasks.Task(
        verb=verb, index=i, fingerprint=wanted[i], out=os.fspath(run.out),
        config=run.config.plain, processes=run.processes,
        retry=run.retry if i in again else None,
        kept=kept[i] if kept is not None else "", score=score_name,
      )
    )
    for i in todo
  ]  # fmt: skip
  start = time.monotonic()
  beam.execute(
    label, folder, tasks.perform, elements, run.runner, run.beam_arguments
  )
  _log(run.out, label, len(todo), _items(folder, todo), start)


def _with_reason(folder: pathlib.Path, count: int, reason: str) -> list[int]:
  """Shards with an item that was left out for a reason."""
  return [
    i
    for i in range(count)
    if any(
      reasons.matches(found, reason)
      for found in _reasons(folder, shards.name(i))
    )
  ]


def _reasons(folder: pathlib.Path, stem: str) -> set[str]:
  """Why items of a shard were left out, in full."""
  if shards.read_marker(folder, stem) is None:
    return set()
  column = "error" if folder.name == measure.FOLDER else "reason"
  table = pq.read_table(folder / f"{stem}.parquet", columns=[column])
  return set(filter(None, table[column].to_pylist()))


def _check_reason(out: pathlib.Path, reason: str) -> None:
  """Raises InputError unless something was left out for the reason."""
  known = {
    reasons.category(found)
    for verb in (ingest.FOLDER, measure.FOLDER, materialise.FOLDER)
    for path in (out / verb).glob("part-*.parquet")
    for found in _reasons(out / verb, path.stem)
  }
  if reason != "all" and reason not in known:
    raise InputError(
      f"Nothing in {out} was left out for --retry={reason!r}; the reasons are "
      f"{sorted(known)}."
    )


def _items(folder: pathlib.Path, todo: Sequence[int]) -> int:
  counts = [shards.read_marker(folder, shards.name(i))["counts"] for i in todo]
  return sum(n for c in counts for n in c.values() if isinstance(n, int))


def _log(
  out: pathlib.Path, verb: str, made: int, items: int, start: float, **more
) -> None:
  """Times are kept out of the outputs, which are the same in every run."""
  seconds = time.monotonic() - start
  line = {
    "verb": verb, "shards": made, "items": items,
    "seconds": round(seconds, 3), **more,
  }  # fmt: skip
  with open(out / "log.jsonl", "a", encoding="utf-8") as file:
    file.write(json.dumps(line) + "\n")
  rate = items / max(seconds, 1e-6)
  print(f"{verb}: {items} items in {seconds:.1f} s, {rate:.0f}/s", flush=True)


def _decide(run: Run) -> None:
  count = _shard_count(run.out)
  folder = run.out / deciding.FOLDER
  shards.clean(folder, shards.names(count))
  fingerprint = fingerprints.of_decide(run.config, run.out, count)
  if shards.is_done(folder, deciding.STEM, fingerprint):
    print("decide: nothing to do", flush=True)
    return
  (run.out / manifest.NAME).unlink(missing_ok=True)
  start = time.monotonic()
  seconds = deciding.run(run.out, count, fingerprint, run.config)
  counts = shards.read_marker(folder, deciding.STEM)["counts"]
  items = counts["kept"] + sum(n for _, n in counts["dropped"])
  _log(run.out, "decide", 1, items, start, filters=seconds)


def _materialise(run: Run) -> dict[str, Any]:
  count = _shard_count(run.out)
  kept = deciding.kept_bits(run.out, count)

  def prepare(index: int) -> str:
    return fingerprints.of_materialise(
      run.config, run.out, shards.name(index), kept[index]
    )

  _do_shards(run, materialise.FOLDER, prepare, kept=kept)
  stems = shards.names(count)
  scores = {
    name: score.describe(run.out / score.FOLDER / name, stems, **options)
    for name, options in run.config.score.items()
  }
  inputs = _plan(run.out)["inputs"]
  found, new = manifest.finish(run.out, count, run.config, inputs, scores)
  if new or not (run.out / page.NAME).exists():
    page.write_report(run.out)
  if not found["kept"]:
    raise InputError(
      f"None of the {found['in']} records of {run.out} is left "
      f"({manifest.why(found)}); loosen the filters or check the input, see "
      f"{page.NAME}."
    )
  return found


def _score(run: Run) -> None:
  stages = _plan(run.out)["stages"]
  for name, options in run.config.score.items():
    folder = run.out / score.FOLDER / name
    score.check(name, options)

    def prepare(index: int, name=name, folder=folder) -> str | None:
      stem = shards.name(index)
      origin = stages[index]
      if origin:
        source = pathlib.Path(origin["stage"]) / score.FOLDER / name
        score.take_over(source, origin["name"], folder, stem)
      if score.by_model(folder, stem):
        score.check_source(folder, stem, run.out / ingest.FOLDER)
        return None
      fingerprint = fingerprints.of_score(run.config, run.out, name, stem)
      if origin:
        adopt(source, origin["name"], folder, stem, fingerprint)
      return fingerprint

    _do_shards(run, score.FOLDER, prepare, score_name=name)


_DO = {
  "ingest": _ingest,
  "measure": _measure,
  "score": _score,
  "decide": _decide,
  "materialise": _materialise,
}
