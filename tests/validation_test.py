# SPDX-License-Identifier: Apache-2.0
"""Held-out loss during training, from the command line's own function."""

import json

import pytest
from tiny_models import relative

from data_pipelines.shapes.generate import Options, generate
from experiments import pretrain
from qi2_jax import train
from qi2_jax.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Held-out shapes of two of the run's buckets."""
  path = str(tmp_path_factory.mktemp("data") / "held_out")
  generate(path, Options(t2i=24, edits=8, sizes=((64, 64),), seed=5), workers=1)
  return path


def config(path, **fields):
  made = pretrain.get_config("tiny")
  made.num_steps = 4
  made.data.batch_size = 8
  made.data.buckets = ((64, 64),)
  made.data.rendered_t2i, made.data.rendered_edits = 16, 8
  made.save_every = made.preview_every = 0
  made.validation.update({"path": path, "every": 2, "batches": 3})
  with made.unlocked():
    made.update_from_flattened_dict(fields)
  return made


def held_out(workdir):
  rows = [json.loads(r) for r in (workdir / "metrics.jsonl").open()]
  return {
    r["step"]: r["held_out_loss"] for r in rows if "held_out_loss" in r
  }  # fmt: skip


def test_the_same_rows_and_noise_every_time(tmp_path, data):
  """Without learning the value stays; with it, it moves."""
  still = {"optimizer.learning_rate": 0.0, "optimizer.weight_decay": 0.0}
  assert train.train(config(data, **still), str(tmp_path / "still")) == 0
  first, second = held_out(tmp_path / "still").values()
  assert first == second > 0.5
  assert train.train(config(data), str(tmp_path / "moving")) == 0
  moved = held_out(tmp_path / "moving")
  assert list(moved) == [2, 4]
  assert relative(moved[4], moved[2]) > 1e-4


def test_without_held_out_data_there_is_no_row(tmp_path):
  assert train.train(config(""), str(tmp_path)) == 0
  rows = [json.loads(r) for r in (tmp_path / "metrics.jsonl").open()]
  assert rows and all("loss" in row for row in rows)


def test_an_objective_without_such_a_loss_is_refused(tmp_path, data):
  bad = config(data)
  bad.objective = "vae"
  with bad.unlocked():
    bad.l1_smoothing, bad.latent_stat_batches = 0.3, 1
  with pytest.raises(InputError, match="no held-out loss"):
    train.train(bad, str(tmp_path / "bad"))
