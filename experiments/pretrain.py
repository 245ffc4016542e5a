# SPDX-License-Identifier: Apache-2.0
"""Pre-training of the MMDiT (report Table 2, first column).

    python -m qi2_jax.train --config=experiments/pretrain.py:tiny \\
      --workdir=runs/pretrain --config.vae.path=runs/vae

Variants: `report` (the whole stage in one run: 256 px first, then mostly
512 px), `256` and `512` (one resolution each; start `512` with `config.init`
at the workdir of `256`) are of full size, need a pod, and were never run by
us. `tiny` (40 steps) and `tiny_curriculum` (the same with 32 px and 64 px at
two batch sizes) take under a minute on 2 CPU cores, `demo` is the
pre-training of `make demo`. Without `--config.vae.path` the VAE is random and
the log says so.

Of Table 2: 700 K steps (for both resolutions together; divide them with
--config.num_steps), batch 32 K and 16 K, T2I:TI2I 9:1, Adam, lr 1e-4, weight
decay 0.001, gradient clip 1.0, unconditional dropout 0.1. Ours: the schedule
of `report` (the table says only "256/512"), K as 1024, aspect ratios, noise
levels and their shift, warm-up, Adam's betas, decoupled decay, EMA, no
reference dropout. On few chips add --config.optimizer.accumulate=N: the batch
stays the same, N parts of it run one after the other.
"""

from experiments import common


def _full(side):
  config = common.base_config()
  config.num_steps = 700_000
  config.optimizer.learning_rate = 1e-4
  return common.set_resolution(config, side)


def _report():
  # 256 px stays in the mixture, so that the small images of the data and what
  # was learnt on them are not lost.
  schedule = ((0, {256: 1.0}), (400_000, {256: 0.2, 512: 0.8}))
  return common.set_report_curriculum(_full(512), schedule)


def _tiny():
  config = common.make_smoke(common.base_config())
  config.optimizer.learning_rate = 1e-3
  return config


def _tiny_curriculum():
  resolutions = {
    32: (((32, 32),), 32),
    64: (((64, 64), (64, 96)), 16),
  }
  schedule = ((0, {32: 1.0}), (20, {32: 0.25, 64: 0.75}))
  return common.set_curriculum(_tiny(), resolutions, schedule)


def _demo():
  config = common.make_tiny(common.base_config())
  config.num_steps = 900
  config.data.batch_size = 64
  config.data.t2i = 0.8
  config.data.ti2i = 0.2
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule = "constant"
  config.optimizer.warmup_steps = 50
  config.optimizer.b2 = 0.99
  config.log_every = 50
  config.save_every = 300
  config.preview_every = 450
  return config


def get_config(arg="512"):
  """Config of pre-training; see the module docstring for variants."""
  variants = {
    "report": _report,
    "256": lambda: _full(256),
    "512": lambda: _full(512),
    "tiny": _tiny,
    "tiny_curriculum": _tiny_curriculum,
    "demo": _demo,
  }
  return common.choose(arg, variants)()
