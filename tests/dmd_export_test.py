# SPDX-License-Identifier: Apache-2.0
"""A few-step student goes to diffusers, which makes the same image."""

import json
import pathlib

import dmd_workdir
import numpy as np
import pytest
from PIL import Image

from qi2_jax import convert
from qi2_jax.pipeline import Pipeline

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from qi2_jax import verify  # noqa: E402

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  return dmd_workdir.create(tmp_path_factory.mktemp("student") / "run")


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
  target = str(tmp_path_factory.mktemp("exported") / "pipeline")
  convert.export_model(student, target)
  return target


def ours(path, noise, images=()):
  pipeline = Pipeline.load(path, "float32")
  assert pipeline.sampling.sigmas == dmd_workdir.SIGMAS
  return pipeline(
    [PROMPT], latents=noise, images=images, resolution=64, height=64, width=64
  )[0]


@pytest.mark.parametrize("edit", [False, True])
def test_diffusers_makes_the_same_image_in_four_steps(student, exported, edit):
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(1, 4, 4, 64)).astype(np.float32)
  images = [Image.fromarray(rng.integers(0, 256, (64, 64, 4), np.uint8))]
  images = images if edit else []
  calls = []
  theirs = verify.torch_pipeline(exported, "float32")
  forward = theirs.transformer.forward

  def counting(*args, **kwargs):
    calls.append(1)
    return forward(*args, **kwargs)

  theirs.transformer.forward = counting
  # No step count, no guidance: the folder says it all.
  expected = theirs(
    PROMPT, image=images or None, output_resolution=64, height=64, width=64,
    latents=torch.tensor(noise.reshape(1, 16, 64)), output_type="np",
  ).images[0]  # fmt: skip
  assert len(calls) == 4
  for path in (student, exported):
    made = ours(path, noise, images)
    assert verify.psnr(made, expected) >= 60
  assert expected.std() > 0.02


def test_the_folder_says_how_to_sample(exported):
  def read(name):
    return json.loads(pathlib.Path(exported, name).read_text())

  assert read("model_index.json")["sample_sigmas"] == [*dmd_workdir.SIGMAS]
  schedule = read("scheduler/scheduler_config.json")
  assert schedule["use_dynamic_shifting"] is False
  assert schedule["shift_terminal"] is None
