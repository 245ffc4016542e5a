# SPDX-License-Identifier: Apache-2.0
"""A whole run with the GAN head, and its exact resume. Slow, and tiny."""

import json
import pathlib

import dmd_workdir
import numpy as np
import pytest
import short_runs

from qi2_jax import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return short_runs.render(tmp_path_factory.mktemp("data") / "shapes", 16, 8)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory, one_device):
  path = tmp_path_factory.mktemp("base") / "pretrain"
  return short_runs.pretrained(path, data, 0.05, **{"data.ti2i": 0.0})


class Killed(Exception):
  """Stands for a power cut."""


def test_a_run_with_the_head_resumes_bit_identically(
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
  rows = [
    json.loads(line)
    for line in pathlib.Path(whole, "metrics.jsonl").read_text().splitlines()
  ]
  names = {"d_loss", "gan_loss", "d_real", "d_fake", "d_real_accuracy"}
  assert names | {"loss", "fake_loss"} <= rows[-1].keys()
  assert all(np.isfinite(list(r.values())).all() for r in rows)
  assert rows[0]["d_loss"] == pytest.approx(2 * np.log(2), rel=1e-4)
  assert rows[-1]["d_loss"] != rows[0]["d_loss"]
  original = train.Loader.iterate

  def dying(self, start_step=0):
    for i, batch in enumerate(original(self, start_step), start_step):
      if i == 2:
        raise Killed
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(train.Loader, "iterate", dying)
    with pytest.raises(Killed):
      train.train(config, broken)
  assert train.train(config, broken) == 0
  expected, actual = short_runs.arrays(whole), short_runs.arrays(broken)
  assert expected.keys() == actual.keys()
  heads = [n for n in expected if "['head']" in n]
  assert len(heads) == 3 * 4 and any(np.any(expected[n]) for n in heads)
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
