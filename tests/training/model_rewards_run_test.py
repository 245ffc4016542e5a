# SPDX-License-Identifier: Apache-2.0
"""A run of Flow-GRPO on the rewards with models, all of random weights.

Slow: it compiles samplers and updates of both tasks.
"""

import json
import pathlib

import numpy as np
import pytest
import short_runs

from experiments import flow_grpo
from qi2_jax import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]
pytest.importorskip("torch")
folders = pytest.importorskip("image_text_folders")
REWARDS = ("clip", "aesthetic", "ocr", "consistency")


def test_models_judge_a_run(tmp_path, one_device, caplog):
  data = short_runs.render(tmp_path / "shapes", 32, 32)
  base = short_runs.pretrained(tmp_path / "base", data, 0.005)
  folders.clip(tmp_path / "clip")
  config = flow_grpo.get_config("smoke")
  config.data.path, config.init, config.vae.path = data, base, base
  config.preview_every = 0
  config.rewards.use = REWARDS
  models = config.rewards.models
  models.clip.path = models.aesthetic.path = str(tmp_path / "clip")
  models.aesthetic.head = models.consistency.path = "random"
  models.ocr.reader = "shapes"
  workdir = str(tmp_path / "run")
  assert train.train(config, workdir) == 0
  said = caplog.text
  assert "AESTHETIC HEAD HAS RANDOM WEIGHTS" in said
  assert "DINOv2 RUNS WITH RANDOM FEATURES" in said
  text = pathlib.Path(workdir, "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  assert len(rows) == config.num_steps
  for row in rows:
    assert row["failed_rewards"] == 0 and row["grad_norm"] > 0
    assert row["rollout_gap"] < 1e-6
    values = np.asarray([row[f"reward_{name}"] for name in REWARDS])
    assert np.isfinite(values).all()
    assert abs(row["reward_clip"]) <= 1 and 0 <= row["reward_ocr"] <= 1
  assert len({row["reward_clip"] for row in rows}) > 1
  # Edits have a source to be consistent with, the others count as 0.
  assert max(abs(row["reward_consistency"]) for row in rows) > 0
