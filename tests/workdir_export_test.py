# SPDX-License-Identifier: Apache-2.0
"""A trained workdir goes to diffusers and back into training."""

import os

import jax
import numpy as np
import pytest
import short_runs

from experiments import pretrain, sft
from qi2_jax import convert, train
from qi2_jax.errors import InputError
from qi2_jax.pipeline import Pipeline
from qi2_jax.training import workdir

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from qi2_jax import verify  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return short_runs.render(tmp_path_factory.mktemp("data") / "shapes", 16, 16)


def short(module, data, **fields):
  fields = {"num_steps": 2, "save_every": 0} | fields
  return short_runs.config(module, data, **fields)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
  """A workdir whose weights all matter: its head does not start at zero."""
  path = str(tmp_path_factory.mktemp("run") / "pretrain")
  fields = {"optimizer.learning_rate": 0.05, "ema_decay": 0.0}
  assert train.train(short(pretrain, data, **fields), path) == 0
  return path


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
  target = str(tmp_path_factory.mktemp("exported") / "pipeline")
  convert.export_workdir(run, target)
  return target


def draw(pipeline, noise, images=()):
  return pipeline(
    ["the letter B in red"], images=images, latents=noise, steps=4,
    guidance=3.0, resolution=64, height=64, width=64,
  )[0]  # fmt: skip


def test_diffusers_makes_the_same_image(run, exported):
  noise = np.random.default_rng(0).normal(size=(1, 4, 4, 64))
  noise = noise.astype(np.float32)
  photo = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
  ours = Pipeline.load(run)
  theirs = verify.torch_pipeline(exported, "float32")
  for images in ((), (photo,)):
    expected = theirs(
      "the letter B in red", image=list(images) or None, negative_prompt="",
      true_cfg_scale=3.0, latents=torch.tensor(noise.reshape(1, 16, 64)),
      height=64, width=64, num_inference_steps=4, output_resolution=64,
      output_type="np",
    ).images[0]  # fmt: skip
    assert verify.psnr(draw(ours, noise, images), expected) >= 60
    again = Pipeline.load(exported, "float32")
    assert verify.psnr(draw(again, noise, images), expected) >= 60
    assert expected.std() > 0.01


def test_every_weight_is_there_bit_for_bit(run, exported):
  model = diffusers.QwenImage21Transformer2DModel.from_pretrained(
    os.path.join(exported, "transformer")
  )
  ema = workdir.load(run).params
  ours = np.asarray(ema["blocks"]["mlp"]["gate"]["kernel"])
  for i, block in enumerate(model.transformer_blocks):
    theirs = block.img_mlp.gate_layer.weight.detach().numpy().T
    np.testing.assert_array_equal(ours[i], theirs)
  _, report = diffusers.AutoencoderKLQwenImage21.from_pretrained(
    os.path.join(exported, "vae"), output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]


def test_training_goes_on_from_an_exported_folder(
  run, exported, data, tmp_path
):
  """MMDiT, VAE and encoder all come from the folder."""
  fields = {
    "init": exported, "vae.path": exported, "text.path": exported,
    "optimizer.learning_rate": 0.0, "num_steps": 1,
  }  # fmt: skip
  path = str(tmp_path / "sft")
  assert train.train(short(sft, data, **fields), path) == 0
  first, second = Pipeline.load(run), Pipeline.load(path)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8),
    first.params, second.params,
  )  # fmt: skip
  assert "random" not in second.notes[0]
  noise = np.random.default_rng(0).normal(size=(1, 4, 4, 64))
  noise = noise.astype(np.float32)
  np.testing.assert_allclose(draw(first, noise), draw(second, noise), atol=1e-5)
  # The run's export copies the encoder that it was trained with.
  target = str(tmp_path / "again")
  convert.export_workdir(path, target, dtype="bfloat16")
  third = Pipeline.load(target, "float32")
  assert verify.psnr(draw(third, noise), draw(first, noise)) > 25
  changed = dict(fields) | {"model.preset": "qwen_image_2_1"}
  with pytest.raises(InputError, match="is of another model"):
    train.train(short(sft, data, **changed), str(tmp_path / "other"))


def test_a_variant_without_counterpart_is_refused(data, tmp_path):
  path, target = str(tmp_path / "joint"), tmp_path / "out"
  fields = {"model.attention": "joint", "num_steps": 1}
  assert train.train(short(pretrain, data, **fields), path) == 0
  with pytest.raises(InputError, match="attention"):
    convert.export_workdir(path, str(target))
  assert not target.exists() and len(list(tmp_path.iterdir())) == 1
