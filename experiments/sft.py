# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on T2I and edits (report Table 2, last column).

    python -m qi2_jax.train --config=experiments/sft.py:tiny \\
      --workdir=runs/sft --config.vae.path=runs/vae \\
      --config.init=runs/pretrain

Variants: `512` (full size; 10 K steps, batch 16 K, T2I:TI2I 7:3, lr 1e-5,
needs a pod), `tiny` (40 steps, under a minute on 2 CPU cores) and `demo` (the
fine-tuning of `make demo`). `config.init` names the workdir whose EMA
weights are the start, or a pipeline folder such as a download of
Qwen-Image-2.1 (then give it to `config.vae.path` and `config.text.path` too).
"""

from experiments import common


def _base():
  config = common.base_config()
  config.data.t2i = 0.7
  config.data.ti2i = 0.3
  return config


def _full():
  config = _base()
  config.num_steps = 10_000
  config.data.batch_size = 16_384
  config.optimizer.learning_rate = 1e-5
  return config


def _tiny():
  config = common.make_smoke(_base())
  config.optimizer.learning_rate = 5e-4
  return config


def _demo():
  config = common.make_tiny(_base())
  config.num_steps = 750
  config.data.batch_size = 64
  config.data.t2i = 0.5
  config.data.ti2i = 0.5
  config.optimizer.learning_rate = 1.5e-3
  config.optimizer.schedule = "linear"
  config.optimizer.warmup_steps = 20
  config.optimizer.b2 = 0.99
  config.log_every = 50
  config.save_every = 250
  config.preview_every = 750
  return config


def get_config(arg="512"):
  """Config of fine-tuning; see the module docstring for variants."""
  return common.choose(arg, {"512": _full, "tiny": _tiny, "demo": _demo})()
