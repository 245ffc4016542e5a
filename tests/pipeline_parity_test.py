# SPDX-License-Identifier: Apache-2.0
"""The sampler equals diffusers' QwenImage21Pipeline, folder in, image out."""

import types

import numpy as np
import pytest
from PIL import Image

from qi2_jax import sample
from qi2_jax.errors import InputError
from qi2_jax.pipeline import Pipeline

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import tiny_folder  # noqa: E402

from qi2_jax import verify  # noqa: E402

DEFAULTS = {
  "prompt": None, "prompts": None, "negative_prompt": "", "image": [],
  "size": None, "height": None, "width": None, "resolution": None,
  "steps": None, "guidance": None, "seed": 0, "num": 1, "batch_size": None,
  "latents": None, "dtype": "float32", "lora": [], "devices": None,
}  # fmt: skip


def run(**values):
  """What `python -m qi2_jax.sample` does with these flags."""
  return sample.run(types.SimpleNamespace(**(DEFAULTS | values)))


def make(tmp_path, model, noise, **values):
  """The .npy that the command writes for given starting noise."""
  latents, out = tmp_path / "latents.npy", tmp_path / "out.npy"
  np.save(latents, noise)
  assert run(model=model, latents=str(latents), out=str(out), **values) == 0
  return np.load(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_folder.create(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def reference(folder):
  return verify.torch_pipeline(folder, "float32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A half-transparent RGBA image and an RGB one, neither square."""
  rng = np.random.default_rng(3)
  paths = []
  for n, shape in enumerate([(50, 90, 4), (96, 61, 3)]):
    path = tmp_path_factory.mktemp("photos") / f"{n}.png"
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    paths.append(str(path))
  return paths


def noise(height, width, seed=0):
  shape = (1, height // 16, width // 16, tiny_folder.Z)
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def theirs(pipeline, prompt, latents, paths=(), **options):
  """The image of diffusers, `[H, W, 4]` in [0, 1]."""
  flat = torch.tensor(latents.reshape(1, -1, latents.shape[-1]))
  images = [Image.open(path) for path in paths] or None
  return pipeline(
    prompt, image=images, latents=flat, output_type="np", **options
  ).images[0]  # fmt: skip


PROMPTS = {
  1.0: {},
  4.0: {"negative_prompt": "a blue square"},
}


@pytest.mark.parametrize("guidance", PROMPTS)
def test_text_to_image(folder, reference, tmp_path, guidance):
  start = noise(64, 96)
  prompt = 'a red circle, 汉字 "Qi2"'
  ours = make(
    tmp_path, folder, start, prompt=prompt, height=64, width=96, steps=8,
    guidance=guidance, **PROMPTS[guidance],
  )  # fmt: skip
  expected = theirs(
    reference, prompt, start, height=64, width=96, num_inference_steps=8,
    true_cfg_scale=guidance, **PROMPTS[guidance],
  )  # fmt: skip
  assert ours.shape == expected.shape == (64, 96, 4)
  assert verify.psnr(ours, expected) >= 60
  # Random weights must not have saturated the image into agreement.
  assert expected.std() > 0.05 and (np.abs(expected - 0.5) < 0.49).mean() > 0.5


@pytest.mark.parametrize("guidance", PROMPTS)
def test_edit_with_two_references(
  folder, reference, photos, tmp_path, guidance
):
  """The size comes from the last reference, at the same area."""
  start = noise(96, 64)
  prompt = "put <image1> into <image2>"
  ours = make(
    tmp_path, folder, start, prompt=prompt, image=photos, resolution=80,
    steps=8, guidance=guidance, **PROMPTS[guidance],
  )  # fmt: skip
  expected = theirs(
    reference, prompt, start, photos, output_resolution=80,
    num_inference_steps=8, true_cfg_scale=guidance, **PROMPTS[guidance],
  )  # fmt: skip
  assert ours.shape == expected.shape == (96, 64, 4)
  assert verify.psnr(ours, expected) >= 60
  swapped = make(
    tmp_path, folder, start, prompt=prompt, image=photos[::-1],
    height=96, width=64, resolution=80, steps=8, guidance=guidance,
    **PROMPTS[guidance],
  )  # fmt: skip
  assert verify.psnr(swapped, expected) < 40


def test_two_devices_share_the_weights(folder, photos, tmp_path):
  start = noise(96, 64)
  options = {
    "prompt": "put <image1> into <image2>", "image": photos,
    "resolution": 80, "steps": 4, "guidance": 4.0,
  }  # fmt: skip
  one = make(tmp_path, folder, start, **options)
  two = make(tmp_path, folder, start, devices=2, **options)
  assert verify.psnr(two, one) >= 90
  pipeline = Pipeline.load(folder, "float32", 2)
  kernels = {
    "gate": pipeline.params["blocks"]["mlp"]["gate"]["kernel"],
    "encoder": pipeline.frozen.encoder["layers"]["mlp"]["gate"]["kernel"],
  }
  for kernel in kernels.values():
    shard = kernel.addressable_shards[0].data
    assert shard.size == kernel.size // 2
  with pytest.raises(InputError, match="cannot split 2 attention heads"):
    Pipeline.load(folder, "float32", 4)


def test_an_empty_prompt_is_one_space(folder, reference, tmp_path):
  start = noise(64, 64, 5)
  ours = make(tmp_path, folder, start, prompt="", height=64, width=64, steps=2)
  expected = theirs(
    reference, "", start, height=64, width=64, num_inference_steps=2
  )
  assert verify.psnr(ours, expected) >= 60


def test_turbo_uses_the_levels_of_its_model_index(tmp_path):
  model = tiny_folder.create(tmp_path / "turbo", turbo=True)
  start = noise(64, 64)
  ours = make(tmp_path, model, start, prompt="a cat", height=64, width=64)
  expected = theirs(
    verify.torch_pipeline(model, "float32"), "a cat", start, height=64,
    width=64,
  )  # fmt: skip
  assert verify.psnr(ours, expected) >= 60
  pipeline = Pipeline.load(model)
  levels = pipeline.sampling.levels(16)
  np.testing.assert_array_equal(
    levels, np.float32([*tiny_folder.TURBO_SIGMAS, 0])
  )


def test_bf16_follows_the_public_pipeline(folder, tmp_path):
  """Rounding decides here, so the bar is a likeness, not an equality."""
  pipeline = verify.torch_pipeline(folder, "bfloat16")
  start = noise(64, 64)
  ours = make(
    tmp_path, folder, start, prompt="a red cat", height=64, width=64,
    steps=8, dtype="bfloat16",
  )  # fmt: skip
  expected = theirs(
    pipeline, "a red cat", start, height=64, width=64, num_inference_steps=8
  )
  assert verify.psnr(ours, expected) >= 25
