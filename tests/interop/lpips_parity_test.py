# SPDX-License-Identifier: Apache-2.0
"""LPIPS equals the `lpips` package: random VGG16, its real linear weights."""

import pathlib
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from qi2_jax.errors import InputError
from qi2_jax.interop import lpips as interop
from qi2_jax.interop import mapping

torch = pytest.importorskip("torch")

WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M",
          512, 512, 512, "M")  # fmt: skip


def vgg16():
  """torchvision's module, He-initialised; only `features` is used."""
  generator = torch.Generator().manual_seed(0)
  layers, channels = [], 3
  for width in WIDTHS:
    if width == "M":
      layers.append(torch.nn.MaxPool2d(2, 2))
      continue
    conv = torch.nn.Conv2d(channels, width, 3, padding=1)
    with torch.no_grad():
      std = (2 / (9 * channels)) ** 0.5
      conv.weight.normal_(0, std, generator=generator)
      conv.bias.normal_(0, 0.1, generator=generator)
    layers += [conv, torch.nn.ReLU(inplace=True)]
    channels = width
  module = torch.nn.Module()
  module.features = torch.nn.Sequential(*layers)
  return module


@pytest.fixture(scope="module")
def reference():
  """The package's network and the random VGG16 inside it.

  The package asks torchvision for VGG16, which would download it.
  """
  vgg = vgg16()
  models = types.ModuleType("torchvision.models")
  models.vgg16 = lambda pretrained: vgg
  torchvision = types.ModuleType("torchvision")
  torchvision.models = models
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "torchvision", torchvision)
    patch.setitem(sys.modules, "torchvision.models", models)
    package = pytest.importorskip("lpips")
    network = package.LPIPS(net="vgg", verbose=False)
  # It holds the stand-in, which another test must not meet.
  for name in [n for n in sys.modules if n.partition(".")[0] == "lpips"]:
    del sys.modules[name]
  weights = pathlib.Path(package.__file__).parent / "weights/v0.1/vgg.pth"
  return network, vgg, torch.load(weights, map_location="cpu")


@pytest.fixture(scope="module")
def files(reference, tmp_path_factory):
  """Both files, the first with a classifier that must not be read."""
  _, vgg, linear = reference
  folder = tmp_path_factory.mktemp("lpips")
  state = {k: v.numpy() for k, v in vgg.state_dict().items()}
  state["classifier.0.weight"] = np.zeros((2, 3), np.float32)
  safetensors.numpy.save_file(state, folder / "vgg16.safetensors")
  linear = {k: v.numpy() for k, v in linear.items()}
  safetensors.numpy.save_file(linear, folder / "linear.safetensors")
  np.savez(folder / "linear.npz", **linear)
  return folder


@pytest.fixture(scope="module")
def ours(files):
  return interop.load(
    str(files / "vgg16.safetensors"), str(files / "linear.npz")
  )


# The odd size loses a border row at every pooling.
@pytest.mark.parametrize("size", [(32, 32), (45, 30)])
def test_value_and_gradient_equal_the_package(size, reference, ours):
  model, params = ours
  rng = np.random.default_rng(0)
  b = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
  a = (b + 0.2 * rng.normal(size=b.shape)).astype(np.float32)
  x, y = (torch.tensor(t).permute(0, 3, 1, 2) for t in (a, b))
  x.requires_grad_()
  theirs = reference[0](x, y)[:, 0, 0, 0]
  (gradient,) = torch.autograd.grad(theirs.sum(), x)

  def score(a, params):
    value = model.apply({"params": params}, a, b)
    return value.sum(), value

  # As an argument: XLA would spend long on folding weights it knows.
  run = jax.jit(jax.value_and_grad(score, has_aux=True))
  (_, value), mine = run(a, params)
  gradient = gradient.permute(0, 2, 3, 1).numpy()
  assert theirs.min() > 1e-2 and np.abs(gradient).max() > 1e-5
  assert np.abs(value - theirs.detach().numpy()).max() <= 1e-6
  assert np.abs(mine - gradient).max() <= 1e-8


def test_files_come_back_to_the_bit(reference, files, ours):
  model, params = ours
  exported = mapping.export_tree(params, interop.table(model.config))
  expected = {k: v.numpy() for k, v in reference[1].state_dict().items()}
  expected |= {k: v.numpy() for k, v in reference[2].items()}
  assert exported.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(exported[name], tensor, err_msg=name)
  vgg, linear = (str(files / f"{n}.safetensors") for n in ("vgg16", "linear"))
  _, again = interop.load(vgg, linear)
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_wrong_files_are_named(files, tmp_path):
  vgg, linear = str(files / "vgg16.safetensors"), str(files / "linear.npz")
  (tmp_path / "vgg16.pth").write_bytes(b"x")
  (tmp_path / "bad.npz").write_bytes(b"x")
  for first, second, message in (
    (str(tmp_path / "vgg16.pth"), linear, "convert a .pth"),
    (str(tmp_path / "none.npz"), linear, "does not exist"),
    (vgg, str(tmp_path / "bad.npz"), "no .npz archive"),
    (vgg, vgg, "no tensor lin0"),
    (linear, linear, "no tensor features.0"),
  ):
    with pytest.raises(InputError, match=message):
      interop.load(first, second)
  with pytest.raises(InputError, match="vgg/conv9_9/bias"):
    interop.table(interop.LPIPSConfig())("vgg/conv9_9/bias")
