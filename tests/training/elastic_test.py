# SPDX-License-Identifier: Apache-2.0
"""A run goes on with another mesh: same parameters, same losses."""

import json
import os
import signal

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.shapes.generate import Options, generate
from experiments import pretrain
from qi2_jax import train
from qi2_jax.training import loop

FIRST, ALL = 2, 4
ITERATE = train.Loader.iterate


def config_for(folder: str, num_steps: int, **mesh) -> ConfigDict:
  config = pretrain.get_config("tiny")
  config.mesh = ConfigDict(dict(data=1, fsdp=1, seq=1, tensor=1) | mesh)
  config.data.path = folder
  config.data.buckets = ((64, 64),)
  config.data.batch_size = 8
  config.num_steps = num_steps
  config.log_every, config.save_every, config.preview_every = 1, FIRST, 0
  config.optimizer.warmup_steps = 0
  return config


def losses(workdir) -> list[float]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["loss"] for line in lines]


def test_data_8_goes_on_as_data_2_fsdp_4(tmp_path, monkeypatch):
  data = str(tmp_path / "data")
  generate(data, Options(t2i=32, edits=16, sizes=((64, 64),)), workers=1)
  before, after = [], []
  original = loop.run

  def spying(state, *args, **kwargs):
    before.append(jax.tree.map(np.asarray, state))
    specs = {str(x.sharding.spec) for x in jax.tree.leaves(state.params)}
    sizes = dict(kwargs["mesh"].shape)
    assert any("fsdp" in s for s in specs) and sizes["data"] in (2, 8)
    final, stopped = original(state, *args, **kwargs)
    after.append(jax.tree.map(np.asarray, final))
    return final, stopped

  monkeypatch.setattr(loop, "run", spying)
  whole, moved = tmp_path / "whole", tmp_path / "moved"
  assert train.train(config_for(data, ALL, data=8), str(whole)) == 0
  stop_after(monkeypatch, FIRST)
  stopped = train.train(config_for(data, ALL, data=8), str(moved))
  assert stopped == 128 + signal.SIGTERM
  monkeypatch.setattr(train.Loader, "iterate", ITERATE)
  other = config_for(data, ALL, data=2, fsdp=4)
  assert train.train(other, str(moved)) == 0
  jax.tree.map(np.testing.assert_array_equal, before[2], after[1])
  np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-5)
  assert len(losses(moved)) == ALL
  assert losses(whole)[FIRST] != losses(whole)[0]


def stop_after(monkeypatch, step: int) -> None:
  """SIGTERM while the batch of the step before is made."""

  def signalling(self, start_step=0):
    for i, batch in enumerate(ITERATE(self, start_step), start_step):
      if i == step - 1:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  monkeypatch.setattr(train.Loader, "iterate", signalling)
