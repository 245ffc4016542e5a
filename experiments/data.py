# SPDX-License-Identifier: Apache-2.0
"""The six stages of training data of the Qwen-Image-2.0 report (section 2.3).

    python -m data_pipelines.run --config=experiments/data.py:stage1 \\
      --input=photos --out=data/stage1

Variants, each fed with the folders of the stages before it as inputs:

    stage1   256 px, text to image: the report's eight filters
    stage2   + edits: --input=data/stage1,edits
    stage3   512 px, + synthetic data: --input=data/stage2,synthetic
    stage4   512 and 1024 px: + quality, aesthetics, compression
    stage5   512 to 2048 px
    stage6   for SFT: stricter thresholds, and quotas of categories
    tiny     64 px with the filters of stage 1, for small pictures and tests;
             `python -m data_pipelines.demo_data` makes the demo's data with it

Runs on CPUs; scores of models come from `python -m qi2_jax.score`, else from
stand-ins that the manifest and the report name. docs/data.md describes the
verbs, the files and what was measured on two cores.

The report names the filters and their order, and gives no threshold: all
numbers here are ours. An option of a filter that is None is off.
"""

from ml_collections import ConfigDict

from experiments import common


def _base(name, sides):
  config = ConfigDict()
  config.name = name
  config.seed = 0
  # Items of a shard, where an input can be cut freely; the unit of work.
  config.shard_records = 1000
  # Share of unusable items at which a shard is refused (see --retry).
  config.max_error_rate = 0.5
  # More is left out, with a reason. seconds: wall time of work on one item;
  # uncaptioned: take images without a caption, for the captioner.
  config.limits = ConfigDict(
    dict(
      image_bytes=64 << 20,
      pixels=64_000_000,
      references=16,
      caption_bytes=1 << 20,
      seconds=30.0,
      uncaptioned=False,
    )
  )
  # (height, width) by resolution. A record goes to the largest resolution
  # whose nearest bucket all of its images can fill.
  config.buckets = ConfigDict(
    {f"px{side}": common.BUCKETS[side] for side in sides}
  )
  config.max_enlarge = 1.0
  # rgb: jpeg, png, webp, or auto (PNG stays PNG, all else JPEG); rgba: png or
  # webp, without loss. An image that fits its bucket keeps its bytes.
  config.encoding = ConfigDict(dict(rgb="auto", rgba="png", quality=95))
  # Weights of the mix of captions that `python -m data_pipelines.captioner` has
  # written ('original': as found). With all kinds at 0 every record keeps its
  # caption. No languages or lengths: all weigh the same. See docs/captions.md.
  kinds = ("original", "general", "text", "knowledge", "structured", "edit")
  config.captions = ConfigDict(
    dict(kinds=dict.fromkeys(kinds, 0.0), languages={}, lengths={})
  )
  # Scores that must exist before `decide`, and what stands in for the model
  # of each; () if a model must have run.
  config.score = ConfigDict()
  config.filters = ConfigDict()
  config.filter_order = ()
  return config


def _add(config, name, **options):
  """Appends a filter, or gives one that is there other options."""
  if name not in config.filter_order:
    config.filter_order = (*config.filter_order, name)
  config.filters[name] = ConfigDict(options)


def _filters_pretraining(config, side):
  """The eight filters of stage 1, in the report's order."""
  # A detector with its weights in its package; the stand-in "nsfw" knows skin
  # colours only, and takes cats for skin.
  config.score.nsfw = ConfigDict(dict(stand_ins=("nudenet",)))
  config.score.clip = ConfigDict(
    dict(stand_ins=("alignment", "aesthetic", "embedding"))
  )
  _add(config, "broken")
  _add(config, "resolution", min_pixels=side * side, max_aspect=3.0)
  # Deduplication is one filter of the report; here it has three parts.
  _add(config, "exact_duplicate")
  _add(
    config, "perceptual_duplicate", max_phash=8, max_dhash=10, max_colour=12.0
  )
  _add(config, "embedding_duplicate", min_cosine=0.985)
  _add(config, "nsfw", max_nsfw=0.5)
  # A tag that contradicts the pixels; tags that agree are applied.
  _add(config, "rotation", max_orientation_conflict=0)
  _add(config, "entropy", min_entropy=2.0, max_entropy=7.99)
  # An instruction does not describe the result of an edit.
  _add(config, "alignment", min_clip_alignment=0.18, task="t2i")
  _add(
    config, "token_length", min_tokens=3, max_tokens=1024,
    max_invalid_characters=0,
  )  # fmt: skip


