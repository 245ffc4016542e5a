# SPDX-License-Identifier: Apache-2.0
"""Tiny models and inputs that several test files share."""

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.conditioning.layout import build_layout, num_slots
from qi2_jax.models.condition import Conditioning
from qi2_jax.models.mmdit import MMDiTConfig, init_params
from qi2_jax.models.vae import VAEConfig
from qi2_jax.parallel.sharding import path_name

MMDIT = MMDiTConfig(
  num_layers=2, num_heads=2, head_dim=16, context_dim=24, rope_axes=(4, 6, 6),
  latent_channels=8, remat="none",
)  # fmt: skip
VAE = VAEConfig(
  image_channels=3, patch_size=4, base_dim=8, decoder_base_dim=8, z_dim=4,
  dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(False, True),
  carry_temporal=False,
)  # fmt: skip


def randomise(params, seed=0):
  """Replaces every leaf by noise of a sane size, so that none can hide.

  Fresh models start with zero heads and unit norms; a test on them would not
  see half of the network.
  """
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    # Leaves of scanned blocks have a leading layer axis.
    shape = leaf.shape[path_name(path).startswith("blocks/") :]
    draw = rng.normal(size=leaf.shape).astype(np.float32)
    if len(shape) == 1:
      return jnp.asarray(leaf + 0.2 * draw)
    return jnp.asarray(draw / np.prod(shape[:-1]) ** 0.5)

  return jax.tree_util.tree_map_with_path(one, params)


def mmdit_params(model, seed=0):
  """Random parameters of an MMDiT, none of them zero."""
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  fresh = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
  return randomise(fresh, seed)


def slots_of(words, references):
  """Encoder tokens of a prompt: two openers, images in brackets, words."""
  is_slot = [False] * 2
  for grid in references:
    is_slot += [False] + [True] * num_slots(grid) + [False]
  return is_slot + [False] * words


def layouts(words, references, target, length):
  """One layout per entry of `words`, stacked."""
  made = [
    build_layout(slots_of(n, references), references, target, length)
    for n in words
  ]
  return jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *made)


def conditioning(
  config, *, words=(4, 7), references=(), target=(4, 6), length=None, seed=0
):
  """Random conditioning; row i has `words[i]` true words.

  Args:
    config: MMDiTConfig.
    words: prompt words of each row.
    references: latent grids.
    target: latent grid.
    length: padded text length; the longest row's by default.
    seed: of the states and latents, padding states included.
  """
  rng = np.random.default_rng(seed)
  length = length or len(slots_of(max(words), references))
  count = sum(h * w for h, w in references)
  size = len(words)
  text = rng.normal(size=(size, length, config.context_dim))
  latents = rng.normal(size=(size, count, config.latent_channels))
  return Conditioning(
    jnp.asarray(text, jnp.float32),
    jnp.asarray(latents, jnp.float32),
    layouts(words, references, target, length),
  )


def noise(config, size=2, target=(4, 6), seed=1):
  """Normal latents `[B, N, Z]`."""
  shape = (size, target[0] * target[1], config.latent_channels)
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


def relative(ours, theirs):
  """Largest difference over the largest magnitude."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  return np.abs(ours - theirs).max() / np.abs(theirs).max()
