# SPDX-License-Identifier: Apache-2.0
"""Pre-training of the MMDiT (report Table 2, first column).

    python -m qi2_jax.train --config=experiments/pretrain.py:tiny \\
      --workdir=runs/pretrain --config.vae.path=runs/vae

Variants: `256` and `512` (the report's two resolutions, full size; batch 32 K
and 16 K, T2I:TI2I 9:1, lr 1e-4, needs a pod), `tiny` (40 steps, under a
minute on 2 CPU cores) and `demo` (the pre-training of `make demo`). Noise
levels, shift and EMA are ours; the rest of the full variants is Table 2.
Without `--config.vae.path` the VAE is random and the log says so.
"""

from experiments import common


def _full(side, batch_size):
  config = common.base_config()
  config.num_steps = 700_000
  config.data.batch_size = batch_size
  config.optimizer.learning_rate = 1e-4
  if side == 256:
    config.data.buckets = (
      (256, 256), (224, 288), (288, 224), (192, 352), (352, 192),
    )  # fmt: skip
  return config


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
    "256": lambda: _full(256, 32_768),
    "512": lambda: _full(512, 16_384),
    "tiny": _tiny,
    "demo": _demo,
  }
  return common.choose(arg, variants)()