def _filters_high_resolution(config):
  """What stage 4 adds."""
  config.score.quality = ConfigDict(dict(stand_ins=("quality",)))
  _add(config, "quality", min_quality=0.3)
  _add(config, "aesthetic", min_aesthetic=4.5)
  # Saved again at a high quality, only the blocks show.
  _add(config, "compression", min_jpeg_quality=60.0, max_blockiness=1.5)


def _stage1():
  config = _base("stage1", (256,))
  _filters_pretraining(config, 256)
  return config


def _stage2():
  config = _base("stage2", (256,))
  _filters_pretraining(config, 256)
  # An edit that changed nothing, or kept nothing; null for text to image.
  _add(config, "edit", min_edit_change=0.02, min_edit_similarity=0.05)
  return config


def _stage3():
  config = _stage2()
  config.name = "stage3"
  config.buckets = ConfigDict(dict(px512=common.BUCKETS[512]))
  config.filters.resolution.min_pixels = 512 * 512
  return config


def _stage4():
  config = _stage3()
  config.name = "stage4"
  config.buckets.px1024 = common.BUCKETS[1024]
  _filters_high_resolution(config)
  return config


def _stage5():
  config = _stage4()
  config.name = "stage5"
  # Records that cannot fill 2048 px stay at 1024 or 512.
  config.buckets.px2048 = common.BUCKETS[2048]
  return config


def _stage6():
  config = _stage5()
  config.name = "stage6"
  config.filters.resolution.min_pixels = 1024 * 1024
  config.filters.alignment.min_clip_alignment = 0.22
  config.filters.quality.min_quality = 0.5
  config.filters.aesthetic.min_aesthetic = 5.5
  config.filters.compression.min_jpeg_quality = 85.0
  config.filters.compression.max_blockiness = 1.2
  config.filters.nsfw.max_nsfw = 0.3
  # column="cluster" with clusters=N caps groups of similar images instead.
  _add(
    config, "distribution", column="kind", max_count=50_000, shares=None,
    clusters=None,
  )  # fmt: skip
  return config


def _tiny():
  config = _stage2()
  config.name = "tiny"
  config.shard_records = 200
  config.buckets = ConfigDict(dict(px64=((64, 64), (64, 96), (96, 64))))
  config.filters.resolution.min_pixels = 64 * 64
  config.score.nsfw.stand_ins = ("nsfw",)
  config.filters.nsfw.max_nsfw = 0.95
  # Shapes are flat and alike: the thresholds of photographs would take most.
  config.filters.entropy.min_entropy = 0.0
  config.filters.edit.min_edit_similarity = None
  # The same shape a pixel further is another example.
  config.filters.perceptual_duplicate.max_phash = 0
  config.filters.perceptual_duplicate.max_dhash = 0
  config.filters.perceptual_duplicate.max_colour = 0.5
  config.filters.embedding_duplicate.min_cosine = 0.9999
  config.encoding.rgb = "png"
  return config


def get_config(arg="stage1"):
  """Config of a stage of data; see the module docstring for variants."""
  variants = {
    "stage1": _stage1,
    "stage2": _stage2,
    "stage3": _stage3,
    "stage4": _stage4,
    "stage5": _stage5,
    "stage6": _stage6,
    "tiny": _tiny,
  }
  return common.choose(arg, variants)()
