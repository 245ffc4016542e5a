# SPDX-License-Identifier: Apache-2.0
"""Fields that every training stage shares, with their defaults."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# (height, width) in pixels by the side of the square, of about its area. Ours:
# the report names no ratios. From 1024 on they are 4:3, 3:2 and 16:9, rounded
# to the 32 px of a slot; at 2048 as the public model names them.
BUCKETS = {
  256: ((256, 256), (224, 288), (288, 224), (192, 352), (352, 192)),
  512: ((512, 512), (416, 608), (608, 416), (384, 672), (672, 384)),
  1024: (
    (1024, 1024), (896, 1184), (1184, 896), (832, 1248), (1248, 832),
    (768, 1376), (1376, 768),
  ),
  2048: (
    (2048, 2048), (1792, 2400), (2400, 1792), (1696, 2528), (2528, 1696),
    (1536, 2752), (2752, 1536),
  ),
}  # fmt: skip
# Report Table 2, "K" read as 1024.
BATCH_SIZES = {256: 32_768, 512: 16_384, 1024: 8_192, 2048: 4_096}


def choose(arg, variants):
  """Looks up the part after the colon of `--config=FILE.py:arg`.

  Raises:
    ValueError: there is no such variant.
  """
  if arg not in variants:
    raise ValueError(
      f"config variant {arg!r} is unknown; use one of {sorted(variants)}."
    )
  return variants[arg]


def base_config():
  """Defaults of every stage; a stage file overrides what it needs."""
  config = ConfigDict()
  config.objective = "flow_matching"  # or "vae"
  config.seed = 0
  config.num_steps = 1000
  config.ema_decay = 0.9999
  # Workdir whose EMA weights to start from, or pipeline folder; empty: from
  # scratch. The frozen base of a LoRA.
  config.init = ""
  # rank 0: all parameters are trained. Otherwise only factors of that rank,
  # scaled by alpha / rank. targets: regexes of kernel paths; empty: attention
  # and MLP of every block.
  config.lora = ConfigDict(dict(rank=0, alpha=16.0, targets=()))
  config.mesh = ConfigDict(dict(data=1, fsdp=-1, seq=1, tensor=1))
  config.log_every = 50
  config.save_every = 1000
  config.preview_every = 1000
  config.keep_checkpoints = 2
  config.keep_every = 0  # checkpoints of its multiples stay for good
  # Non-finite steps change nothing; so many in a row end the run (0: never).
  config.max_skipped_steps = 10
  config.loss_spike = 3.0  # logged above this times the running median
  # A profiler trace of `profile_steps` steps, into WORKDIR/profile.
  config.profile_start = 10
  config.profile_steps = 0

  # Loss of the EMA on held-out data: dataset folders or feature caches, comma
  # separated, every so many steps, on so many batches.
  config.validation = ConfigDict(dict(path="", every=1000, batches=8))

  config.data = ConfigDict(
    dict(
      # Dataset folders or feature caches (python -m qi2_jax.cache), comma
      # separated; empty: shapes are rendered.
      path="",
      # Shares of those folders in the rows of every task, e.g. (7, 3); None:
      # every record counts alike.
      weights=placeholder(tuple),
      batch_size=256,  # global
      # (height, width) in pixels, of targets and references.
      buckets=BUCKETS[512],
      # Several resolutions in one run: buckets and batch_size by name, and a
      # schedule ((first step, {name: share of the steps}), ...). Empty: the
      # two fields above, from start to end. See `set_curriculum`.
      resolutions=ConfigDict(),
      schedule=(),
      t2i=0.9,  # share of the steps (report Table 2)
      ti2i=0.1,
      caption_dropout=0.1,  # report Table 2
      # Share of edits whose references turn white, for guidance on them; ours.
      reference_dropout=0.0,
      max_enlarge=1.5,
      # Programs with fewer records are left out. Fewer than a batch are an
      # error, unless batches may hold a record twice.
      min_bucket_records=1,
      repeat_small=False,
      max_references=4,
      threads=4,
      # Size of the rendered stand-in data, when `path` is empty.
      rendered_t2i=512,
      rendered_edits=256,
    )
  )
  # path: a folder with a Qwen3-VL (or a whole pipeline); empty: the built-in
  # random encoder of `width` channels. length: encoder tokens after the
  # system turn (references add theirs). lengths: shorter ones that batches of
  # short captions may have, up to `length`, e.g. (64, 128, 256, 512); None:
  # all have `length`. dtype: compute dtype with a path.
  config.text = ConfigDict(
    dict(
      path="", length=512, lengths=placeholder(tuple), width=64,
      dtype="bfloat16",
    )
  )  # fmt: skip
  config.vae = ConfigDict(
    dict(path="", preset="qwen_image_2_1", dtype=placeholder(str))
  )
  # None keeps the preset's value.
  config.model = ConfigDict(
    dict(
      preset="qwen_image_2_1",
      dtype=placeholder(str),
      remat=placeholder(str),
      kernel=placeholder(str),  # of the attention; None: the fastest here
      attention=placeholder(str),
      condition_time=placeholder(str),
      modulation=placeholder(str),
      gate=placeholder(str),
    )
  )
  config.flow = ConfigDict(
    dict(
      logit_mean=0.0,  # logit-normal levels: our choice, unpublished
      logit_std=1.0,
      shift_training=True,  # our choice; sampling always shifts
      shift=ConfigDict(
        dict(
          base_shift=0.5,
          max_shift=0.9,
          base_tokens=256,
          max_tokens=8192,
          terminal=0.02,
        )
      ),
    )
  )
  config.optimizer = ConfigDict(
    dict(
      learning_rate=1e-4,
      schedule="constant",
      warmup_steps=1000,
      b1=0.9,
      b2=0.95,
      weight_decay=0.001,
      clip_norm=1.0,
      # Microbatches per step: the batch is the same, the memory smaller.
      accumulate=1,
    )
  )
  # Sample grids during training, and the defaults of sample.py.
  config.sampling = ConfigDict(dict(steps=40, guidance=1.0, batch_size=8))
  return config


def set_resolution(config, side):
  """Buckets and global batch size of one resolution of the report."""
  config.data.buckets = BUCKETS[side]
  config.data.batch_size = BATCH_SIZES[side]
  return config


def set_curriculum(config, resolutions, schedule):
  """Several resolutions in one run.

  `buckets` and `batch_size` become those of the last resolution, by
  reference: sampling and aot take them, and an override of one changes both.

  Args:
    config: of a stage.
    resolutions: side to (buckets, batch size); rising.
    schedule: ((first step, {side: share of the steps}), ...), the first at 0.

  Returns:
    The config. Side 256 is named `px256` in it, so that the command line can
    reach it: --config.data.resolutions.px256.batch_size=1024.
  """
  for side, (buckets, batch_size) in resolutions.items():
    config.data.resolutions[f"px{side}"] = ConfigDict(
      dict(buckets=buckets, batch_size=batch_size)
    )
  config.data.schedule = tuple(
    (start, {f"px{side}": share for side, share in shares.items()})
    for start, shares in schedule
  )
  last = config.data.resolutions[f"px{side}"]
  config.data.buckets = last.get_ref("buckets")
  config.data.batch_size = last.get_ref("batch_size")
  return config


def set_report_curriculum(config, schedule):
  """A schedule over resolutions of the report, with its batch sizes."""
  sides = sorted({side for _, shares in schedule for side in shares})
  resolutions = {side: (BUCKETS[side], BATCH_SIZES[side]) for side in sides}
  return set_curriculum(config, resolutions, schedule)


def make_tiny(config):
  """Shrinks a stage to the tiny presets and 64 px, for two CPU cores."""
  config.data.buckets = ((64, 64), (64, 96), (96, 64))
  config.data.threads = 1
  config.text.length = 16
  config.text.dtype = "float32"
  config.vae.preset = "tiny"
  config.model.preset = "tiny"
  config.mesh = ConfigDict(dict(data=-1, fsdp=1, seq=1, tensor=1))
  config.sampling = ConfigDict(dict(steps=20, guidance=3.0, batch_size=16))
  config.log_every = 20
  config.ema_decay = 0.995
  return config


def make_smoke(config):
  """A tiny run of a few steps that shows every part of the loop at work."""
  make_tiny(config)
  config.num_steps = 40
  config.data.batch_size = 16
  config.data.rendered_t2i = 512
  config.data.rendered_edits = 256
  config.optimizer.warmup_steps = 5
  config.save_every = 20
  config.preview_every = 40
  config.log_every = 10
  return config


def make_four_steps(config):
  """The least that shows every part of a stage after SFT at work.

  Four steps of one shape; steps of these stages are expensive.
  """
  make_smoke(config)
  config.data.buckets = ((64, 64),)
  config.num_steps = 4
  config.data.batch_size = 4
  config.data.rendered_t2i = 64
  config.data.rendered_edits = 32
  config.save_every = 2
  config.preview_every = 4
  config.log_every = 1
  config.optimizer.warmup_steps = 0
  return config
