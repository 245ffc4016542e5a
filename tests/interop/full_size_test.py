# SPDX-License-Identifier: Apache-2.0
"""The full-size presets are the public models, checked without weights."""

import collections
import math

import jax
import ml_dtypes
import numpy as np
import pytest

from qi2_jax.interop import mapping, mmdit, model_folder, vae
from qi2_jax.models.mmdit import PRESETS as MMDIT_PRESETS
from qi2_jax.models.vae import PRESETS as VAE_PRESETS
from qi2_jax.parallel.sharding import path_name

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

MMDIT = MMDIT_PRESETS["qwen_image_2_1"]
VAE = VAE_PRESETS["qwen_image_2_1"]
# Our top-level names of the parts that diffusers names otherwise.
PARTS = {
  "blocks": "transformer_blocks",
  "time_embedder": "time_text_embed",
}


@pytest.fixture(scope="module")
def their_mmdit():
  with torch.device("meta"):
    return diffusers.QwenImage21Transformer2DModel()


@pytest.fixture(scope="module")
def their_vae():
  with torch.device("meta"):
    return diffusers.AutoencoderKLQwenImage21()


def counts(shapes):
  """Parameters per first component of the name."""
  out = collections.Counter()
  for name, shape in shapes.items():
    out[name.replace("/", ".").split(".")[0]] += math.prod(shape)
  return out


def ours(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): leaf.shape for path, leaf in leaves}


def theirs(module):
  return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def plan(tree, table):
  """Names and shapes of the whole export; the arrays own no memory."""
  zero = np.zeros((), ml_dtypes.bfloat16)
  fake = jax.tree.map(lambda a: np.broadcast_to(zero, a.shape), tree)
  items, _ = mapping.iter_export(fake, table)
  assert all(dtype == ml_dtypes.bfloat16 for _, _, dtype in items)
  out = {name: tuple(shape) for name, shape, _ in items}
  assert len(out) == len(items)
  return out


def test_the_mmdit_is_the_public_one(their_mmdit):
  tree = model_folder.abstract_mmdit(MMDIT)
  mine, reference = counts(ours(tree)), counts(theirs(their_mmdit))
  assert {PARTS.get(k, k): v for k, v in mine.items()} == reference
  assert sum(mine.values()) == 7_115_124_736
  exported = plan(tree, mmdit.table)
  assert exported == theirs(their_mmdit)
  assert len(exported) == 32 * 9 + 9


def test_the_vae_is_the_public_one(their_vae):
  tree = model_folder.abstract_vae(VAE)
  mine, reference = counts(ours(tree)), counts(theirs(their_vae))
  assert mine == reference
  # The report counts the 1x1 heads with their halves.
  encoder = mine["encoder"] + mine["quant_conv"]
  decoder = mine["decoder"] + mine["post_quant_conv"]
  assert round(encoder / 1e6, 2) == 78.69
  assert round(decoder / 1e6, 2) == 259.05
  assert plan(tree, vae.table) == theirs(their_vae)


def test_the_published_configs_are_the_presets(their_mmdit, their_vae):
  def plain(config):
    out = {k: v for k, v in config.items() if not k.startswith("_")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}

  made = mmdit.published(MMDIT)
  assert plain(made) == plain(their_mmdit.config)
  stats = vae.latent_stats(their_vae.config)
  # The statistics of the public VAE survive fp32 and back, digit by digit.
  assert plain(vae.published(VAE, stats)) == plain(their_vae.config)
  read = mmdit.config({"_class_name": mmdit.CLASS, **their_mmdit.config})
  assert read.num_layers == 32 and read.width == 4096
  assert mmdit.native(read)["qi2_jax"]["dtype"] == "float32"
  read = vae.config({"_class_name": vae.CLASS, **their_vae.config})
  assert read == VAE
