# SPDX-License-Identifier: Apache-2.0
"""What one Beam element says, and the work it stands for.

An element is plain JSON: the verb, the number of the shard, the fingerprint,
and where to find the rest.
"""

import dataclasses
import json
import pathlib
from typing import Any

from data_pipelines.engine import ingest, materialise, measure, score, shards
from data_pipelines.engine.config import parse
from data_pipelines.sources.items import Part

# Parts lie here while *ingest* runs: a listing of files is no small element.
PARTS = ".parts"


@dataclasses.dataclass(frozen=True)
class Task:
  """One shard of one verb.

  Attributes:
    verb: a key of `_VERBS`.
    index: number of the shard.
    fingerprint: see `shards`.
    out: folder of the stage.
    config: of the stage, plain.
    processes: of the pool; 0: one per core.
    retry: a reason, or None.
    kept: for *materialise*, see `deciding.kept_bits`.
    score: for *score*, its name.
  """

  verb: str
  index: int
  fingerprint: str
  out: str
  config: dict[str, Any]
  processes: int
  retry: str | None = None
  kept: str = ""
  score: str = ""


def write_part(out: pathlib.Path, index: int, part: Part) -> None:
  """Leaves the input of a shard for the worker that will make it."""
  folder = out / ingest.FOLDER / PARTS
  folder.mkdir(parents=True, exist_ok=True)
  shards.write_json(
    folder / f"{shards.name(index)}.json", dataclasses.asdict(part)
  )


def _read_part(out: pathlib.Path, index: int) -> Part:
  path = out / ingest.FOLDER / PARTS / f"{shards.name(index)}.json"
  fields = json.loads(path.read_text(encoding="utf-8"))
  return Part(**{**fields, "entries": tuple(fields["entries"])})


def perform(element: dict[str, Any]) -> None:
  """Does the work of an element, wherever Beam has sent it.

  Raises:
    InputError: the shard cannot be made.
  """
  task = Task(**element)
  _VERBS[task.verb](task, pathlib.Path(task.out))


def _ingest(task: Task, out: pathlib.Path) -> None:
  part = _read_part(out, task.index)
  ingest.run(
    out, task.index, task.fingerprint, part, _settings(task), task.retry
  )


def _settings(task: Task) -> ingest.Settings:
  config = parse(task.config)
  return ingest.Settings(config.limits, config.max_error_rate, task.processes)


def _measure(task: Task, out: pathlib.Path) -> None:
  measure.run(out, task.index, task.fingerprint, _settings(task), task.retry)


def _score(task: Task, out: pathlib.Path) -> None:
  config = parse(task.config)
  settings = score.Settings(
    score.check(task.score, config.score[task.score]),
    config.limits,
    task.processes,
  )
  score.run(out, task.score, task.index, task.fingerprint, settings)


def _materialise(task: Task, out: pathlib.Path) -> None:
  config = parse(task.config)
  settings = materialise.Settings(
    stage=config.name,
    resolutions=config.resolutions,
    max_enlarge=config.max_enlarge,
    encoding=config.encoding,
    captions=config.captions,
    seed=config.seed,
    limits=config.limits,
    processes=task.processes,
  )
  kept = [bit == "1" for bit in task.kept]
  materialise.run(out, task.index, task.fingerprint, kept, settings)


_VERBS = {
  ingest.FOLDER: _ingest,
  measure.FOLDER: _measure,
  score.FOLDER: _score,
  materialise.FOLDER: _materialise,
}
