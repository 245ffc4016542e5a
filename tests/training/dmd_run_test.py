# SPDX-License-Identifier: Apache-2.0
"""Whole runs of distillation: what they write, exact resume, LoRA students.

Slow: every run compiles samplers and a step of a dozen forward passes.
"""

import json
import os
import pathlib

import dmd_workdir
import numpy as np
import pytest
import short_runs

from qi2_jax import convert, train
from qi2_jax.errors import InputError
from qi2_jax.pipeline import Pipeline

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return short_runs.render(tmp_path_factory.mktemp("data") / "shapes", 16, 8)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory, one_device):
  """A teacher whose head does not stay at zero."""
  path = tmp_path_factory.mktemp("base") / "pretrain"
  return short_runs.pretrained(path, data, 0.05, **{"data.ti2i": 0.0})


def short(data, base, **fields):
  """Three steps with a preview after each."""
  config = dmd_workdir.config(**fields)
  config.data.path, config.init, config.vae.path = data, base, base
  config.data.ti2i = 0.0
  config.num_steps, config.save_every = 3, 1
  config.preview_every = fields.get("preview_every", 1)
  config.optimizer.learning_rate = 0.01
  return config


@pytest.fixture(scope="module")
def run(data, base, tmp_path_factory):
  path = str(tmp_path_factory.mktemp("dmd") / "run")
  assert train.train(short(data, base), path) == 0
  return path


def test_a_run_writes_what_the_stage_promises(run, base):
  rows = short_runs.metrics(run)
  assert [r["step"] for r in rows] == [1, 2, 3]
  names = {"loss", "fake_loss", "grad_norm", "fake_grad_norm", "gap_0", "gap_4"}
  assert names <= rows[-1].keys()
  assert all(np.isfinite(list(r.values())).all() for r in rows)
  assert len(list(pathlib.Path(run, "samples").glob("*.png"))) == 3
  arrays = short_runs.arrays(run)
  for part in ("params", "ema", "opt_state", "fake", "fake_opt_state"):
    moved = [v for k, v in arrays.items() if k.startswith(f"['{part}']")]
    assert any(np.any(v) for v in moved) and len(moved) > 10
  counts = [int(v) for k, v in arrays.items() if k.endswith("['count']")]
  assert set(counts) == {3}
  (record,) = json.loads(pathlib.Path(run, "teachers.json").read_text())
  assert record["path"] == base and record["step"] == 2


def test_the_best_weights_are_a_workdir(run):
  folder = os.path.join(run, "best")
  record = json.loads(pathlib.Path(folder, "best.json").read_text())
  kept = os.listdir(os.path.join(folder, "checkpoints"))
  assert kept == [str(record["step"])]
  for path in (folder, run):
    pipeline = Pipeline.load(path)
    assert pipeline.sampling.sigmas == dmd_workdir.SIGMAS
    assert pipeline.sampling.shift is None and pipeline.sampling.guidance == 1
  (image,) = pipeline(["a red circle"], height=64, width=64)
  assert image.shape == (64, 64, 4)
  with pytest.raises(InputError, match="its own 4 noise levels"):
    pipeline.sampling_with(steps=8)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_resume_is_bit_identical(
  lora_rank, data, base, run, tmp_path, monkeypatch
):
  """Both models, both optimizers, the running gaps."""
  fields = {"lora.rank": lora_rank, "preview_every": 0}
  whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
  config = short(data, base, **fields)
  if lora_rank:
    assert train.train(config, whole) == 0
  else:
    whole = run
  short_runs.train_until(monkeypatch, config, broken, 2)
  if not lora_rank:
    config = short(data, base)
    pathlib.Path(broken, "config.json").write_text(config.to_json())
  assert train.train(config, broken) == 0
  short_runs.assert_same_state(whole, broken)
  if lora_rank:
    check_adapter(base, whole, tmp_path)


def test_a_run_with_a_gan_head_resumes_bit_identically(
  data, base, tmp_path, monkeypatch
):
  config = dmd_workdir.config(
    **{"dmd.gan.weight": 0.1, "preview_every": 0, "dmd.held_out_prompts": ()}
  )
  config.data.path, config.init, config.vae.path = data, base, base
  config.data.ti2i = 0.0
  config.num_steps, config.save_every = 3, 1
  whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
  assert train.train(config, whole) == 0
  rows = short_runs.metrics(whole)
  names = {"d_loss", "gan_loss", "d_real", "d_fake", "d_real_accuracy"}
  assert names | {"loss", "fake_loss"} <= rows[-1].keys()
  assert all(np.isfinite(list(r.values())).all() for r in rows)
  assert rows[0]["d_loss"] == pytest.approx(2 * np.log(2), rel=1e-4)
  assert rows[-1]["d_loss"] != rows[0]["d_loss"]
  short_runs.train_until(monkeypatch, config, broken, 2)
  assert train.train(config, broken) == 0
  expected = short_runs.assert_same_state(whole, broken)
  heads = [n for n in expected if "['head']" in n]
  assert len(heads) == 3 * 4 and any(np.any(expected[n]) for n in heads)


def check_adapter(base, run, tmp_path):
  """The LoRA student as an adapter makes the image of its run."""
  path = str(tmp_path / "student.safetensors")
  convert.export_model(run, path)
  student = Pipeline.load(run)
  merged = Pipeline.load(base).with_loras([path])
  kernel = ("blocks", "mlp", "out", "kernel")
  trees = (p.params for p in (student, merged, Pipeline.load(base)))
  ours, theirs, before = (tree_at(tree, kernel) for tree in trees)
  np.testing.assert_allclose(theirs, ours, atol=1e-6)
  assert np.abs(np.asarray(ours) - before).max() > 1e-5
  names = [n for n in short_runs.arrays(run) if n.startswith("['params']")]
  assert names and all(n.endswith(("['a']", "['b']")) for n in names)


def tree_at(tree, names):
  for name in names:
    tree = tree[name]
  return tree
