# SPDX-License-Identifier: Apache-2.0
"""One table per model drives import and export between Flax and diffusers.

A table is a function from a Flax path to `Entry`s. The Flax tree decides
what must exist, so a missing, leftover or misshapen tensor is an error that
names it before any data is read, never a silent partial load.

Entries only transpose and reshape, so a memory-mapped tensor stays one, and
slicing the result reads only the pages of the slice.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from qi2_jax.errors import InputError
from qi2_jax.interop.safetensors_io import (
  Plan,
  Progress,
  TensorReader,
  contiguous,
)
from qi2_jax.parallel.sharding import path_name

_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one Flax leaf lives in a diffusers state dict.

  Attributes:
    name: tensor name; `{layer}` stands for the index of a scanned layer.
    to_torch: array of one layer -> array (or view) in torch's layout.
    to_flax: `(tensor, shape of one layer) -> array or view`, the inverse.
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
    lambda a: a.reshape(int(np.prod(a.shape[:inputs])), -1).T,
    lambda t, shape: t.T.reshape(shape),
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
    return a.transpose(3, 2, 0, 1)

  def to_flax(t, shape):
    return t.transpose(2, 3, 1, 0).reshape(shape)

  return Entry(name, to_torch, to_flax)


def _named(entry: Entry, shape) -> list[str]:
  if not entry.scanned:
    return [entry.name]
  return [entry.name.format(layer=i) for i in range(shape[0])]


def _torch_shape(entry: Entry, shape) -> tuple[int, ...]:
  """Shape of one layer on disk; the stand-in array owns a single byte."""
  return entry.to_torch(np.broadcast_to(np.zeros((), bool), shape)).shape


def _shapes(reader: TensorReader) -> dict[str, tuple[int, ...]]:
  return {name: reader.shape(name) for name in reader.names}


def check_tensors(
  shapes: Mapping[str, tuple], abstract, table: Table,
  ignored: str | None = None,
) -> None:  # fmt: skip
  """Compares names and shapes on disk with the tree that wants them.

  Args:
    shapes: tensor name -> shape.
    abstract: pytree with the Flax shapes.
    table: Flax path -> `Entry`.
    ignored: regex of tensor names that are deliberately not read.

  Raises:
    InputError: a tensor is missing, left over or of another shape.
  """
  used = set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    entry = table(path_name(path))
    shape = leaf.shape[1:] if entry.scanned else leaf.shape
    expected = _torch_shape(entry, shape)
    for name in _named(entry, leaf.shape):
      if name not in shapes:
        raise InputError(
          f"the checkpoint has no tensor {name}; it is not of this model."
        )
      if tuple(shapes[name]) != expected:
        raise InputError(
          f"tensor {name} has shape {tuple(shapes[name])} but this model "
          f"config needs {expected}; check the model preset."
        )
      used.add(name)
  leftover = sorted(
    name
    for name in set(shapes) - used
    if ignored is None or not re.fullmatch(ignored, name)
  )
  if leftover:
    raise InputError(
      f"{len(leftover)} tensors of the checkpoint have no place in this "
      f"model, e.g. {leftover[0]}; check the model preset."
    )


def stored_dtypes(
  reader: TensorReader, abstract, table: Table, ignored: str | None = None
):
  """`abstract` with the dtypes of the file (the widest of a leaf's layers).

  Raises:
    InputError: as `check_tensors`, or a tensor is quantised.
  """
  check_tensors(_shapes(reader), abstract, table, ignored)

  def leaf(path, want):
    entry = table(path_name(path))
    dtypes = {}
    for name in _named(entry, want.shape):
      dtype = reader.dtype(name)
      if dtype.name not in _FLOATS:
        raise InputError(
          f"tensor {name} is stored as {dtype.name}; quantised checkpoints "
          "are not supported, use the bfloat16 or float32 files."
        )
      dtypes[dtype] = None
    widest = functools.reduce(jnp.promote_types, dtypes)
    return jax.ShapeDtypeStruct(want.shape, widest)

  return jax.tree_util.tree_map_with_path(leaf, abstract)


def load_tree(
  reader: TensorReader, abstract, table: Table, *, ignored: str | None = None
):
  """Reads a component folder straight into (sharded) arrays.

  Every process reads only the pages of its own shards. Scanned leaves are
  filled layer by layer on the devices, so that the host never holds more
  than about one tensor beside the result.

  Args:
    reader: of `open_tensors`.
    abstract: pytree of ShapeDtypeStructs; their dtype wins (cast on the
      host), their sharding, if any, places the arrays.
    table: Flax path -> `Entry`.
    ignored: regex of tensor names that are deliberately not read.

  Raises:
    InputError: a tensor is missing, left over or of another shape.
  """
  check_tensors(_shapes(reader), abstract, table, ignored)
  leaves = jax.tree.leaves(abstract)
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  progress = Progress("reading weights", total)

  def leaf(path, want):
    entry = table(path_name(path))
    sharding = getattr(want, "sharding", None) or SingleDeviceSharding(
      jax.local_devices()[0]
    )

    def one(name, shape, place):
      view = entry.to_flax(reader.view(name), shape)
      array = jax.make_array_from_callback(
        shape, place, lambda index: contiguous(view[index]).astype(
          want.dtype, copy=False
        ),
      )  # fmt: skip
      progress.add(array.nbytes)
      return array

    if not entry.scanned:
      return one(entry.name, want.shape, sharding)
    zeros, put = _stack(want.shape, want.dtype, sharding)
    stack = zeros()
    for i, name in enumerate(_named(entry, want.shape)):
      layer = one(name, want.shape[1:], _layer_sharding(sharding))
      stack = put(stack, layer, i)
      # Dispatch is asynchronous: without the wait, layers would pile up.
      stack.block_until_ready()
    return stack

  return jax.tree_util.tree_map_with_path(leaf, abstract)


@functools.lru_cache
def _stack(shape, dtype, sharding):
  """Functions that make a stacked leaf and write one layer in place."""
  # As integers: on some backends bfloat16 passes through float32, which
  # rewrites the bits of NaNs.
  bits = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")

  def write(stack, layer, i):
    stack, layer = (
      jax.lax.bitcast_convert_type(a, bits) for a in (stack, layer)
    )
    stack = jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
    return jax.lax.bitcast_convert_type(stack, dtype)

  zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
  return zeros, jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _layer_sharding(sharding):
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _part(leaf, layer: int | None) -> np.ndarray:
  """One layer (or all) of a jax, numpy or tensorstore array, on the host."""
  if isinstance(leaf, jax.Array):
    # `np.asarray` keeps the host copy alive on the array it is given, so it
    # gets a temporary one.
    return np.asarray(
      leaf.copy()
      if layer is None
      else jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
    )
  part = leaf if layer is None else leaf[layer]
  return part if isinstance(part, np.ndarray) else part.read().result()


def numpy_dtype(leaf) -> np.dtype:
  """Type of a jax, numpy or tensorstore array."""
  return np.dtype(getattr(leaf.dtype, "numpy_dtype", leaf.dtype))


def iter_export(
  tree, table: Table, *, dtype=None
) -> tuple[Plan, Iterator[tuple[str, np.ndarray]]]:
  """Torch-layout tensors of a tree, one at a time.

  Args:
    tree: pytree of jax, numpy or (unread) tensorstore arrays.
    table: Flax path -> `Entry`.
    dtype: of the result; each leaf's own if None.

  Returns:
    `(plan, iterator)` for `safetensors_io.write_tensors`.

  Raises:
    InputError: the arrays are spread over several processes.
  """
  leaves = [
    (table(path_name(path)), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]
  plan = []
  for entry, leaf in leaves:
    if not getattr(leaf, "is_fully_addressable", True):
      raise InputError(
        f"{entry.name} is spread over several processes; export a saved "
        "folder from one process instead."
      )
    shape = tuple(leaf.shape[1:] if entry.scanned else leaf.shape)
    kind = np.dtype(dtype) if dtype is not None else numpy_dtype(leaf)
    torch_shape = _torch_shape(entry, shape)
    plan += [(n, torch_shape, kind) for n in _named(entry, leaf.shape)]

  def tensors():
    for entry, leaf in leaves:
      for i, name in enumerate(_named(entry, leaf.shape)):
        part = _part(leaf, i if entry.scanned else None)
        if dtype is not None:
          part = part.astype(dtype, copy=False)
        yield name, entry.to_torch(part)

  return plan, tensors()


def import_tree(tensors: Mapping[str, np.ndarray], abstract, table: Table):
  """Builds the Flax tree `abstract` from torch-layout tensors in memory.

  Args:
    tensors: name -> numpy array, as on disk; their dtypes are kept.
    abstract: pytree of arrays or ShapeDtypeStructs that fixes the shapes.
    table: Flax path -> `Entry`.

  Raises:
    InputError: a tensor is missing, left over or of another shape.
  """
  shapes = {name: np.shape(t) for name, t in tensors.items()}
  check_tensors(shapes, abstract, table)

  def leaf(path, want):
    entry = table(path_name(path))
    shape = want.shape[1:] if entry.scanned else want.shape
    parts = [
      contiguous(entry.to_flax(np.asarray(tensors[name]), shape))
      for name in _named(entry, want.shape)
    ]
    return np.stack(parts) if entry.scanned else parts[0]

  return jax.tree_util.tree_map_with_path(leaf, abstract)


def export_tree(tree, table: Table) -> dict[str, np.ndarray]:
  """The inverse of `import_tree`: torch-layout tensors by name."""
  _, tensors = iter_export(tree, table)
  return {name: contiguous(tensor) for name, tensor in tensors}
