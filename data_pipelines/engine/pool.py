# SPDX-License-Identifier: Apache-2.0
"""Processes for work that may crash or hang.

`concurrent.futures` gives up the whole pool when one process dies and cannot
end a task that hangs; `multiprocessing` waits forever for a dead one. Here
such a task fails alone, and its process is replaced.
"""

import atexit
import collections
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from typing import Any

from data_pipelines.sources.items import Unusable

# Tasks per process ahead of the results: others go on behind a slow one.
_AHEAD = 8


class _Process:
  """One worker process and the task it has."""

  def __init__(self):
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    self._popen = subprocess.Popen(
      [sys.executable, "-m", "data_pipelines.engine.worker", str(fd)],
      pass_fds=[fd],
      stdin=subprocess.DEVNULL,
      env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    theirs.close()
    self.connection = connection.Connection(ours.detach())
    self.task: tuple[int, tuple] | None = None  # number, arguments
    self.deaths = 0  # of processes that had this task

  def send(self, function: Callable, seconds: float) -> None:
    # If it died while idle, the wait for its answer says so.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
      self.connection.send((function, self.task[1], seconds))

  def kill(self) -> None:
    """Ends the process whatever it is doing."""
    self._popen.kill()
    self.end()

  def end(self) -> int:
    """Closes an idle or dead process; returns its exit status."""
    self.connection.close()
    try:
      return self._popen.wait(timeout=5)
    except subprocess.TimeoutExpired:
      self._popen.kill()
      return self._popen.wait()


class Pool:
  """Worker processes; `close` ends them."""

  def __init__(self, processes: int):
    """Starts nothing yet.

    Args:
      processes: at least 1.
    """
    self._count = processes
    self._processes: list[_Process] = []

  def map(
    self,
    function: Callable,
    arguments: Iterable[tuple],
    seconds: float,
  ) -> Iterator[Any]:
    """Calls `function(*a)` for each `a`; results come in order.

    A few tasks per process are taken from `arguments` ahead of the results,
    which bounds memory.

    Args:
      function: of a module, so that it can be pickled.
      arguments: one tuple per task.
      seconds: wall time of a task, after which its process is killed.

    Yields:
      The result, or the Unusable that it raised or that says how the process
      ended.

    Raises:
      Exception: what `function` raised, if it is anything else.
    """
    tasks = enumerate(arguments)
    done: dict[int, Any] = {}
    given = taken = 0
    idle = collections.deque(self._ready())
    busy: list[_Process] = []
    try:
      while True:
        while idle and taken - given < _AHEAD * self._count:
          task = next(tasks, None)
          if task is None:
            break
          taken += 1
          process = idle.popleft()
          process.task, process.deaths = task, 0
          process.send(function, seconds)
          busy.append(process)
        # A process that has just finished gets work before the caller does.
        if busy and self._collect(
          function, seconds, busy, idle, done, wait=given not in done
        ):
          continue
        if given not in done:
          return
        yield done.pop(given)
        given += 1
    finally:
      for process in busy:  # the caller gave up
        self._processes.remove(process)
        process.kill()

  def _collect(self, function, seconds, busy, idle, done, wait) -> bool:
    """Takes the answers that are there; whether there was any."""
    answers = connection.wait([p.connection for p in busy], None if wait else 0)
    for ready in answers:
      process = next(p for p in busy if p.connection is ready)
      try:
        fine, answer = ready.recv()
      except (EOFError, OSError):
        process, answer = self._replace(process, function, seconds, busy)
        fine = False
        if answer is None:
          continue  # it is tried again
      busy.remove(process)
      idle.append(process)
      if not fine and not isinstance(answer, Unusable):
        raise answer
      done[process.task[0]] = answer
    return bool(answers)

  def _replace(self, process, function, seconds, busy):
    """Puts a new process in the place of a dead one.

    A task that was killed by anything but its own clock is tried once more:
    memory may have been short because of something else.
    """
    status = process.end()
    fresh = _Process()
    fresh.task, fresh.deaths = process.task, process.deaths + 1
    self._processes[self._processes.index(process)] = fresh
    busy[busy.index(process)] = fresh
    if status == -signal.SIGALRM:
      return fresh, Unusable(f"ran out of time ({seconds:g} s)")
    if fresh.deaths > 1:
      name = signal.Signals(-status).name if status < 0 else str(status)
      return fresh, Unusable(f"process died ({name})")
    fresh.send(function, seconds)
    return fresh, None

  def _ready(self) -> list[_Process]:
    while len(self._processes) < self._count:
      self._processes.append(_Process())
    return list(self._processes)

  def close(self) -> None:
    """Ends the processes."""
    for process in self._processes:
      process.end()
    self._processes.clear()


@functools.cache
def shared(processes: int) -> Pool:
  """The pool of this process, kept between shards."""
  pool = Pool(processes or os.cpu_count() or 1)
  atexit.register(pool.close)
  return pool
