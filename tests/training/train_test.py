# SPDX-License-Identifier: Apache-2.0
"""The whole stage: tiny runs, exact resume, bad input, sampling."""

import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import short_runs
from ml_collections import ConfigDict

from experiments import continual, pretrain, sft, vae
from qi2_jax import train
from qi2_jax.errors import InputError
from qi2_jax.flow.generate import Request, SamplingConfig
from qi2_jax.models.condition import Conditioning, Layout
from qi2_jax.models.mmdit import MMDiT, init_params
from qi2_jax.models.vae import init_variables
from qi2_jax.pipeline import Pipeline
from qi2_jax.training import build, checkpoints, steps, vae_loss

STAGES = {
  "vae": vae, "pretrain": pretrain, "continual": continual, "sft": sft,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return short_runs.render(tmp_path_factory.mktemp("data") / "shapes", 48, 24)


def short(stage: str, data: str, **fields) -> ConfigDict:
  """The stage's `tiny` variant, shrunk to a few steps of one shape."""
  fields = {
    "num_steps": 6, "save_every": 2, "log_every": 2, "sampling.steps": 2,
    "sampling.guidance": 2.0, "sampling.batch_size": 4,
  } | fields  # fmt: skip
  if stage == "vae":
    fields = {"latent_stat_batches": 1} | fields
  return short_runs.config(STAGES[stage], data, **fields)


@pytest.fixture(scope="module")
def vae_workdir(data, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("vae"))
  assert train.train(short("vae", data), workdir) == 0
  return workdir


@pytest.mark.parametrize("stage", ["vae", "pretrain"])
def test_resume_is_bit_identical(
  stage, data, vae_workdir, tmp_path, monkeypatch
):
  fields = {} if stage == "vae" else {"vae.path": vae_workdir}
  config = short(stage, data, **fields)
  whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
  assert train.train(config, whole) == 0
  short_runs.train_until(monkeypatch, config, broken, 5)
  # Step 4 was saved, step 5 is lost and trained again.
  assert train.train(config, broken) == 0
  expected = short_runs.assert_same_state(whole, broken)
  assert any("opt_state" in k for k in expected)
  rows = [
    [
      json.loads(line)
      for line in pathlib.Path(w, "metrics.jsonl").read_text().splitlines()
    ]
    for w in (whole, broken)
  ]
  for a, b in zip(*rows, strict=True):
    assert (a["step"], a["loss"]) == (b["step"], b["loss"])


def test_sft_starts_from_pretraining_and_samples(data, vae_workdir, tmp_path):
  first, second = str(tmp_path / "pretrain"), str(tmp_path / "sft")
  fields = {"vae.path": vae_workdir, "num_steps": 2}
  assert train.train(short("pretrain", data, **fields), first) == 0
  fields |= {"init": first, "optimizer.learning_rate": 0.0, "num_steps": 1}
  assert train.train(short("sft", data, **fields), second) == 0
  a, b = Pipeline.load(first), Pipeline.load(second)
  # A learning rate of 0 leaves only the EMA's rounding.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8),
    a.params, b.params,
  )  # fmt: skip
  reference = np.zeros((64, 64, 4), np.uint8)
  requests = [
    Request("a red circle", (), 64, 64, seed=1),
    Request("make the circle blue", (reference,), 64, 64, seed=2),
    Request("a red circle", (), 64, 64, seed=3),
  ]
  config = SamplingConfig(steps=2, guidance=2.0, batch_size=2)
  images = b.generate(requests, config)
  assert [i.shape for i in images] == [(64, 64, 4)] * 3
  assert all(np.isfinite(i).all() for i in images)
  alone = b.generate(requests[2:], config)[0]
  np.testing.assert_allclose(alone, images[2], atol=1e-5)
  assert np.abs(images[0] - images[2]).max() > 1e-3
  with pytest.raises(InputError, match="multiple of 16"):
    b.generate([Request("x", (), 60, 64)], config)


def test_stop_signal_saves_and_continues(data, tmp_path, monkeypatch):
  config = short("vae", data)
  workdir = str(tmp_path / "run")

  original = train.Loader.iterate

  def signalling(self, start_step=0):
    for i, batch in enumerate(original(self, start_step), start_step):
      if i == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(train.Loader, "iterate", signalling)
    assert train.train(config, workdir) == 128 + signal.SIGTERM
  store = checkpoints.CheckpointStore(workdir, read_only=True)
  assert store.latest() == 4
  store.close()
  assert train.train(config, workdir) == 0


def test_nan_stops_the_run(data, tmp_path):
  fields = {"optimizer.learning_rate": 1e30, "max_skipped_steps": 2}
  with pytest.raises(InputError, match="2 steps in a row were not finite"):
    train.train(short("vae", data, **fields), str(tmp_path / "run"))
  (saved,) = (tmp_path / "run").glob("nonfinite_batch_*.npz")
  assert np.load(saved)["image"].shape == (8, 64, 64, 4)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"objective": "magic"}, "config.objective='magic' is unknown"),
    ({"mesh.data": 3}, "does not fill 1 devices"),
    ({"data.path": "/nowhere/data"}, "does not exist"),
    ({"vae.preset": "huge"}, "vae preset 'huge' is unknown"),
    ({"optimizer.schedule": "zigzag"}, "schedule='zigzag' is unknown"),
  ],
)
def test_bad_configs_fail_before_training(fields, message, data, tmp_path):
  with pytest.raises(ValueError, match=message):
    train.train(short("vae", data, **fields), str(tmp_path / "run"))


