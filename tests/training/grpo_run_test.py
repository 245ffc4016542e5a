# SPDX-License-Identifier: Apache-2.0
"""Whole runs of Flow-GRPO: killed in a rollout, a LoRA on edits.

Slow: every run compiles a sampler and an update. Rewards are made up, for a
model that knows nothing fulfils no rule.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import short_runs

from experiments import flow_grpo
from qi2_jax import train
from qi2_jax.pipeline import Pipeline

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]
ROOT = pathlib.Path(__file__).parents[2]
STEPS = 4

# Two rewards, two candidates per prompt, two parts of a batch: the reward of
# call 6 is that of the second part of the third rollout.
PROGRAM = """
import os, signal, sys, time
import numpy as np
from experiments import flow_grpo
from qi2_jax import train

workdir, base, data, last = *sys.argv[1:4], int(sys.argv[4])
calls = 0

def bright(images, prompts, references):
  global calls
  calls += 1
  if calls == last:
    # Checkpoints are written in the background.
    while not os.path.isdir(workdir + "/checkpoints/2"):
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
  return {"bright": np.asarray([float(i.mean()) for i in images])}

def red(images, prompts, references):
  reds = [float(i[..., 0].mean()) for i in images]
  return {"red": np.asarray(reds) * [len(p.text) > 14 for p in prompts]}

train.judging.arguments = lambda config: {
  "rewards": {"bright": bright, "red": red}
}
config = flow_grpo.get_config("smoke")
config.data.path, config.init, config.vae.path = data, base, base
config.data.batch_size, config.data.ti2i = 8, 0.0
config.rl.candidates, config.rl.updates, config.rl.clip = 2, 2, 1e-3
config.rewards.use = ("bright", "red")
config.rewards.weights.default = {"bright": 1.0, "red": 0.5}
config.rewards.adapt_rate, config.rewards.threads = 0.2, 1
config.preview_every, config.optimizer.learning_rate = 0, 1e-3
sys.exit(train.train(config, workdir))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return short_runs.render(tmp_path_factory.mktemp("data") / "shapes", 32, 16)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory, one_device):
  """A model whose head does not stay at zero."""
  path = tmp_path_factory.mktemp("base") / "pretrain"
  return short_runs.pretrained(path, data, 0.005)


def saved(workdir, step=STEPS):
  """Every array of a checkpoint by path, and what the task recorded."""
  folder = pathlib.Path(workdir) / "checkpoints" / str(step)
  meta = json.loads((folder / "meta" / "metadata").read_text())
  return short_runs.arrays(workdir, step), meta


def run_program(workdir, base, data, last, cache):
  return subprocess.run(
    [sys.executable, "-c", PROGRAM, workdir, base, data, str(last)],
    cwd=ROOT, text=True, capture_output=True,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
  )  # fmt: skip


def test_killed_in_a_rollout_it_ends_the_same(data, base, tmp_path):
  whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
  for workdir, last, code in (
    (whole, -1, 0), (broken, 6, -signal.SIGKILL), (broken, -1, 0),
  ):  # fmt: skip
    done = run_program(workdir, base, data, last, tmp_path / "cache")
    assert done.returncode == code, done.stderr[-2000:]
    kept = os.listdir(f"{workdir}/checkpoints")
    # It died with the update of step 2 saved and that of step 3 not made.
    assert (str(STEPS) in kept) == (code == 0) and "2" in kept
  (ours, meta), (theirs, other) = saved(whole), saved(broken)
  assert other["task"] == meta["task"]
  assert meta["task"]["rewards"]["factors"]["red"] != 1.0
  assert len(meta["task"]["prompts"]) > 4
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(theirs[name], value, err_msg=name)
  before, _ = saved(base, 2)
  moved = [k for k in ours if k.startswith("['params']")]
  assert any(not np.array_equal(before[k], ours[k]) for k in moved)


def test_a_lora_learns_edits_by_the_real_rewards(data, base, tmp_path):
  config = flow_grpo.get_config("smoke")
  config.data.path, config.init, config.vae.path = data, base, base
  config.data.t2i, config.data.ti2i = 0.0, 1.0
  config.lora.rank, config.num_steps, config.preview_every = 2, 2, 2
  config.rl.kl_weight = 0.1
  config.rewards.use = ("rules", "background")
  config.rewards.weights.default = {"rules": 1.0, "background": 1.0}
  workdir = str(tmp_path / "run")
  assert train.train(config, workdir) == 0
  text = pathlib.Path(workdir, "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  assert [r["step"] for r in rows] == [1, 2]
  for row in rows:
    assert row["rollout_gap"] < 1e-6 and row["grad_norm"] > 0
    assert 5 < row["reward_background"] < 50 and row["failed_rewards"] == 0
  # At the start a LoRA is its reference.
  assert rows[0]["kl"] < 1e-9
  arrays, _ = saved(workdir, 2)
  assert all(k.endswith(("['a']", "['b']")) for k in arrays if "params" in k)
  assert list(pathlib.Path(workdir, "samples").glob("*.png"))
  (image,) = Pipeline.load(workdir)(["a red circle"], height=64, width=64)
  assert image.shape[:2] == (64, 64)
