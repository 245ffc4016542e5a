# SPDX-License-Identifier: Apache-2.0
"""Tiles equal the whole pass, their halos are tight, memory is bounded."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import relative

from qi2_jax.errors import InputError
from qi2_jax.models import attention, vae_blocks, vae_tiling
from qi2_jax.models.vae import PRESETS, VAE, VAEConfig, init_variables

# The public structure, narrow; and the small one with folded patches.
FULL = VAEConfig(base_dim=8, decoder_base_dim=8, z_dim=4, num_res_blocks=1)
PATCHED = dataclasses.replace(
  tiny_models.VAE, patch_size=2, dim_mult=(1, 2, 2, 2),
  temporal_downsample=(False, True, True),
)  # fmt: skip


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def random_variables(config):
  """Noise everywhere; the output stays inside [-1, 1], so no clip hides."""
  shapes = jax.eval_shape(
    lambda: init_variables(VAE(config), jax.random.key(0))
  )
  ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes["params"])
  params = tiny_models.randomise(ones)
  head = params["decoder"]["conv_out"]
  params["decoder"]["conv_out"] = jax.tree.map(lambda w: 0.1 * w, head)
  z = config.z_dim
  stats = {"mean": normal(z, seed=2), "std": 1 + 0.1 * jnp.arange(1.0 * z)}
  return {"params": params, "latent_stats": stats}


@pytest.fixture(scope="module", params=[FULL, PATCHED], ids=["f16", "patched"])
def case(request):
  """`(vae, variables, latents, decoded, image, encoded)`, whole."""
  vae, variables = VAE(request.param), random_variables(request.param)
  apply = jax.jit(vae.apply, static_argnames="method")
  z = normal(1, 33, 48, request.param.z_dim, seed=3)
  channels = request.param.image_channels
  image = 0.5 * normal(1, 33 * 16, 48 * 16, channels, seed=4)
  decoded = apply(variables, z, method="decode")
  assert 0.05 < np.abs(decoded).max() < 1
  return vae, variables, z, decoded, image, apply(
    variables, image, method="encode"
  )  # fmt: skip


@pytest.mark.parametrize("tile", [16, 7])
def test_tiles_equal_the_whole_decoder(case, tile):
  vae, variables, z, decoded, _, _ = case
  ours = vae_tiling.tiled_decode(vae, variables, z, tile=tile)
  assert relative(ours, decoded) <= 1e-5
  error = np.asarray(ours, np.float64) - np.asarray(decoded)
  assert 10 * math.log10(4 / np.mean(error**2)) >= 100  # dB, peak 2


@pytest.mark.parametrize("tile", [16, 7])
def test_tiles_equal_the_whole_encoder(case, tile):
  vae, variables, _, _, image, encoded = case
  ours = vae_tiling.tiled_encode(vae, variables, image, tile=tile)
  assert relative(ours, encoded) <= 1e-5


def test_a_tile_larger_than_the_image_is_the_image(case):
  vae, variables, z, decoded, _, _ = case
  ours = vae_tiling.tiled_decode(vae, variables, z, tile=100)
  assert relative(ours, decoded) <= 1e-6


def without_halo(case, monkeypatch):
  """Relative error of the decoder with tiles that carry no neighbours."""
  vae, variables, z, decoded, _, _ = case
  monkeypatch.setattr(vae_tiling, "halos", lambda s: (0,) * (len(s) + 1))
  # A fresh function: traces are cached by function, not by `halos`.
  run = vae_tiling.tiled_decode.__wrapped__
  return relative(jax.jit(lambda z: run(vae, variables, z))(z), decoded)


def test_tiles_without_halo_leave_seams(case, monkeypatch):
  assert without_halo(case, monkeypatch) > 0.1


@pytest.mark.parametrize("first", range(6))
def test_the_halo_is_the_reach_to_the_pixel(first):
  """One NaN column spreads over exactly the halo, through all later parts."""
  vae = VAE(VAEConfig(base_dim=4, decoder_base_dim=4, z_dim=4))
  variables = random_variables(vae.config)
  stages = vae_tiling.decoder_stages(vae.config)[first:]
  halo = vae_tiling.halos(stages)[0]
  assert halo == (13, 13, 12, 10, 7, 1)[first]
  width = 2 * halo + 9
  at = halo + 4
  dims = [8, 8, 8, 4, 2, 1]
  x = normal(1, 1, width, 4 * dims[first]).at[:, :, at].set(jnp.nan)

  @jax.jit
  def run(variables, x):
    for stage in stages:
      x = vae.apply(variables, x, method=stage.run)
    return x

  out = np.asarray(run(variables, x))
  factor = out.shape[2] // width
  columns = np.flatnonzero(np.isnan(out).any(axis=(0, 1, 3))) // factor
  assert (columns.min(), columns.max()) == (at - halo, at + halo)


def test_stages_that_shrink_keep_their_grid():
  for config in (FULL, PATCHED, PRESETS["qwen_image_2_1"]):
    stages = vae_tiling.encoder_stages(config)
    for stage, halo in zip(stages, vae_tiling.halos(stages)):
      assert stage.scale != vae_tiling.DOWN or halo % 2 == 0


def largest_buffer(fn, *args):
  """Elements of the largest array of the compiled program."""
  program = jax.jit(fn).lower(*args).compile().as_text()
  shapes = re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", program)
  return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_2048_px_decode_holds_no_large_array():
  """Neither all scores of 16,384 tokens nor a full-resolution map exist."""
  config = VAEConfig(base_dim=16, decoder_base_dim=16, z_dim=4)
  vae = VAE(config)
  variables = jax.eval_shape(lambda: init_variables(vae, jax.random.key(0)))
  z = jax.ShapeDtypeStruct((1, 128, 128, 4), jnp.float32)
  tokens = 128 * 128
  size = largest_buffer(lambda v, z: vae_tiling.decode(vae, v, z), variables, z)
  # The image itself, or one chunk of scores.
  assert size == max(4 * 2048**2, attention.CHUNK * tokens)
  assert size < min(tokens**2, 16 * 2048**2)
  whole = largest_buffer(
    lambda v, z: vae.apply(v, z, method="decode"), variables, z
  )
  assert whole >= 32 * 2048**2


def test_2048_px_encode_holds_no_large_array():
  config = VAEConfig(base_dim=32, decoder_base_dim=16, z_dim=4)
  vae = VAE(config)
  variables = jax.eval_shape(lambda: init_variables(vae, jax.random.key(0)))
  x = jax.ShapeDtypeStruct((1, 2048, 2048, 4), jnp.float32)
  size = largest_buffer(lambda v, x: vae_tiling.encode(vae, v, x), variables, x)
  # The first level's result at half resolution, padded in the loop at most.
  assert size <= 32 * 1024**2
  whole = largest_buffer(
    lambda v, x: vae.apply(v, x, method="encode"), variables, x
  )
  assert whole >= 32 * 2048**2


@pytest.mark.parametrize(
  "size, expected",
  [((2048, 2048), True), ((1536, 2752), True), ((1024, 1024), False),
   ((2048, 1024), False)],
)  # fmt: skip
def test_which_sizes_are_tiled(size, expected):
  assert vae_tiling.needs_tiling(*size) is expected


@pytest.mark.parametrize("limit", [1, 10**9], ids=["tiled", "whole"])
def test_either_path_gives_the_image(case, limit, monkeypatch):
  vae, variables, z, decoded, image, encoded = case
  monkeypatch.setattr(vae_tiling, "TILED_PIXELS", limit)
  for run, x, whole in (
    (vae_tiling.decode, z, decoded), (vae_tiling.encode, image, encoded)
  ):  # fmt: skip
    ours = jax.jit(lambda x, run=run: run(vae, variables, x))(x)
    assert relative(ours, whole) <= 1e-5


def test_bad_sizes_are_named(case):
  vae, variables, z, _, image, _ = case
  with pytest.raises(InputError, match="tile of 0 latents"):
    vae_tiling.tiled_decode(vae, variables, z, tile=0)
  with pytest.raises(InputError, match="multiples of 16 px"):
    vae_tiling.tiled_encode(vae, variables, image[:, :-1])


def enlarge_then_convolve(x, kernel):
  x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def test_folded_upsampling_equals_the_enlarged_convolution():
  x, kernel = normal(2, 3, 5, 6), normal(3, 3, 6, 4, seed=1)
  ours = vae_blocks.upsample_conv(x, kernel)
  assert relative(ours, enlarge_then_convolve(x, kernel)) <= 1e-6
  weights = normal(*ours.shape, seed=2)
  grads = [
    jax.grad(lambda x, k, f=f: (f(x, k) * weights).sum(), (0, 1))(x, kernel)
    for f in (vae_blocks.upsample_conv, enlarge_then_convolve)
  ]
  for a, b in zip(*grads):
    assert relative(a, b) <= 1e-6
