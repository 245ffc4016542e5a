# SPDX-License-Identifier: Apache-2.0
"""Phases run once, continue where they stopped, and report failures."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from qi2_jax.errors import InputError
from qi2_jax.phases import Journal, Phase, run

ROOT = pathlib.Path(__file__).parent.parent


def _phase(name, code, **more):
  return Phase(name, name, ("-c", code), **more)


def _append(path, text):
  return f"open({str(path)!r}, 'a').write({text!r})"


def _go(folder, phases):
  return run(phases, Journal(folder / "phases.json", phases))


def test_runs_in_order_and_never_twice(tmp_path):
  log = tmp_path / "log"
  phases = [_phase(name, _append(log, name)) for name in "ab"]
  assert _go(tmp_path, phases) == 0
  assert _go(tmp_path, phases) == 0
  assert log.read_text() == "ab"
  journal = Journal(tmp_path / "phases.json", phases)
  assert journal.seconds().keys() == {"a", "b"}
  assert all(s > 0 for s in journal.seconds().values())


def test_failure_stops_the_chain_and_is_repaired_by_running_again(
  tmp_path, capfd
):
  log, switch = tmp_path / "log", tmp_path / "switch"
  fails = (
    f"import os, sys; sys.exit(0 if os.path.exists({str(switch)!r}) else 3)"
  )
  phases = [
    _phase("a", _append(log, "a")),
    _phase("b", fails),
    _phase("c", _append(log, "c")),
  ]
  assert _go(tmp_path, phases) == 3
  assert "phase 'b' failed with status 3" in capfd.readouterr().out
  assert log.read_text() == "a"
  switch.touch()
  assert _go(tmp_path, phases) == 0
  assert log.read_text() == "ac"


def test_complete_product_of_an_interrupted_phase_counts(tmp_path):
  product = tmp_path / "product"
  once = f"open({str(product)!r}, 'x')"  # refuses to run twice
  phases = [_phase("a", once, product=product)]
  journal = Journal(tmp_path / "phases.json", phases)
  journal.add(phases[0], 1.0, finished=False)
  product.touch()
  assert run(phases, journal) == 0
  product.unlink()  # deleted by hand: made again
  assert _go(tmp_path, phases) == 0 and product.exists()


def test_other_commands_in_the_same_folder_are_refused(tmp_path):
  assert _go(tmp_path, [_phase("a", "pass")]) == 0
  with pytest.raises(InputError, match="other commands"):
    _go(tmp_path, [_phase("a", "1")])


def test_damaged_journal_is_named(tmp_path):
  (tmp_path / "phases.json").write_text("{")
  with pytest.raises(InputError, match="unreadable"):
    _go(tmp_path, [_phase("a", "pass")])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_child_gets_one_signal_and_time_to_save(tmp_path, number):
  """As `train` does: the first signal saves, a second would kill."""
  child = f"""
import signal, sys, time
got = []
for n in (signal.SIGINT, signal.SIGTERM):
  signal.signal(n, lambda n, _: got.append(n))
open({str(tmp_path / "ready")!r}, "w")
while not got: time.sleep(0.01)
time.sleep(0.3)
open({str(tmp_path / "saved")!r}, "w").write(str(got))
sys.exit(128 + got[0])
"""
  parent = f"""
import pathlib, sys
from qi2_jax.phases import Journal, Phase, run
phases = [Phase("a", "a", ("-c", {child!r})), Phase("b", "b", ("-c", "1/0"))]
sys.exit(run(phases, Journal(pathlib.Path({str(tmp_path / "phases.json")!r}),
                             phases)))
"""
  process = subprocess.Popen(
    [sys.executable, "-c", parent], cwd=ROOT, process_group=0, text=True,
    stdout=subprocess.PIPE,
  )  # fmt: skip
  deadline = time.monotonic() + 30
  while not (tmp_path / "ready").exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
  os.killpg(process.pid, number)  # what a terminal does
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 128 + number
  assert "Run the same command again" in out
  assert (tmp_path / "saved").read_text() == f"[{int(number)}]"
  entry = json.loads((tmp_path / "phases.json").read_text())["a"]
  assert entry["finished"] is False and entry["seconds"] > 0.2
