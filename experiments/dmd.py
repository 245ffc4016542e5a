# SPDX-License-Identifier: Apache-2.0
"""Distillation into a few-step student (report section 4.3).

    python -m qi2_jax.train --config=experiments/dmd.py:tiny \\
      --workdir=runs/dmd --config.data.path=runs/demo/data \\
      --config.vae.path=runs/demo/sft --config.init=runs/demo/sft

`config.init` is student and teacher in one: a workdir or a pipeline folder.
`WORKDIR/best` is a workdir with the weights that were closest to the teacher
on held-out prompts; sample, evaluate and export take it or the run itself,
and use the student's noise levels without being told.

Variants: `qwen_image_2_1` (full size, needs a pod; never run by us),
`qwen_image_2_1_lora` (the student is a LoRA of rank 64, the fake score full),
`tiny` (the fine-tuned model of `make demo`, under 10 minutes on 2 CPU cores)
and `smoke` (a few steps of it).

The report publishes no number of this stage. `qwen_image_2_1_lora` follows
what the author of Qwen-Image-Lightning has made known (github.com/ModelTC/
Qwen-Image-Lightning, issues 16, 38 and 64): levels 1, .9, .75, .5; five
updates of the fake score for one of the student; batch 64; LoRA of rank 64
and alpha 8 at 5e-5; fake score at 4e-7 with all parameters; Adam's betas 0
and .999, decay 0.01, clip 1; no GAN; 2,000 updates as in Qwen-Image-Flash
(arXiv 2606.03746), which also has T2I and edits 5:5. Ours: guidance 4,
logit-normal p(t) with mean 0 and deviation 1 in [.02, .98] (the report names
the family), EMA, full student at 1e-6, and the teachers' weights: Flash mixes
a base and a specialised teacher by student step, its weights are not public.
"""

from ml_collections import ConfigDict

from experiments import common

SIGMAS = (1.0, 0.9, 0.75, 0.5)  # Lightning
# Prompts of ours, for choosing the best weights.
HELD_OUT = (
  "a watercolour of a harbour at dawn, fishing boats, mist",
  "portrait of an old woman with silver hair, window light, 85 mm",
  "a neon sign that reads \"OPEN 24 HOURS\" in a rainy street",
  "an isometric drawing of a small library with a garden on its roof",
  "two red foxes and one white rabbit in fresh snow",
  "海边的灯塔，黄昏，油画",
  "a poster with the title \"STILL WATER\" above a mountain lake",
  "a glass of tea on a wooden table, steam, macro photograph",
)  # fmt: skip
# Never in the training data of the shapes; a test says so.
SHAPES_HELD_OUT = (
  "a red triangle", "an orange triangle", "a blue cross in the top right",
  "a purple cross in the top left", "a purple square in the bottom right",
  "a red cross in the top left", "four yellow crosses", "one blue circle",
  "two purple crosses", "a red square above a green triangle",
  "the letter F in blue", "the letter J in orange", "the letter O in green",
  "the letter Z in red",
)  # fmt: skip


def _times():
  return ConfigDict(
    dict(
      kind="logit_normal",  # or "uniform", "shifted"
      low=0.02,
      high=0.98,
      mean=0.0,
      std=1.0,
      shift=3.0,
    )
  )


def _base():
  config = common.base_config()
  config.objective = "dmd"
  config.num_steps = 2_000
  config.ema_decay = 0.99
  config.loss_spike = 0.0  # the loss is half a squared gradient
  config.data.t2i = 0.5
  config.data.ti2i = 0.5
  # No caption is dropped here, for each prompt comes with the empty one; above
  # 0 it says that a feature cache must hold empty captions.
  config.data.caption_dropout = 0.1
  config.optimizer.warmup_steps = 0
  config.optimizer.b1 = 0.0
  config.optimizer.b2 = 0.999
  config.optimizer.weight_decay = 0.01
  config.dmd = ConfigDict(
    dict(
      sigmas=SIGMAS,
      sampler="euler",  # or "renoise"
      # How often each step is trained; empty: alike.
      step_weights=(),
      guidance=4.0,  # u + w (c - u), on the real score only
      weight="x0_norm",  # or "score"
      decoupled=False,
      ratio=5,  # updates of the fake score per update of the student
      times=_times(),
      fake_times=_times(),
      # The student's weight above 0 adds the GAN head of DMD2, which needs
      # images; DMD2 has 5e-3 and 1e-2 for SDXL.
      gan=ConfigDict(dict(weight=0.0, fake_weight=0.01)),
      # Empty: config.init. Weights [teacher][student step][t2i, edit].
      teachers=(),
      teacher_weights=(),
      # How the teacher is sampled in previews and for the distance below.
      teacher_steps=40,
      teacher_guidance=4.0,
      # At every preview; the closest weights are kept in WORKDIR/best.
      held_out_prompts=HELD_OUT,
      held_out_samples=4,
    )
  )
  config.dmd.fake_optimizer = config.optimizer.copy_and_resolve_references()
  return config


def _full():
  config = common.set_resolution(_base(), 1024)
  config.data.batch_size = 6 * 64  # 64 per update, ratio + 1 of them
  config.optimizer.learning_rate = 1e-6
  config.dmd.fake_optimizer.learning_rate = 4e-7
  config.save_every = config.preview_every = 250
  config.log_every = 10
  return config


def _lora():
  config = _full()
  config.lora.rank = 64
  config.lora.alpha = 8.0
  config.optimizer.learning_rate = 5e-5
  return config


def _tiny():
  config = common.make_tiny(_base())
  config.num_steps = 700
  config.ema_decay = 0.95
  config.data.batch_size = 6 * 16
  config.data.buckets = ((64, 64),)
  config.optimizer.learning_rate = 1e-3
  config.dmd.fake_optimizer.learning_rate = 2e-3
  for optimizer in (config.optimizer, config.dmd.fake_optimizer):
    optimizer.b2 = 0.99
    optimizer.schedule = "linear"
  # Above the 3 that this teacher is sampled with, and times nearer to noise:
  # both make the first step tell prompts apart, which has no guidance.
  config.dmd.guidance = 5.0
  config.dmd.teacher_guidance = 3.0
  config.dmd.times.mean = config.dmd.fake_times.mean = 1.0
  config.dmd.held_out_prompts = SHAPES_HELD_OUT
  config.log_every = 25
  config.save_every = config.preview_every = 175
  return config


def _smoke():
  config = common.make_four_steps(_tiny())
  config.data.batch_size = 6 * 4
  return config


def get_config(arg="qwen_image_2_1_lora"):
  """Config of distillation; see the module docstring for variants."""
  variants = {
    "qwen_image_2_1": _full,
    "qwen_image_2_1_lora": _lora,
    "tiny": _tiny,
    "smoke": _smoke,
  }
  return common.choose(arg, variants)()
