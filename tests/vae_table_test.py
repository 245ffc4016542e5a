# SPDX-License-Identifier: Apache-2.0
"""The table of VAEs on tiny random models of several diffusers classes."""

import benchmark_program
import numpy as np
import pytest
from PIL import Image

from experiments import evaluate as config_file
from qi2_jax import evaluate_vae
from qi2_jax.errors import InputError

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def program():
  with benchmark_program.loaded("vae_table") as module:
    yield module


def kl():
  """Stable Diffusion's class, factor 2."""
  return diffusers.AutoencoderKL(
    block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
  )  # fmt: skip


def wan():
  """Wan 2.1's class for video, factor 8."""
  return diffusers.AutoencoderKLWan(base_dim=4, z_dim=2, num_res_blocks=1)


def own():
  """The class that runs in JAX, factor 4."""
  return diffusers.AutoencoderKLQwenImage21(
    base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 2, 2],
    num_res_blocks=1, is_residual=True, in_channels=3, out_channels=3,
    temperal_downsample=[False, True], attn_scales=[],
    latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    scale_factor_spatial=4, scale_factor_temporal=2,
  )  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  import tiny_folder

  root = tmp_path_factory.mktemp("models")
  out = {}
  for make in (kl, wan, own):
    model = tiny_folder.randomise(make(), 0)
    # A pipeline folder holds its VAE as `vae`; one of them stands for it.
    out[make.__name__] = str(root / make.__name__)
    model.save_pretrained(root / make.__name__ / ("vae" if make is kl else "."))
  return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for i in range(2):
    coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((22, 18)).save(path / f"{i}.png")
  return str(path)


def test_all_classes_are_in_one_table(program, paths, data, tmp_path):
  config = config_file.get_config("vae")
  found = program.models(list(paths.values()), config, "cpu")
  out = evaluate_vae.evaluate(found, config, data, str(tmp_path / "out"))
  assert list(out["models"]) == list(paths)
  for model in out["models"].values():
    assert model["images"] == 2 and min(model["parameters"].values()) > 100
    assert np.isfinite(model["figures"]["psnr"]["mean"])
  assert len({m["figures"]["psnr"]["mean"] for m in out["models"].values()}) > 2


def test_both_sides_reconstruct_our_class_alike(program, paths):
  """The torch path on the class that usually runs in JAX."""
  rng = np.random.default_rng(1)
  coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
  image = np.array(Image.fromarray(coarse).resize((24, 20)))
  config = config_file.get_config("vae")
  ((_, ours, size),) = evaluate_vae.models([paths["own"]], config)
  model = program.load_torch(paths["own"], "cpu")
  theirs = program.torch_reconstructor(model)([image])[0]
  assert theirs.shape == image.shape and theirs.std() > 5
  gap = np.abs(np.int16(ours([image])[0]) - np.int16(theirs))
  assert gap.max() <= 1
  assert program.torch_sizes(model)["decoder"] >= size["decoder"]


@pytest.mark.parametrize("name, expected", [("kl", 2), ("wan", 8), ("own", 4)])
def test_factors(program, paths, name, expected):
  assert program.factor(program.load_torch(paths[name], "cpu")) == expected


def test_bad_folders_are_named(program, tmp_path):
  with pytest.raises(InputError, match="holds no VAE"):
    program.class_name(str(tmp_path))
  (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderMagic"}')
  with pytest.raises(InputError, match="AutoencoderMagic"):
    program.load_torch(str(tmp_path), "cpu")
