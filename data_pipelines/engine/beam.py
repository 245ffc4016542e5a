# SPDX-License-Identifier: Apache-2.0
"""Apache Beam: which machine works on which shard.

Elements are descriptions of shards; pixels never are, because the local
runner keeps all elements in memory. Outcomes are files: a shard's marker, or
a note beside it that says why there is none.
"""

import contextlib
import logging
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_pipelines.engine import shards
from data_pipelines.errors import InputError

_POLL_SECONDS = 2.0
_FAILED = ".failed.json"
# What ended the program, for as long as Beam does not know of it.
_ended: list[BaseException] = []


def execute(
  label: str,
  folder: pathlib.Path,
  function: Callable[[dict[str, Any]], None],
  tasks: Sequence[dict[str, Any]],
  runner: str,
  arguments: Sequence[str],
) -> None:
  """Calls `function` once for every task; its shards lie in `folder`.

  Args:
    label: of the verb, for people.
    folder: of the verb.
    function: of a module, so that Beam can send it elsewhere; raises
      InputError where the shard cannot be made.
    tasks: plain JSON with the number of the shard in 'index'.
    runner: name of a Beam runner.
    arguments: command-line arguments of Beam.

  Raises:
    InputError: a shard could not be made; the others were finished.
  """
  for note in folder.glob(f"*{_FAILED}"):
    note.unlink()
  beam, options = _load(runner, arguments)
  progress = _progress(label, folder, tasks)
  try:
    with progress, beam.Pipeline(options=options) as pipeline:
      _ = (
        pipeline
        | "shards" >> beam.Create(list(tasks))
        | "spread" >> beam.Reshuffle()
        | label >> beam.Map(_Guarded(function, str(folder)))
      )
  except Exception as error:
    # Beam wraps what ends a program, such as Ctrl-C, in its own error.
    raise (_interruption(error) or error) from None
  if _ended:
    raise _ended.pop()
  notes = sorted(folder.glob(f"*{_FAILED}"))
  if notes:
    more = f" ({len(notes) - 1} more shards failed)" if len(notes) > 1 else ""
    raise InputError(notes[0].read_text(encoding="utf-8").strip() + more)


def _interruption(
  error: BaseException | None,
) -> KeyboardInterrupt | SystemExit | None:
  """The end of the program that an error was made of, if it was."""
  while error is not None:
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
      return error
    error = error.__cause__ or error.__context__
  return None


class _Guarded:
  """A function whose InputErrors become notes, so that others go on."""

  def __init__(self, function: Callable, folder: str):
    self._function = function
    self._folder = folder

  def __call__(self, task: dict[str, Any]) -> None:
    if _ended:
      return
    try:
      self._function(task)
    except InputError as error:
      folder = pathlib.Path(self._folder)
      folder.mkdir(parents=True, exist_ok=True)
      note = folder / f"{shards.name(task['index'])}{_FAILED}"
      # Beam would try again, print pages, and end the other shards.
      note.write_text(f"{error}\n", encoding="utf-8")
    except (KeyboardInterrupt, SystemExit) as error:
      _ended.append(error)  # Beam would print pages about it


def _load(runner: str, arguments: Sequence[str]):
  """Beam takes seconds to import, and a finished stage does not need it."""
  with _quiet():
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  try:
    options = PipelineOptions([f"--runner={runner}", *arguments])
  except SystemExit as error:  # argparse has printed what is wrong
    raise InputError(
      f"Apache Beam does not understand {list(arguments)}; see above."
    ) from error
  return beam, options


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Drops warnings about Google Cloud extras that are not needed."""
  logging.disable(logging.WARNING)
  try:
    yield
  finally:
    logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _progress(
  label: str, folder: pathlib.Path, tasks: Sequence[dict[str, Any]]
) -> Iterator[None]:
  """A line with the rate whenever shards were finished."""
  waiting = {shards.name(task["index"]) for task in tasks}
  total, start = len(waiting), time.time()
  state = {"items": 0, "left": total}

  def look() -> None:
    for stem in sorted(waiting):
      marker = shards.marker_path(folder, stem)
      if marker.exists() and marker.stat().st_mtime >= start - 1:
        counts = (shards.read_marker(folder, stem) or {}).get("counts", {})
        state["items"] += sum(n for n in counts.values() if isinstance(n, int))
        waiting.discard(stem)
    if len(waiting) < state["left"]:
      state["left"] = len(waiting)
      rate = state["items"] / max(time.time() - start, 1e-6)
      line = (
        f"{label}: {total - len(waiting)}/{total} shards, "
        f"{state['items']} items, {rate:.0f}/s"
      )
      print(line, file=sys.stderr, flush=True)

  stop = threading.Event()

  def watch() -> None:
    while not stop.wait(_POLL_SECONDS):
      look()

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    stop.set()
    thread.join()
    look()
