# SPDX-License-Identifier: Apache-2.0
"""Rule-based scores on shapes and glyphs, or samples for a user's captions.

    python -m qi2_jax.evaluate --model=runs/sft \\
      --config=experiments/evaluate.py:shapes

Variants: `shapes` (100 samples per kind and split, half-width of the 95 %
intervals at most 0.10; a few minutes on 2 CPU cores), `demo` (fewer edits
and reference samples), `tiny` (4 samples each, a smoke test), `captions`
(needs --data: samples beside the images of a dataset folder) and `vae` (the
model is a VAE or several, comma-separated; needs --data, a dataset or a
folder of images).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments import common


def _shapes():
  config = ConfigDict()
  config.seed = 0
  config.splits = ("seen", "held_out")
  config.size = (64, 64)  # (height, width) of targets and sources
  config.kinds = (
    "single", "position", "counting", "relation", "glyph", "word",
  )  # fmt: skip
  config.edit_kinds = (
    "recolour", "remove", "add", "move", "replace", "retext",
  )  # fmt: skip
  # Samples per kind and split.
  config.n = 100
  config.n_edit = 100
  config.n_untrained = 100  # of the untrained model, per kind
  config.n_captions = 0
  # None keeps the run's own value.
  config.steps = placeholder(int)
  config.guidance = placeholder(float)
  config.batch_size = placeholder(int)
  # Samples per kind and split in the report.
  config.pictures = 12
  return config


def _demo():
  config = _shapes()
  config.n_edit = 50
  config.n_untrained = 25
  return config


def _tiny():
  config = _shapes()
  config.n = config.n_edit = config.n_untrained = 4
  config.steps = 4
  config.pictures = 4
  return config


def _captions():
  config = _shapes()
  config.n = config.n_edit = config.n_untrained = 0
  config.n_captions = 24
  config.pictures = 24
  return config


def _vae():
  config = ConfigDict()
  config.what = "vae"
  config.seed = 0
  config.count = 0  # images; 0: all
  # (height, width) they are cropped and resized to; (): as they are.
  config.size = ()
  config.batch_size = 8
  config.untrained = False  # one more row: random weights of the last model
  # "rapidocr" or "tesseract", if installed; "shapes": the rendered task's own
  # reader; "none".
  config.ocr = "none"
  # Local files, see experiments/vae.py; without them there is no LPIPS.
  config.lpips = ConfigDict(
    dict(
      vgg="",
      linear="",
      random_features=False,
      widths=(64, 128, 256, 512, 512),
    )
  )
  config.pictures = 12  # the worst, in the report
  return config


def get_config(arg="shapes"):
  """Config of an evaluation; see the module docstring for variants."""
  variants = {
    "shapes": _shapes,
    "demo": _demo,
    "tiny": _tiny,
    "captions": _captions,
    "vae": _vae,
  }
  return common.choose(arg, variants)()
