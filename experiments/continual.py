# SPDX-License-Identifier: Apache-2.0
"""Continual pre-training at rising resolution (report Table 2, column 2).

    python -m qi2_jax.train --config=experiments/continual.py:512 \\
      --workdir=runs/continual_512 --config.vae.path=models/qi21 \\
      --config.text.path=models/qi21 --config.init=runs/pretrain
    python -m qi2_jax.train --config=experiments/continual.py:1024 \\
      --workdir=runs/continual_1024 --config.init=runs/continual_512 ...

Variants: `report` (the whole stage in one run: 512 and 1024 px, then 2048 px
too), `512`, `1024` and `2048` (one resolution each, three runs, each from the
one before) are of full size, need a pod, and were never run by us; `tiny` is
40 steps, under a minute on 2 CPU cores: the loss should fall from that of
`config.init`.

Of Table 2: 250 K steps, batch 16 K, 8 K and 4 K, T2I:TI2I 7:3, Adam, lr 2e-5,
weight decay 0.001, gradient clip 1.0, unconditional dropout 0.1. The table
gives one number of steps for the three resolutions together; with one run for
each, divide it by --config.num_steps. Ours: the schedule of `report` (the
report's data stages 4 and 5 mix 512/1024 and 512/1024/2048; shares and steps
are unpublished), K as 1024, aspect ratios, noise levels and their shift,
warm-up, Adam's betas, decoupled decay, EMA, no reference dropout. On few
chips add --config.optimizer.accumulate=N: the batch stays the same, N parts
of it run one after the other.
"""

from experiments import common


def _base():
  config = common.base_config()
  config.num_steps = 250_000
  config.data.t2i = 0.7
  config.data.ti2i = 0.3
  config.optimizer.learning_rate = 2e-5
  return config


def _full(side):
  return common.set_resolution(_base(), side)


def _report():
  schedule = (
    (0, {512: 0.5, 1024: 0.5}),
    (150_000, {512: 0.2, 1024: 0.4, 2048: 0.4}),
  )
  return common.set_report_curriculum(_base(), schedule)


def _tiny():
  config = common.make_smoke(_base())
  config.optimizer.learning_rate = 5e-4
  return config


def get_config(arg="512"):
  """Config of continual pre-training; see the module docstring."""
  variants = {
    "report": _report,
    "512": lambda: _full(512),
    "1024": lambda: _full(1024),
    "2048": lambda: _full(2048),
    "tiny": _tiny,
  }
  return common.choose(arg, variants)()
