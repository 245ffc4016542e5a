# SPDX-License-Identifier: Apache-2.0
"""Killed or stopped, then the same command again: not one bit differs.

The slow test interrupts the real program ten times, the fast one the loop on
a toy twice.
"""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import loop_test
import numpy as np
import pytest
import short_runs

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 40
TRIALS = 10
# What depends on the clock.
RATES = {
  "images_per_second", "tokens_per_second", "data_wait_fraction", "eta_seconds",
}  # fmt: skip


def command(workdir) -> list[str]:
  """A tiny pre-training run that saves every 4 steps and logs each one."""
  return [
    sys.executable, "-m", "qi2_jax.train",
    "--config=experiments/pretrain.py:tiny", f"--workdir={workdir}",
    f"--config.num_steps={STEPS}", "--config.save_every=4",
    "--config.log_every=1", "--config.preview_every=0",
    "--config.data.buckets=((64,64),)", "--config.data.batch_size=8",
    "--config.data.rendered_t2i=64", "--config.data.rendered_edits=32",
  ]  # fmt: skip


def start(workdir):
  """Starts the command; its log is read line by line."""
  cache = os.path.join(os.path.dirname(workdir), "cache")
  return subprocess.Popen(
    command(workdir), cwd=ROOT, text=True, stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
  )  # fmt: skip


def interrupt_at(process, step: int, number: int, delay: float) -> None:
  """Sends a signal `delay` seconds after the log shows `step`."""
  log = []
  for line in process.stdout:
    log.append(line)
    found = re.search(r"step (\d+)/", line)
    if found and int(found[1]) >= step:
      time.sleep(delay)
      process.send_signal(number)
      break
  log.append(process.stdout.read())
  # SIGTERM: saved, and a status that tells it from failure.
  expected = -9 if number == signal.SIGKILL else 128 + signal.SIGTERM
  assert process.wait() == expected, "".join(log)


def saved_at_the_end(workdir, step: int) -> tuple[dict, str]:
  """Every array of the final checkpoint by path, and its meta.

  The meta names data and health: batch n is a function of both and n.
  """
  path = pathlib.Path(workdir, "checkpoints", str(step), "meta", "metadata")
  return short_runs.arrays(workdir, step), path.read_text()


def rows(workdir) -> list[dict]:
  """The last row of every step, without what depends on the clock."""
  text = pathlib.Path(workdir, "metrics.jsonl").read_text()
  found = {row["step"]: row for row in map(json.loads, text.splitlines())}
  return [{k: r[k] for k in r.keys() - RATES} for _, r in sorted(found.items())]


def assert_same_runs(whole, broken, num_steps: int) -> None:
  """Parameters, EMA, optimizer, data order and metrics, bit for bit."""
  expected, meta = saved_at_the_end(whole, num_steps)
  actual, other_meta = saved_at_the_end(broken, num_steps)
  assert other_meta == meta
  assert actual.keys() == expected.keys()
  for part in ("params", "ema", "opt_state"):
    assert any(part in name for name in expected)
  for name, value in expected.items():
    assert actual[name].dtype == value.dtype
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
  # Every loss is a function of its batch: equal rows are equal data order.
  assert rows(broken) == rows(whole)
  assert [row["step"] for row in rows(whole)] == list(range(1, num_steps + 1))


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(tmp_path):
  whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
  process = start(whole)
  log, _ = process.communicate(timeout=900)
  assert process.returncode == 0, log
  seed = random.randrange(2**32)
  print(f"seed {seed}")
  generator = random.Random(seed)
  steps = sorted(generator.sample(range(1, STEPS - 8), TRIALS))
  signals = [signal.SIGKILL, signal.SIGTERM] * (TRIALS // 2)
  generator.shuffle(signals)
  for step, number in zip(steps, signals, strict=True):
    # Somewhere in the next step, or while a checkpoint is being written.
    delay = generator.uniform(0.0, 0.1)
    print(f"{number.name} {delay:.3f} s after step {step}")
    interrupt_at(start(broken), step, number, delay)
  process = start(broken)
  log, _ = process.communicate(timeout=900)
  assert process.returncode == 0, log
  assert_same_runs(whole, broken, STEPS)


# The run signals itself while it fetches the batch after step `at`: at 4 and
# 8 the checkpoint of that step has just begun to be written.
TOY = """
import os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import loop_test
workdir, at, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def hook(step):
  if step == at:
    os.kill(os.getpid(), number)
out = loop_test.toy(workdir, hook=hook)
sys.exit(128 + out.stopped if out.stopped else 0)
"""


def test_the_loop_survives_real_signals(tmp_path):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  whole.mkdir()
  broken.mkdir()
  loop_test.toy(whole)
  for at, number, status in (
    (random.randrange(4, 9), signal.SIGKILL, -signal.SIGKILL),
    (random.randrange(8, 11), signal.SIGTERM, 128 + signal.SIGTERM),
    (-1, 0, 0),
  ):
    done = subprocess.run(
      [sys.executable, "-c", TOY, str(broken), str(at), str(int(number))],
      cwd=pathlib.Path(__file__).parent, text=True, capture_output=True,
      env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )  # fmt: skip
    assert done.returncode == status, (at, done.stderr[-3000:])
  assert_same_runs(whole, broken, loop_test.CONFIG.num_steps)
