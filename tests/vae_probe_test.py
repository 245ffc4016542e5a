# SPDX-License-Identifier: Apache-2.0
"""The probe of latents: a known answer, and a teacher that loads again."""

import benchmark_program
import jax
import numpy as np
import pytest

from data_pipelines.shapes import vocabulary as vocab
from qi2_jax.errors import InputError
from qi2_jax.interop import dinov2 as files
from qi2_jax.models import dinov2


@pytest.fixture(scope="module")
def program():
  with benchmark_program.loaded("vae_probe") as module:
    yield module


def test_a_linear_attribute_is_found_and_noise_is_not(program):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1200, 8)) * 3 + 5
  y = np.int64(x[:, 0] + x[:, 1] > 10)
  predict = program.fit_probe(x[:800], y[:800])
  assert np.mean(predict(x[800:]) == y[800:]) > 0.95
  noise = rng.integers(0, 2, 1200)
  predict = program.fit_probe(x[:800], noise[:800])
  assert abs(np.mean(predict(x[800:]) == noise[800:]) - 0.5) < 0.1


def test_labels_say_what_is_drawn(program):
  images, made = program.scenes("counting", "seen", 12)
  assert images.shape == (12, 64, 64, 3) and images.dtype == np.uint8
  for scene in made:
    assert program.label("count", scene) + 1 == len(scene.items)
    found = program.presence(scene)
    shape = vocab.SHAPES[program.label("shape", scene)]
    assert found[vocab.SHAPES.index(shape)] == 1
    assert found[-4:].sum() == 1 and found[-5 + len(scene.items)] == 1
  other, _ = program.scenes("counting", "held_out", 12)
  assert not np.array_equal(images, other)


def test_the_probe_reads_colours_from_mean_colours(program):
  """Mean RGB tells a shape's colour, not its form and not a count."""

  def encode(images):
    dark = 255.0 - images.mean(axis=(1, 2))
    return dark / np.linalg.norm(dark, axis=1, keepdims=True)

  scores = program.probe(encode, 300)
  # A line through three channels tells most of six colours apart.
  assert scores["colour"] > 0.6
  assert scores["shape"] < 0.45 and scores["count"] < 0.6


def test_a_saved_teacher_is_read_as_dinov2(program, tmp_path):
  config = dinov2.PRESETS["tiny"]
  model = dinov2.DINOv2(config)
  params = dinov2.init_params(model, jax.random.key(1))
  path = str(tmp_path / "teacher")
  program.save_teacher(path, config, params)
  loaded, read = files.load(path)
  assert loaded.config == config
  jax.tree.map(np.testing.assert_array_equal, read, params)
  with pytest.raises(InputError, match="exists"):
    program.save_teacher(path, config, params)
