# SPDX-License-Identifier: Apache-2.0
"""Aesthetic heads equal the same layers in torch."""

import itertools

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.interop import aesthetic
from qi2_jax.models.aesthetic import rate

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


class Predictor(torch.nn.Module):
  """The published shape: dropouts between the layers, no activation.

  More than ten layers, so that their names do not sort as texts do.
  """

  def __init__(self, widths):
    super().__init__()
    parts = []
    for a, b in itertools.pairwise(widths):
      parts += [torch.nn.Linear(a, b), torch.nn.Dropout(0.2)]
    self.layers = torch.nn.Sequential(*parts[:-1])

  def forward(self, x):
    return self.layers(x)


def embeddings(width):
  x = np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("widths", [
  (24, 40, 16, 8, 4, 1), (12, 12, 12, 12, 12, 12, 12, 1), (9, 1),
])  # fmt: skip
def test_marks_equal_torch(widths, tmp_path):
  torch.manual_seed(0)
  model = Predictor(widths).eval()
  file = tmp_path / "head.safetensors"
  safetensors_torch.save_file(model.state_dict(), file)
  x = embeddings(widths[0])
  with torch.no_grad():
    theirs = model(torch.tensor(x))[:, 0].numpy()
  ours = rate(aesthetic.load(str(file), widths[0]), x)
  assert np.abs(ours - theirs).max() <= 1e-6 and theirs.std() > 1e-4


def test_the_linear_head_equals_torch(tmp_path):
  model = torch.nn.Linear(20, 1)
  file = tmp_path / "linear.safetensors"
  safetensors_torch.save_file(model.state_dict(), file)
  x = embeddings(20)
  with torch.no_grad():
    theirs = model(torch.tensor(x))[:, 0].numpy()
  ours = rate(aesthetic.load(str(file), 20), x)
  np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("tensors, message", [
  ({"weight": (1, 9)}, "a head is a weight and a bias"),
  ({"weight": (1, 9), "bias": (1,), "scale": (1,)}, "a head is"),
  ({"w": (1, 9)}, "a head is"),
  ({"weight": (1, 8), "bias": (1,)}, "takes 8 channels but gets 9"),
  ({"weight": (2, 9), "bias": (2,)}, "2 values per image"),
  ({"weight": (2, 9), "bias": (1,)}, "no linear layer"),
  ({"layers.0.weight": (4, 9), "layers.0.bias": (4,),
    "layers.2.weight": (1, 3), "layers.2.bias": (1,)}, "layer 1 of"),
])  # fmt: skip
def test_other_files_are_named(tensors, message, tmp_path):
  file = tmp_path / "head.safetensors"
  safetensors.numpy.save_file(
    {name: np.zeros(shape, np.float32) for name, shape in tensors.items()},
    file,
  )
  with pytest.raises(InputError, match=message):
    aesthetic.load(str(file), 9)


def test_missing_and_foreign_files_are_named(tmp_path):
  (tmp_path / "head.pth").write_bytes(b"x")
  for name in ("head.pth", "none.safetensors"):
    with pytest.raises(InputError, match="convert the published"):
      aesthetic.load(str(tmp_path / name), 9)


def test_random_marks_warn_loudly(monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda text: said.append(text))
  marks = rate(aesthetic.load("random", 9), jax.numpy.asarray(embeddings(9)))
  assert "RANDOM WEIGHTS" in said[0] and np.std(marks) > 0
