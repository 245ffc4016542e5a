# SPDX-License-Identifier: Apache-2.0
"""Aesthetic and preference heads from local files.

Two layouts are read, both .safetensors: `layers.N.weight` and `.bias` (the
improved-aesthetic-predictor on CLIP ViT-L/14; other numbers of layers and
widths too), and a single `weight` and `bias` (LAION's first, linear one).
They are published as .pth, which only torch can read; this converts one:

    import safetensors.torch, torch
    state = torch.load("sac+logos+ava1-l14-linearMSE.pth",
                       map_location="cpu", weights_only=True)
    safetensors.torch.save_file(state, "aesthetic.safetensors")

A head belongs to one model: it rates only that model's embeddings.
"""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.interop import safetensors_io
from qi2_jax.models.aesthetic import Head

# In place of a file: `random_head`.
RANDOM = "random"


def _order(name: str) -> int:
  return int(re.findall(r"\d+", name)[-1]) if re.search(r"\d", name) else 0


def _check(path: str, layers, width: int) -> None:
  """Widths must follow from one another, from `width` to 1."""
  for number, (kernel_IO, bias_O) in enumerate(layers):
    if kernel_IO.ndim != 2 or bias_O.shape != kernel_IO.shape[1:]:
      raise InputError(
        f"layer {number} of {path} has a weight of shape "
        f"{kernel_IO.T.shape} and a bias of shape {bias_O.shape}, which is no "
        "linear layer; convert the file again."
      )
    if kernel_IO.shape[0] != width:
      raise InputError(
        f"layer {number} of {path} takes {kernel_IO.shape[0]} channels but "
        f"gets {width}; use the head that was trained on this model."
      )
    width = kernel_IO.shape[1]
  if width != 1:
    raise InputError(f"{path} gives {width} values per image, not one mark.")


def load(path: str, width: int) -> Head:
  """Reads a head, in fp32.

  Args:
    path: of the .safetensors file, or `RANDOM`.
    width: of the embeddings that it will rate.

  Raises:
    InputError: the file is missing, damaged, of another layout, or for
      embeddings of another width.
  """
  if path == RANDOM:
    return random_head(jax.random.key(0), width)
  stem, ending = os.path.splitext(os.path.basename(path))
  if ending != ".safetensors" or not os.path.isfile(path):
    raise InputError(
      f"{path} is no .safetensors file; convert the published .pth as the "
      "docstring of qi2_jax.interop.aesthetic says."
    )
  reader = safetensors_io.open_tensors(os.path.dirname(path), stem)
  weights = [n for n in reader.names if re.fullmatch(r"(.*\.)?weight", n)]
  biases = {n.removesuffix("weight") + "bias" for n in weights}
  if not weights or set(reader.names) != set(weights) | biases:
    raise InputError(
      f"{path} holds {sorted(reader.names)[:4]}, but a head is a weight and a "
      "bias, or layers.N.weight and layers.N.bias; pass another file."
    )
  layers = [
    tuple(
      np.asarray(reader.read(n), np.float32)
      for n in (name, name.removesuffix("weight") + "bias")
    )
    for name in sorted(weights, key=_order)
  ]
  layers = [(weight.T, bias) for weight, bias in layers]
  _check(path, layers, width)
  return [(jnp.asarray(kernel), jnp.asarray(bias)) for kernel, bias in layers]


def random_head(key: jax.Array, width: int) -> Head:
  """A stand-in with random weights, and a loud warning."""
  logging.warning(
    "THE AESTHETIC HEAD HAS RANDOM WEIGHTS. Its marks mean nothing; pass a "
    "file for anything but a test."
  )
  return [(jax.random.normal(key, (width, 1)), jnp.zeros((1,)))]
