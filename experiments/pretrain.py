# SPDX-License-Identifier: Apache-2.0
"""Pre-training of the MMDiT (report Table 2, first column).

    python -m qi2_jax.train --config=experiments/pretrain.py:tiny \\
      --workdir=runs/pretrain --config.vae.path=runs/vae

Variants: `256` and `512` (the report's two resolutions, full size, needs a
pod; never run by us), `tiny` (40 steps, under a minute on 2 CPU cores) and
`demo` (the pre-training of `make demo`). Start `512` with `config.init` at
the workdir of `256`. Without `--config.vae.path` the VAE is random and the
log says so.

Of Table 2: 700 K steps (for both resolutions together; divide them with
--config.num_steps), batch 32 K and 16 K, T2I:TI2I 9:1, Adam, lr 1e-4, weight
decay 0.001, gradient clip 1.0, unconditional dropout 0.1. Ours: K as 1024,
aspect ratios, noise levels and their shift, warm-up, Adam's betas, decoupled
decay, EMA, no reference dropout. On few chips add
--config.optimizer.accumulate=N: the batch stays the same, N parts of it run
one after the other.
"""

from experiments import common


def _full(side):
  config = common.base_config()
  config.num_steps = 700_000
  config.optimizer.learning_rate = 1e-4
  return common.set_resolution(config, side)


def _tiny():
  config = common.make_smoke(common.base_config())
  config.optimizer.learning_rate = 1e-3
  return config


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
    "256": lambda: _full(256),
    "512": lambda: _full(512),
    "tiny": _tiny,
    "demo": _demo,
  }
  return common.choose(arg, variants)()