def test_foreign_workdirs_are_refused(data, vae_workdir, tmp_path):
  with pytest.raises(InputError, match=r"another config \(seed: 0 there"):
    train.train(short("vae", data, seed=1), vae_workdir)
  with pytest.raises(InputError, match="makes no images"):
    Pipeline.load(vae_workdir)
  with pytest.raises(InputError, match="pipeline"):
    Pipeline.load(str(tmp_path))
  with pytest.raises(InputError, match="holds no VAE"):
    build.load_vae(str(tmp_path))
  with pytest.raises(InputError, match="is of another model"):
    train.train(
      short("pretrain", data, **{"vae.path": vae_workdir,
                                 "init": vae_workdir}),
      str(tmp_path / "run"),
    )  # fmt: skip
  # A foreign folder named `vae` is never overwritten.
  mine = tmp_path / "runs" / "vae"
  mine.mkdir(parents=True)
  (mine / "precious.txt").write_text("keep")
  with pytest.raises(InputError, match="in the way"):
    train.train(short("pretrain", data), str(tmp_path / "runs"))
  assert (mine / "precious.txt").read_text() == "keep"
  # A failed start leaves the workdir free for the corrected command.
  with pytest.raises(InputError, match="'huge' is unknown"):
    train.train(
      short("vae", data, **{"vae.preset": "huge"}), str(tmp_path / "again")
    )
  train.prepare_workdir(str(tmp_path / "again"), short("vae", data).to_dict())
  locked = tmp_path / "file"
  locked.write_text("")
  with pytest.raises(InputError, match="cannot write to workdir"):
    train.train(short("vae", data), str(locked / "run"))


def _trace_one_step(config):
  """Traces the loss of a config at its real size, without computing it."""
  key = jax.random.key(0)
  vae = build.new_vae(config.vae)
  if config.objective == "vae":
    loss = vae_loss.plain_l1(vae, smoothing=config.l1_smoothing)
    variables = jax.eval_shape(lambda: init_variables(vae, key))
    params = variables["params"]
    batch = {"image": jnp.zeros((2, 64, 64, vae.config.image_channels))}
  else:
    model = MMDiT(build.mmdit_config(config.model, 64, config.text.width))
    params = jax.eval_shape(lambda: init_params(model, key))
    loss = steps.flow_matching_loss(
      model, logit_mean=0.0, logit_std=1.0,
      shift=build.shift_config(config.flow.shift),
    )  # fmt: skip
    conditioner, _ = build.conditioner(config.text, vae)
    host = conditioner.host("a red circle", (), (64, 64))
    layout = Layout(**jax.tree.map(lambda x: x[None], host["layout"]))
    text = jnp.zeros((1, config.text.length, config.text.width))
    empty = jnp.zeros((1, 0, 64))
    batch = {
      "latents_BNZ": jnp.zeros((1, 16, 64)),
      "condition": Conditioning(text, empty, layout),
    }
  grads = jax.eval_shape(jax.grad(loss, has_aux=True), params, batch, key)[0]
  assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize("stage", STAGES)
def test_every_config_builds(stage):
  module = STAGES[stage]
  names = [
    n for n in ("tiny", "demo", "256", "512", "1024") if n in module.__doc__
  ]
  assert "tiny" in names
  built = 0
  for name in names:
    try:
      config = module.get_config(name)
    except ValueError:
      continue
    built += 1
    build.shift_config(config.flow.shift)
    build.mmdit_config(config.model, 64, config.text.width)
    _trace_one_step(config)
    assert json.loads(json.dumps(config.to_dict()))
  assert built >= 3
  with pytest.raises(ValueError, match="use one of"):
    module.get_config("nonsense")


@pytest.mark.parametrize(
  "process, name", [(0, "quarantine.jsonl"), (3, "quarantine_3.jsonl")]
)
def test_every_process_has_its_own_quarantine_file(
  process, name, data, tmp_path, monkeypatch
):
  monkeypatch.setattr(jax, "process_index", lambda: process)
  config = train.loader_config(
    short("vae", data).data, (data,), str(tmp_path), 0
  )
  assert config.quarantine_path == str(tmp_path / name)


def test_latent_statistics_normalise(vae_workdir, data):
  module, variables = build.load_vae(vae_workdir)
  samples = train.preview_samples(
    train.loader_config(short("vae", data).data, (data,), "/tmp", 0)
  )
  image = np.stack([s["image"] for s in samples])
  latents = module.apply(
    variables, jnp.asarray(image, jnp.float32) / 127.5 - 1, method="encode"
  )
  assert abs(float(latents.mean())) < 0.3
  assert 0.5 < float(latents.std()) < 2.0
