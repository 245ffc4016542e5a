# SPDX-License-Identifier: Apache-2.0
"""The f16c64 VAE: from scratch in three stages, or from released weights.

    python -m qi2_jax.train --config=experiments/vae.py:tiny \\
      --workdir=runs/vae

Variants:

    tiny          the recipe at 64 px with RANDOM stand-ins for VGG16 and
                  DINOv2: about 370 CPU seconds on a busy machine; expect
                  27.2 dB and SSIM 0.914 on held-out images
    demo          L1 only: the VAE of `make demo`, minutes on 2 CPU cores
    256           stage A: from scratch, strong alignment
    512           stage B: --config.init=STAGE_A, weaker alignment
    2k            stage C: --config.init=STAGE_B, up to 2048 px, margins open,
                  only the middle layers are trained
    decoder       stage D: --config.init=STAGE_C, decoder only
    finetune_2_1  from a Qwen-Image-2.1 folder (--config.init), decoder only

All but the first two need accelerators and three local files or folders:
--config.lpips.vgg, --config.lpips.linear, --config.dinov2.path. They were
never run by us at scale. docs/vae.md says which numbers have a source; step
counts, learning rates, batch sizes and sizes of images are ours, for the
reports give none.
"""

from ml_collections import ConfigDict

from experiments import common


def _base():
  config = common.base_config()
  config.objective = "vae"
  config.data.t2i = 0.5
  config.data.ti2i = 0.5
  # Width of the quadratic bottom of the L1 (0: plain L1).
  config.l1_smoothing = 0.0
  # Batches over which the latent mean and std are taken at the end.
  config.latent_stat_batches = 16
  # "all", "middle" or "decoder", see training/vae_state.py.
  config.trainable = "all"
  # Recompute the blocks of the VAE, and LPIPS, in the backward pass.
  config.vae.remat = False
  # Weights and margins, ((step, value), ...), linear in between; L1 alone.
  config.loss = ConfigDict(
    dict(
      l1=((0, 1.0),),
      smoothing=((0, 1.0),),  # times l1_smoothing
      lpips=((0, 0.0),),
      align=((0, 0.0),),  # times VA-VAE's adaptive weight
      kl=((0, 0.0),),
      margin_cosine=((0, 0.0),),
      margin_distance=((0, 0.0),),
      adaptive=True,
      # Grey level in [-1, 1] that LPIPS and DINOv2 see behind alpha; ours.
      background=1.0,
    )
  )
  # Local files: torchvision's vgg16 and the linear weights of `lpips`.
  # random_features: a stand-in without meaning, for tests; it may have other
  # widths. dtype: of the convolutions.
  config.lpips = ConfigDict(
    dict(
      vgg="",
      linear="",
      random_features=False,
      widths=(64, 128, 256, 512, 512),
      dtype="bfloat16",
    )
  )
  # A local folder like facebook/dinov2-large, cut after block `layer`, which
  # is ours: the VAE report says "middle". preset: of random features.
  config.dinov2 = ConfigDict(
    dict(
      path="",
      layer=16,
      random_features=False,
      preset="dinov2_large",
      dtype="bfloat16",
    )
  )
  return config


def _recipe(num_steps):
  """Full size in bf16. The weight of LPIPS is VA-VAE's."""
  config = _base()
  config.num_steps = num_steps
  config.vae.dtype = "bfloat16"
  config.loss.lpips = ((0, 1.0),)
  config.optimizer.learning_rate = 1e-4
  return config


def _256():
  config = _recipe(200_000)
  config.data.batch_size = 256
  config.data.buckets = ((256, 256), (224, 288), (288, 224))
  # VA-VAE's weight in the first phase of its released model; no margins.
  config.loss.align = ((0, 0.5),)
  return config


def _512():
  config = _recipe(100_000)
  common.set_curriculum(
    config,
    {256: (common.BUCKETS[256], 256), 512: (common.BUCKETS[512], 64)},
    ((0, {256: 0.5, 512: 0.5}),),
  )
  config.vae.remat = True
  # VA-VAE's later weight; the way there is ours.
  config.loss.align = ((0, 0.5), (20_000, 0.1))
  return config


def _2k():
  config = _recipe(50_000)
  batches = {512: 64, 1024: 32, 2048: 16}
  common.set_curriculum(
    config,
    {side: (common.BUCKETS[side], batch) for side, batch in batches.items()},
    ((0, {512: 0.5, 1024: 0.5}), (25_000, {512: 0.3, 1024: 0.3, 2048: 0.4})),
  )
  config.vae.remat = True
  config.trainable = "middle"
  config.loss.align = ((0, 0.1),)
  # To VA-VAE's margins; linearly is ours.
  config.loss.margin_cosine = ((0, 0.0), (25_000, 0.5))
  config.loss.margin_distance = ((0, 0.0), (25_000, 0.25))
  return config


def _decoder():
  config = _recipe(50_000)
  config.data.batch_size = 64
  config.data.buckets = common.BUCKETS[512]
  config.vae.remat = True
  config.trainable = "decoder"
  # Sharp edges last: the share of LPIPS falls; ours.
  config.loss.lpips = ((0, 1.0), (50_000, 0.3))
  config.optimizer.schedule = "cosine"
  return config


def _finetune_2_1():
  config = _decoder()
  config.num_steps = 10_000
  config.loss.lpips = ((0, 1.0), (10_000, 0.3))
  config.optimizer.learning_rate = 1e-5
  return config


def _stand_ins(config):
  """Random, narrow networks instead of VGG16 and DINOv2: tests only."""
  config.lpips.random_features = True
  # Of twice to four times the width it took two thirds of a step.
  config.lpips.widths = (8, 8, 16, 16, 16)
  config.lpips.dtype = "float32"
  config.dinov2.random_features = True
  config.dinov2.preset = "tiny"
  config.dinov2.layer = 2
  config.dinov2.dtype = "float32"
  return config


def _demo():
  config = common.make_tiny(_base())
  # One shape, one compilation; convolutions carry over to the others.
  config.data.buckets = ((64, 64),)
  config.num_steps = 2400
  config.data.batch_size = 8
  config.l1_smoothing = 0.3
  config.optimizer.learning_rate = 5e-4
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 20
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 0.0
  config.log_every = 100
  config.save_every = 800
  config.preview_every = 1200
  return config


def _tiny():
  config = _stand_ins(_demo())
  config.num_steps = 5000
  config.save_every = 2500
  config.preview_every = 2500
  config.optimizer.learning_rate = 1e-3
  config.data.t2i = 1.0
  config.data.ti2i = 0.0
  config.data.rendered_t2i = 8000
  config.data.rendered_edits = 0
  # Round at first, sharp later: see `smooth_l1`.
  config.loss.smoothing = ((0, 1.0), (2500, 1.0), (4000, 0.1))
  config.loss.lpips = ((0, 0.1),)
  config.loss.align = ((0, 0.5), (3750, 0.1))
  return config


def get_config(arg="256"):
  """Config of the VAE stage; see the module docstring for variants."""
  variants = {
    "256": _256,
    "512": _512,
    "2k": _2k,
    "decoder": _decoder,
    "finetune_2_1": _finetune_2_1,
    "tiny": _tiny,
    "demo": _demo,
  }
  return common.choose(arg, variants)()
