# SPDX-License-Identifier: Apache-2.0
"""A chain of commands that is continued where it was interrupted."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from qi2_jax.errors import InputError
from qi2_jax.evaluation import store

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Phase:
  """One command.

  Attributes:
    name: key in the journal.
    title: for people.
    arguments: of the Python interpreter.
    product: a file that exists only when the phase is complete, for commands
      that refuse to run twice.
  """

  name: str
  title: str
  arguments: tuple[str, ...]
  product: pathlib.Path | None = None

  @property
  def command(self) -> str:
    """As a user would type it."""
    return shlex.join(["python", *self.arguments])


class Journal:
  """phases.json: command, seconds and end of every phase so far."""

  def __init__(self, path: pathlib.Path, phases: Sequence[Phase]):
    """Reads the journal of an earlier run, if there is one.

    Raises:
      InputError: that run was of other commands, or the file is damaged.
    """
    self._path = path
    self.entries: dict[str, dict] = {}
    if path.exists():
      try:
        self.entries = json.loads(path.read_text())
        old = {name: entry["command"] for name, entry in self.entries.items()}
      except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise InputError(
          f"{path} is unreadable ({e}); delete {path.parent} and start again."
        ) from e
      for phase in phases:
        if old.get(phase.name, phase.command) != phase.command:
          raise InputError(
            f"{path.parent} holds a run of other commands "
            f"({old[phase.name]}); use another --workdir, or delete it."
          )

  def add(self, phase: Phase, seconds: float, finished: bool) -> None:
    """Adds time to a phase and says whether it is complete."""
    entry = self.entries.setdefault(
      phase.name, {"command": phase.command, "seconds": 0.0}
    )
    entry["seconds"] = round(entry["seconds"] + seconds, 3)
    entry["finished"] = finished
    store.write_json(self._path, self.entries)

  def is_finished(self, phase: Phase) -> bool:
    """Whether the phase is complete and still has its product."""
    entry = self.entries.get(phase.name, {})
    if phase.product and not phase.product.exists():
      return False
    return bool(entry.get("finished") or (entry and phase.product))

  def seconds(self) -> dict[str, float]:
    """Seconds per phase, interrupted attempts included."""
    return {name: entry["seconds"] for name, entry in self.entries.items()}


def run(phases: Sequence[Phase], journal: Journal) -> int:
  """Runs what is not finished yet, in order.

  Returns:
    0, or the exit status of the phase that failed or was interrupted; the
    reason was printed.
  """
  for number, phase in enumerate(phases, 1):
    label = f"[{number}/{len(phases)}] {phase.title}"
    if journal.is_finished(phase):
      _say(f"{label}: finished earlier, skipped")
      continue
    _say(f"{label}\n  {phase.command}")
    journal.add(phase, 0.0, finished=False)
    start = time.monotonic()
    status, stopped = _call(phase.arguments)
    seconds = time.monotonic() - start
    journal.add(phase, seconds, finished=status == 0)
    if stopped:
      _say("Stopped. Run the same command again to continue from here.")
      return 128 + stopped
    if status:
      _say(
        f"error: phase {phase.name!r} failed with status {status}, its message "
        "is above; repair that and run the same command again to continue."
      )
      return status if status > 0 else 1
    _say(f"{label}: finished in {seconds:.0f} s")
  return 0


def _call(arguments: Sequence[str]) -> tuple[int, int]:
  """Runs Python; returns its exit status and the signal that we received.

  The child gets a process group of its own and exactly one copy of each
  signal. Ctrl-C would otherwise reach it twice, which it takes for impatience
  and exits without saving.
  """
  received: list[int] = []
  process = subprocess.Popen(
    [sys.executable, *arguments], process_group=0, env=_environment()
  )

  def forward(number, _):
    received.append(number)
    process.send_signal(
      signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    )

  previous = {number: signal.signal(number, forward) for number in _SIGNALS}
  try:
    status = process.wait()
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
  return status, received[0] if received else 0


def _environment() -> dict[str, str]:
  """Ours, with huge pages for glibc's malloc unless the user tuned it.

  A CPU training step takes and returns its whole scratch memory; with small
  pages a tenth of its time goes into page faults. Other systems ignore it.
  """
  return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | dict(os.environ)


def _say(text: str) -> None:
  print(f"{os.linesep}{text}" if text.startswith("[") else text, flush=True)
