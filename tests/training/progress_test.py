# SPDX-License-Identifier: Apache-2.0
"""Rates, MFU and the progress line, with a clock that the test turns."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import pretrain, vae
from qi2_jax.models.mmdit import MMDiT, init_params
from qi2_jax.parallel.chips import CHIPS
from qi2_jax.training import build, progress
from qi2_jax.training.progress import Meter, Work
from tests import tiny_models


class Clock:
  """`time.perf_counter` that moves only when told."""

  def __init__(self):
    self.now = 100.0

  def perf_counter(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(progress, "time", clock)
  return clock


def mesh_of(kind: str, count: int):
  device = types.SimpleNamespace(device_kind=kind)
  devices = np.array([device] * count).reshape(count, 1)
  return types.SimpleNamespace(devices=devices, size=count)


def test_rates_are_counts_over_time(clock):
  meter = Meter(10, 110, mesh_of("TPU v5p", 4))
  for images in (32, 32, 16, 16, 32):  # of two resolutions
    with meter.waiting():
      clock.now += 0.5
    clock.now += 1.5
    meter.add(images, Work(tokens=1000, flops=1e14))
  rates = meter.rates(15)
  assert rates == pytest.approx(
    {
      "images_per_second": 128 / 10,
      "tokens_per_second": 500,
      "data_wait_fraction": 0.25,
      "eta_seconds": 95 * 2,
      "mfu": 5e14 / 10 / (4 * CHIPS["v5p"].peak_flops),
    }
  )
  meter.reset(15)
  clock.now += 4.0
  meter.add(4, Work(tokens=8))
  rates = meter.rates(16)
  assert rates["images_per_second"] == 1
  assert rates["tokens_per_second"] == 2 and rates["data_wait_fraction"] == 0
  meter.reset(16)
  clock.now += 4.0
  meter.add(4, Work(images=24))  # more than the loader brought prompts
  assert meter.rates(17)["images_per_second"] == 6
  assert "mfu" not in rates


@pytest.mark.parametrize("kind", ["cpu", "TPU v99"])
def test_no_mfu_without_a_peak(kind, clock):
  meter = Meter(0, 10, mesh_of(kind, 1))
  meter.add(1, Work(flops=1e12))
  clock.now += 1
  assert set(meter.rates(1)) == {
    "images_per_second", "data_wait_fraction", "eta_seconds"
  }  # fmt: skip


def test_time_of_a_failed_wait_raises(clock):
  meter = Meter(0, 10, mesh_of("cpu", 1))
  with pytest.raises(StopIteration), meter.waiting():
    raise StopIteration


def test_work_is_read_from_the_features():
  config = pretrain.get_config("tiny")
  base = build.mmdit_config(config.model, 8, 24)
  condition = tiny_models.conditioning(base, references=((2, 2),))
  features = {
    "latents_BNZ": tiny_models.noise(base, size=2, target=(4, 6)),
    "condition": condition,
  }
  work = progress.work_of(config, features)
  assert work.tokens == 2 * 24
  # Layers dominate: 6 FLOPs for a parameter of a layer and each token.
  shapes = jax.eval_shape(lambda: init_params(MMDiT(base), jax.random.key(0)))
  blocks = sum(x.size for x in jax.tree.leaves(shapes["blocks"]))
  tokens = 2 * (24 + condition.layout.source_BP.shape[1])
  assert 0.7 < work.flops / (6 * blocks * tokens) < 1.5
  double = {
    "latents_BNZ": tiny_models.noise(base, size=4, target=(4, 6)),
    "condition": tiny_models.conditioning(
      base, words=(4, 7, 7, 7), references=((2, 2),)
    ),
  }
  assert progress.work_of(config, double).flops == 2 * work.flops
  with config.unlocked():
    config.lora = {"rank": 4}
  assert progress.work_of(config, features) == Work(tokens=2 * 24)
  # A rollout makes several images of a prompt, of some of the prompts.
  rollout = {"advantage_B": jnp.zeros(12)}
  assert progress.work_of(config, rollout) == Work(images=12)
  images = {"image": jnp.zeros((2, 64, 64, 4))}
  assert progress.work_of(vae.get_config("tiny"), images) == Work()


def test_memory_is_shown_where_the_backend_knows(monkeypatch):
  def pretend(stats):
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(progress.jax, "local_devices", lambda: [device])

  pretend(None)
  assert progress.device_memory() == {}
  pretend({"bytes_in_use": 3 * 2**30, "peak_bytes_in_use": 5 * 2**30, "x": 1})
  assert progress.device_memory() == {
    "device_memory_gib": 3, "device_memory_peak_gib": 5
  }  # fmt: skip


def test_the_line():
  values = {
    "loss": 0.123456, "images_per_second": 12.34, "data_wait_fraction": 0.005,
    "eta_seconds": 65.9, "grad_norm": 7.0,
  }  # fmt: skip
  assert progress.line(5, 100, values) == (
    "step 5/100  loss 0.1235  12.3 img/s  data wait 0.5 %  ETA 1:05"
  )
  values |= {
    "tokens_per_second": 12345.6, "mfu": 0.512, "device_memory_gib": 71.25,
    "psnr": 20.0, "eta_seconds": 7384.0,
  }  # fmt: skip
  assert progress.line(5, 100, values) == (
    "step 5/100  loss 0.1235  psnr 20.00  12.3 img/s  12,346 tokens/s  "
    "MFU 51.2 %  71.2 GiB  data wait 0.5 %  ETA 2:03:04"
  )
