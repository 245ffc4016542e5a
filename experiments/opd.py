# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation: guided teachers into a student without guidance.

    python -m qi2_jax.train --config=experiments/opd.py:tiny \\
      --workdir=runs/opd --config.data.path=runs/demo/data \\
      --config.vae.path=runs/grpo --config.init=runs/grpo \\
      --config.opd.teachers="('runs/grpo',)"

Two teachers, of text to image and of edits, merge into one student (the last
stage of Qwen-Image-2.0-RL, arXiv 2606.27608); one absorbs its guidance.

Variants: `qwen_image_2_1` (full size, needs a pod; never run by us), `tiny`
and `smoke` (of the demo's size, on 2 CPU cores). No number of this stage is
public: steps, learning rate, batch and guidance are ours.
"""

from ml_collections import ConfigDict

from experiments import common


def _base():
  config = common.base_config()
  config.objective = "opd"
  config.num_steps = 1_000
  config.ema_decay = 0.99
  config.data.t2i = 0.5
  config.data.ti2i = 0.5
  config.data.caption_dropout = 0.0
  config.optimizer.warmup_steps = 0
  config.optimizer.b2 = 0.999
  config.opd = ConfigDict(
    dict(
      teachers=(),  # workdirs: one, or (text to image, edits)
      guidance=4.0,  # of the teachers; the student has none
      steps=10,  # of the student's walk, all of which are trained
    )
  )
  config.sampling.guidance = 1.0
  return config


def _full():
  config = common.set_resolution(_base(), 1024)
  config.data.batch_size = 64
  config.optimizer.learning_rate = 1e-5
  config.save_every = config.preview_every = 100
  config.log_every = 10
  return config


def _tiny():
  config = common.make_tiny(_base())
  config.num_steps = 150
  config.ema_decay = 0.95
  config.data.buckets = ((64, 64),)
  config.data.batch_size = 32
  config.optimizer.learning_rate = 3e-4
  config.optimizer.schedule = "cosine"
  config.opd.guidance = 3.0
  config.sampling.guidance = 1.0
  config.log_every = 10
  config.save_every = config.preview_every = 50
  return config


def _smoke():
  config = common.make_four_steps(_tiny())
  config.opd.steps = 4
  config.sampling.guidance = 1.0
  return config


def get_config(arg="qwen_image_2_1"):
  """Config of on-policy distillation; see the docstring for variants."""
  variants = {
    "qwen_image_2_1": _full, "tiny": _tiny, "smoke": _smoke,
  }  # fmt: skip
  return common.choose(arg, variants)()
