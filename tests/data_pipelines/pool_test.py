# SPDX-License-Identifier: Apache-2.0
"""Work that crashes, hangs or fails does so alone, and in order."""

import os
import signal
import subprocess
import sys
import time

import pytest

from data_pipelines.engine.pool import Pool
from data_pipelines.sources.items import Unusable

_FOREVER = 600


def behave(how, value=0):
  """A task: returns, raises, dies or hangs."""
  if how == "die":
    os.kill(os.getpid(), signal.SIGSEGV)
  if how == "exit":
    os._exit(3)
  if how == "hang":
    time.sleep(_FOREVER)
  if how == "nap":
    time.sleep(1)
  if how == "refuse":
    raise Unusable("no (reason)")
  if how == "bug":
    raise ZeroDivisionError("bug")
  if how == "die_once" and not os.path.exists(value):
    open(value, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
  return how, value


@pytest.fixture(scope="module")
def pool():
  made = Pool(2)
  yield made
  made.close()


def _shown(results):
  return [str(r) if isinstance(r, Unusable) else r for r in results]


def test_results_come_in_order_and_failures_alone(pool):
  tasks = [("ok", i) for i in range(40)]
  tasks[3] = ("die",)
  tasks[4] = ("exit",)
  tasks[20] = ("hang",)
  tasks[21] = ("refuse",)
  expected = [("ok", i) for i in range(40)]
  expected[3] = "process died (SIGSEGV)"
  expected[4] = "process died (3)"
  expected[20] = "ran out of time (2 s)"
  expected[21] = "no (reason)"
  assert _shown(pool.map(behave, tasks, seconds=2)) == expected


def test_large_values_pass_both_ways(pool):
  values = [("ok", os.urandom(3_000_000)) for _ in range(8)]
  assert list(pool.map(behave, values, seconds=30)) == values


def test_a_death_that_was_an_accident_is_tried_again(pool, tmp_path):
  marker = str(tmp_path / "died")
  tasks = [("die_once", marker), ("ok", 1)]
  assert list(pool.map(behave, tasks, seconds=30)) == tasks


def test_a_bug_is_raised_and_the_pool_goes_on(pool):
  with pytest.raises(RuntimeError, match="ZeroDivisionError: bug"):
    list(pool.map(behave, [("ok", 1), ("bug",), ("ok", 2)], seconds=30))
  assert list(pool.map(behave, [("ok", 3)], seconds=30)) == [("ok", 3)]


def test_few_tasks_are_taken_ahead(pool):
  taken = []

  def tasks():
    yield ("nap",)  # the others overtake it
    for i in range(200):
      taken.append(i)
      yield "ok", i

  results = pool.map(behave, tasks(), seconds=30)
  next(results)
  assert len(taken) <= 20
  results.close()
  assert list(pool.map(behave, [("ok", 1)], seconds=30)) == [("ok", 1)]


def test_no_tasks_no_results(pool):
  assert list(pool.map(behave, [], seconds=1)) == []


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  """Also one that hangs: its own clock ends it."""
  script = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "import pool_test\n"
    "pool = pool_test.Pool(2)\n"
    "tasks = iter([('ok', 1), ('hang',)])\n"
    "results = pool.map(pool_test.behave, tasks, seconds=3)\n"
    "next(results)\n"
    "print(*[p._popen.pid for p in pool._processes], flush=True)\n"
    "next(results)\n"
  )
  parent = subprocess.Popen(
    [sys.executable, "-c", script, os.path.dirname(__file__)],
    stdout=subprocess.PIPE,
    text=True,
  )
  workers = [int(word) for word in parent.stdout.readline().split()]
  assert len(workers) == 2
  parent.kill()
  parent.wait()
  deadline = time.monotonic() + 20
  while any(_is_alive(pid) for pid in workers):
    assert time.monotonic() < deadline, workers
    time.sleep(0.05)


def _is_alive(pid):
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False
