# SPDX-License-Identifier: Apache-2.0
"""One table per model drives import and export between Flax and diffusers.

A table is a function from a Flax path to `Entry`s. The Flax tree decides
what must exist, so a missing, leftover or misshapen tensor is an error that
names it, never a silent partial load.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.parallel.sharding import path_name


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one Flax leaf lives in a diffusers state dict.

  Attributes:
    name: tensor name; `{layer}` stands for the index of a scanned layer.
    to_torch: array of one layer -> array in torch's layout.
    to_flax: `(tensor, shape of one layer) -> array`, the inverse.
  """

  name: str
  to_torch: Callable[[np.ndarray], np.ndarray]
  to_flax: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]

  @property
  def scanned(self) -> bool:
    """Whether the Flax leaf stacks all layers on axis 0."""
    return "{layer}" in self.name


Table = Callable[[str], Entry]


def linear(name: str, inputs: int = 1) -> Entry:
  """Kernel `[in..., out...]` with `inputs` leading input axes <-> `[o, i]`."""
  return Entry(
    name,
    lambda a: np.ascontiguousarray(
      a.reshape(int(np.prod(a.shape[:inputs])), -1).T
    ),
    lambda t, shape: np.ascontiguousarray(t.T).reshape(shape),
  )


def vector(name: str, shape: tuple[int, ...] = (-1,)) -> Entry:
  """1-D parameter <-> the same values in torch's `shape`."""
  return Entry(
    name, lambda a: a.reshape(shape), lambda t, flax: t.reshape(flax)
  )


def convolution(name: str) -> Entry:
  """Kernel `[kh, kw, i, o]` or dense `[i, o]` <-> `[o, i, kh, kw]`."""

  def to_torch(a):
    a = a if a.ndim == 4 else a[None, None]
    return np.ascontiguousarray(a.transpose(3, 2, 0, 1))

  def to_flax(t, shape):
    return np.ascontiguousarray(t.transpose(2, 3, 1, 0)).reshape(shape)

  return Entry(name, to_torch, to_flax)


def _named(entry: Entry, shape) -> list[str]:
  if not entry.scanned:
    return [entry.name]
  return [entry.name.format(layer=i) for i in range(shape[0])]


def import_tree(tensors: Mapping[str, np.ndarray], abstract, table: Table):
  """Builds the Flax tree `abstract` from torch-layout tensors.

  Args:
    tensors: name -> numpy array, as on disk.
    abstract: pytree of arrays or ShapeDtypeStructs that fixes the result.
    table: Flax path -> `Entry`.

  Raises:
    InputError: a tensor is missing, left over or of another shape.
  """
  used = set()

  def one(name: str, entry: Entry, shape):
    if name not in tensors:
      raise InputError(
        f"the checkpoint has no tensor {name}; it is not of this model."
      )
    used.add(name)
    tensor = np.asarray(tensors[name])
    expected = entry.to_torch(np.empty(shape, tensor.dtype)).shape
    if tensor.shape != expected:
      raise InputError(
        f"tensor {name} has shape {tensor.shape} but this model config "
        f"needs {expected}; check the model preset."
      )
    return entry.to_flax(tensor, shape)

  def leaf(path, value):
    entry = table(path_name(path))
    names = _named(entry, value.shape)
    if not entry.scanned:
      return one(names[0], entry, value.shape)
    return np.stack([one(n, entry, value.shape[1:]) for n in names])

  tree = jax.tree_util.tree_map_with_path(leaf, abstract)
  leftover = sorted(set(tensors) - used)
  if leftover:
    raise InputError(
      f"{len(leftover)} tensors of the checkpoint have no place in this "
      f"model, e.g. {leftover[0]}; check the model preset."
    )
  return tree


def export_tree(tree, table: Table) -> dict[str, np.ndarray]:
  """The inverse of `import_tree`: torch-layout tensors by name."""
  out = {}
  for path, value in jax.tree_util.tree_leaves_with_path(tree):
    entry = table(path_name(path))
    array = np.asarray(value)
    layers = array if entry.scanned else array[None]
    for name, layer in zip(_named(entry, array.shape), layers):
      out[name] = entry.to_torch(layer)
  return out
