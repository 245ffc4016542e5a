# SPDX-License-Identifier: Apache-2.0
"""Killed or stopped ten times, then the same command: not one bit differs."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

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


def interrupt_at(process, step: int, number: int) -> None:
  """Sends a signal as soon as the log shows `step`."""
  log = []
  for line in process.stdout:
    log.append(line)
    found = re.search(r"step (\d+)/", line)
    if found and int(found[1]) >= step:
      process.send_signal(number)
      break
  log.append(process.stdout.read())
  # SIGTERM: saved, and a status that tells it from failure.
  expected = -9 if number == signal.SIGKILL else 128 + signal.SIGTERM
  assert process.wait() == expected, "".join(log)


def arrays(workdir) -> dict[str, np.ndarray]:
  """Every array of the final checkpoint, by path."""
  path = os.path.abspath(f"{workdir}/checkpoints/{STEPS}/state")
  with ocp.PyTreeCheckpointer() as reader:
    leaves = jax.tree_util.tree_leaves_with_path(reader.restore(path))
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}


def rows(workdir) -> list[dict]:
  """Rows of metrics.jsonl without what depends on the clock."""
  text = pathlib.Path(workdir, "metrics.jsonl").read_text()
  found = [json.loads(line) for line in text.splitlines()]
  return [{k: row[k] for k in row.keys() - RATES} for row in found]


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(tmp_path):
  whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
  process = start(whole)
  log, _ = process.communicate(timeout=900)
  assert process.returncode == 0, log
  seed = random.randrange(2**32)
  print(f"seed {seed}")
  generator = random.Random(seed)
  steps = sorted(generator.sample(range(1, STEPS - 4), TRIALS))
  signals = [signal.SIGKILL, signal.SIGTERM] * (TRIALS // 2)
  generator.shuffle(signals)
  for step, number in zip(steps, signals, strict=True):
    print(f"{number.name} at step {step}")
    interrupt_at(start(broken), step, number)
  process = start(broken)
  log, _ = process.communicate(timeout=900)
  assert process.returncode == 0, log
  expected, actual = arrays(whole), arrays(broken)
  assert expected.keys() == actual.keys()
  for part in ("params", "ema", "opt_state"):
    assert any(part in name for name in expected)
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
  # Every loss is a function of its batch: equal rows are equal data order.
  assert rows(broken) == rows(whole)
  assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
