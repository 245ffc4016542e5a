# SPDX-License-Identifier: Apache-2.0
"""kill -9 at a random step, then the same command: not one bit differs."""

import os
import pathlib
import random
import re
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24


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


def kill_at(process, step: int) -> None:
  """Sends SIGKILL as soon as the log shows `step`."""
  for line in process.stdout:
    found = re.search(r"step (\d+)/", line)
    if found and int(found[1]) >= step:
      process.kill()
      break
  assert process.wait() == -9


def arrays(workdir) -> dict[str, np.ndarray]:
  """Every array of the final checkpoint, by path."""
  path = os.path.abspath(f"{workdir}/checkpoints/{STEPS}/state")
  with ocp.PyTreeCheckpointer() as reader:
    leaves = jax.tree_util.tree_leaves_with_path(reader.restore(path))
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(tmp_path):
  whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
  process = start(whole)
  log, _ = process.communicate(timeout=600)
  assert process.returncode == 0, log
  generator = random.Random()
  for step in sorted(generator.sample(range(1, STEPS), 3)):
    kill_at(start(broken), step)
  process = start(broken)
  log, _ = process.communicate(timeout=600)
  assert process.returncode == 0, log
  expected, actual = arrays(whole), arrays(broken)
  assert expected.keys() == actual.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
  metrics = [pathlib.Path(w, "metrics.jsonl") for w in (whole, broken)]
  losses = [re.findall(r'"loss": ([^,]+)', m.read_text()) for m in metrics]
  assert losses[0] == losses[1]
  assert len(losses[0]) == STEPS
