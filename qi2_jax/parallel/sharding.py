# SPDX-License-Identifier: Apache-2.0
"""Parameter rules, activation constraints, host batches to global arrays.

Parameters: an ordered table of (regex, spec); the first full match of the
slash-joined path wins and no match is an error, so a new layer cannot be
replicated by accident. Specs are right-aligned: the leading layer axis that
`nn.scan` adds is unsharded without a rule of its own.

Activations: logical names through one literal table; a misspelt name raises.
"""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qi2_jax.errors import InputError

Rules = Sequence[tuple[str, tuple[str | None, ...]]]

# Batches are split over data and fsdp; sequence and heads have axes of their
# own; the width of activations is never split.
ACTIVATION_AXES = {
  "batch": ("data", "fsdp"),
  "tokens": "seq",
  "heads": "tensor",
  # Inside attention sequences are whole and heads take the seq axis too.
  "attention_heads": ("tensor", "seq"),
  "mlp": "tensor",
  None: None,
}


def path_name(path) -> str:
  """Joins a pytree key path as `a/b/c`."""
  return "/".join(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    for k in path
  )


def spec_for(
  name: str, shape: Sequence[int], rules: Rules, mesh: Mesh
) -> PartitionSpec:
  """Finds the rule for `name` and fits it to `shape`.

  An axis that does not divide its dimension is dropped (a bias of 3 channels
  cannot be split over 8 chips); everything else is as the table says.

  Raises:
    InputError: no rule matches, or the rule has more axes than the array,
      an axis twice or one that the mesh has not.
  """
  for pattern, axes in rules:
    if not re.fullmatch(pattern, name):
      continue
    if len(axes) > len(shape):
      raise InputError(
        f"sharding rule {pattern!r} has {len(axes)} axes but parameter "
        f"{name} has shape {tuple(shape)}; fix the rule table."
      )
    named = [axis for axis in axes if axis is not None]
    if len(set(named)) < len(named) or not set(named) <= set(mesh.shape):
      raise InputError(
        f"sharding rule {pattern!r} gives parameter {name} the mesh axes "
        f"{tuple(axes)}; use each of {list(mesh.shape)} at most once."
      )
    padded = (None,) * (len(shape) - len(axes)) + tuple(axes)
    fitted = [
      axis if axis is None or dim % mesh.shape[axis] == 0 else None
      for axis, dim in zip(padded, shape)
    ]
    return PartitionSpec(*fitted)
  raise InputError(
    f"no sharding rule matches parameter {name} of shape {tuple(shape)}; "
    "add one to the model's rule table."
  )


def tree_shardings(tree, rules: Rules, mesh: Mesh):
  """Maps every array of `tree` to a NamedSharding by `rules`.

  Works on parameters, optimizer moments and EMA alike: patterns are matched
  against every suffix-free path, so rules begin with `(.*/)?`. Scalars
  (counters, keys) are replicated.
  """

  def one(path, leaf):
    shape = np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
    if len(shape) == 0:
      return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, spec_for(path_name(path), shape, rules, mesh))

  return jax.tree_util.tree_map_with_path(one, tree)


def on_mesh(abstract, rules: Rules, mesh: Mesh):
  """Shapes and dtypes with the shardings that the rules give them.

  Raises:
    InputError: an array has no rule.
  """
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    abstract, tree_shardings(abstract, rules, mesh),
  )  # fmt: skip


def activation_spec(
  shape: Sequence[int], axes: Sequence[str | None], mesh
) -> PartitionSpec:
  """The mesh axes of an activation, by logical names, one per dimension.

  A dimension that does not divide over its mesh axes goes over as many of
  them, from the first, as it divides.

  Raises:
    KeyError: a name is not in `ACTIVATION_AXES` (never silently replicated).
    ValueError: the number of names differs from the rank.
  """
  if len(axes) != len(shape):
    raise ValueError(
      f"{len(axes)} axis names for an array of rank {len(shape)}"
    )
  fitted = []
  for name, dim in zip((ACTIVATION_AXES[a] for a in axes), shape):
    group = (name,) if isinstance(name, str) else name or ()
    while dim % math.prod(mesh.shape.get(n, 1) for n in group):
      group = group[:-1]
    fitted.append(group or None)
  return PartitionSpec(*fitted)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains an activation by logical axis names, see `activation_spec`.

  Outside `jax.set_mesh` this is the identity, so modules run unchanged on
  one device; inside `jax.shard_map` too, where a map is one device's.
  """
  mesh = jax.sharding.get_abstract_mesh()
  spec = activation_spec(x.shape, axes, mesh)
  if mesh.empty or mesh.are_all_axes_manual:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of a host batch: the leading axis over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(batch_size: int, mesh: Mesh) -> None:
  """Raises InputError unless the global batch divides over the mesh."""
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % shards:
    raise InputError(
      f"batch size {batch_size} does not divide over data x fsdp = {shards} "
      "devices; change config.data.batch_size or config.mesh."
    )


def put_batch(batch, mesh: Mesh):
  """Assembles per-host numpy batches into global arrays on `mesh`.

  Args:
    batch: pytree of numpy arrays `[B_local, ...]`.
  """
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
