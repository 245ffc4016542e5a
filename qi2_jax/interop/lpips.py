# SPDX-License-Identifier: Apache-2.0
"""LPIPS weights from local files with the names of torchvision and `lpips`.

Two files make the network: torchvision's `vgg16` and the linear weights that
the `lpips` package ships as `lpips/weights/v0.1/vgg.pth`. Nothing is fetched,
and `.pth` files are not read, for that needs torch. Two lines convert one:

    state = torch.load("vgg16.pth", map_location="cpu", weights_only=True)
    safetensors.torch.save_file(state, "vgg16.safetensors")
"""

import os
import re
import zipfile

import jax
import numpy as np
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.interop import mapping
from qi2_jax.interop.mapping import Entry, convolution, vector
from qi2_jax.interop.safetensors_io import open_tensors
from qi2_jax.models import lpips as model_lib
from qi2_jax.models.lpips import LPIPS, LPIPSConfig

# What `vgg16` has beyond the convolutions.
_IGNORED = r"classifier\..*"
_LINEAR = r"lin\d\..*"


def table(config: LPIPSConfig):
  """The table of one config: Flax path -> `Entry`.

  torchvision numbers convolutions, activations and poolings in one row.
  """
  entries = {}
  index = 0
  for stage, depth in enumerate(config.depths, 1):
    for i in range(1, depth + 1):
      ours, theirs = f"vgg/conv{stage}_{i}", f"features.{index}"
      entries[f"{ours}/kernel"] = convolution(f"{theirs}.weight")
      entries[f"{ours}/bias"] = vector(f"{theirs}.bias")
      index += 2
    index += 1
  for i in range(len(config.widths)):
    entries[f"lin{i}"] = vector(f"lin{i}.model.1.weight", (1, -1, 1, 1))

  def entry(path: str) -> Entry:
    if path not in entries:
      raise InputError(f"parameter {path} has no counterpart in LPIPS.")
    return entries[path]

  return entry


def read_tensors(path: str, wanted: str) -> dict[str, np.ndarray]:
  """Tensors of a .safetensors or .npz file, as fp32.

  Args:
    path: of the file.
    wanted: regex of the names to read; a full match counts.

  Raises:
    InputError: the file is missing, damaged or of another kind.
  """
  if not os.path.isfile(path):
    raise InputError(f"{path} does not exist; pass a local weight file.")
  stem, ending = os.path.splitext(os.path.basename(path))
  if ending == ".safetensors":
    reader = open_tensors(os.path.dirname(path), stem)
    names = [n for n in reader.names if re.fullmatch(wanted, n)]
    arrays = {n: reader.view(n) for n in names}
  elif ending == ".npz":
    try:
      with np.load(path, allow_pickle=False) as archive:
        arrays = {n: archive[n] for n in archive if re.fullmatch(wanted, n)}
    except (ValueError, AttributeError, TypeError, zipfile.BadZipFile):
      raise InputError(f"{path} is no .npz archive; make it again.") from None
  else:
    raise InputError(
      f"{path} ends in {ending or 'nothing'}, but LPIPS weights are read from "
      ".safetensors or .npz; convert a .pth with torch.load and "
      "safetensors.torch.save_file (the two lines are in the docstring of "
      "qi2_jax.interop.lpips)."
    )
  return {n: np.asarray(a, np.float32) for n, a in arrays.items()}


def load(
  vgg_path: str, linear_path: str, *, config: LPIPSConfig | None = None
) -> tuple[LPIPS, dict]:
  """Reads the network; its parameters stay fp32.

  Args:
    vgg_path: torchvision's `vgg16` (not `vgg16_bn`), classifier or not.
    linear_path: linear weights of the `lpips` package, version 0.1.
    config: of another width or compute dtype; VGG16 in fp32 by default.

  Raises:
    InputError: a file is missing or damaged, or of another network.
  """
  config = config or LPIPSConfig()
  tensors = read_tensors(vgg_path, rf"(?!{_IGNORED}).*")
  tensors |= read_tensors(linear_path, _LINEAR)
  model = LPIPS(config)
  return model, mapping.import_tree(tensors, _abstract(model), table(config))


def random_features(
  key: jax.Array, *, config: LPIPSConfig | None = None
) -> tuple[LPIPS, dict]:
  """A stand-in of the same cost with random weights, and a loud warning.

  Args:
    key: of the weights.
    config: as in `load`.
  """
  logging.warning(
    "LPIPS RUNS WITH RANDOM FEATURES. Its values are no perceptual distance "
    "and cannot be compared with published ones; pass the weight files for "
    "anything but a test."
  )
  model = LPIPS(config or LPIPSConfig())
  return model, jax.jit(lambda k: model_lib.init_params(model, k))(key)


def _abstract(model: LPIPS):
  return jax.eval_shape(lambda: model_lib.init_params(model, jax.random.key(0)))
