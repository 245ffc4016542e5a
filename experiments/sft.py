# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on T2I and edits (report Table 2, last column).

    python -m qi2_jax.train --config=experiments/sft.py:tiny \\
      --workdir=runs/sft --config.vae.path=runs/vae \\
      --config.init=runs/pretrain

Variants: `report` (all three resolutions mixed in one run), `512`, `1024` and
`2048` (one each) are of full size, need a pod, and were never run by us;
`lora` (a LoRA of rank 32 at 1024 px on your own data, batch 32; frozen weights
in fp32, so that it needs several chips; never run by us), `tiny` (40 steps,
under a minute on 2 CPU cores) and `demo` (the fine-tuning of `make demo`).
`config.init` names the workdir whose EMA weights are the start, or a pipeline
folder such as a download of Qwen-Image-2.1 (then give it to `config.vae.path`
and `config.text.path` too).

Any variant trains a LoRA with --config.lora.rank=16: `config.init` is then
the frozen base, which the workdir names and does not copy, and

    python -m qi2_jax.convert export --from=runs/lora --to=out.safetensors

writes the adapter, or with a folder name a pipeline with the adapter merged.

Of Table 2: 10 K steps (for all resolutions together; divide them with
--config.num_steps), batch 16 K, 8 K and 4 K, T2I:TI2I 7:3, Adam, lr 1e-5,
weight decay 0.001, gradient clip 1.0, unconditional dropout 0.1. Ours: the
shares of `report`, K as 1024, aspect ratios, noise levels and their shift,
warm-up, Adam's betas, decoupled decay, EMA, no reference dropout, and all of
`lora`. On few chips add --config.optimizer.accumulate=N: the batch stays the
same, N parts of it run one after the other.
"""

from experiments import common


def _base():
  config = common.base_config()
  config.data.t2i = 0.7
  config.data.ti2i = 0.3
  return config


def _stage():
  config = _base()
  config.num_steps = 10_000
  config.optimizer.learning_rate = 1e-5
  return config


def _full(side):
  return common.set_resolution(_stage(), side)


def _report():
  schedule = ((0, {512: 0.2, 1024: 0.5, 2048: 0.3}),)
  return common.set_report_curriculum(_stage(), schedule)


def _lora():
  config = common.set_resolution(_base(), 1024)
  config.num_steps = 2_000
  config.data.batch_size = 32
  config.lora.rank = 32
  config.lora.alpha = 32.0
  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_steps = 100
  config.ema_decay = 0.99
  config.save_every = config.preview_every = 250
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
  variants = {
    "report": _report,
    "512": lambda: _full(512),
    "1024": lambda: _full(1024),
    "2048": lambda: _full(2048),
    "lora": _lora,
    "tiny": _tiny,
    "demo": _demo,
  }
  return common.choose(arg, variants)()
