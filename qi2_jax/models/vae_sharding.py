# SPDX-License-Identifier: Apache-2.0
"""The VAE and LPIPS with the rows of an image spread over the axis `seq`.

Left to itself, the compiler gathers whole maps of 2048 px on every device
(and jaxlib 0.10 gets gradients wrong where a shard has one row, see
tests/parallel/equality_test.py). Here every device keeps its rows: a 3x3
convolution first receives the neighbours' border rows, one ppermute each way.
At the image's border ppermute delivers zeros, which is the padding that the
convolution has there. The mid block's attention, at 1/16 of the resolution,
gathers the map and every device keeps its own rows of the result. Everything
else looks at single pixels or at pairs of rows that are never apart. Outputs
and gradients equal those of one device up to rounding.

Shapes: images `x_BHWC`, latents `z_BhwZ`; H / factor rows divide over `seq`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qi2_jax.errors import InputError
from qi2_jax.models import vae_blocks
from qi2_jax.models.lpips import LPIPS
from qi2_jax.models.vae import VAE

AXIS = "seq"
_ROWS = PartitionSpec(("data", "fsdp"), AXIS)
_METHODS = ("moments", "decode_raw", "encode", "decode")


def _from(x_BHWC, step: int, count: int):
  """One border row of the neighbour `step` below, zeros beyond the image."""
  row = x_BHWC[:, :1] if step > 0 else x_BHWC[:, -1:]
  pairs = [(i, i - step) for i in range(count) if 0 <= i - step < count]
  return jax.lax.ppermute(row, AXIS, pairs)


def _with_halo(x_BHWC, count: int, above: bool):
  """Rows with the neighbours' next row below, and above if wanted."""
  parts = [_from(x_BHWC, -1, count)] if above else []
  return jnp.concatenate([*parts, x_BHWC, _from(x_BHWC, 1, count)], axis=1)


def _exchange(count: int, run: Callable, args, kwargs, context):
  """Flax interceptor: gives each module the rows that it looks at."""
  module = context.module
  if context.method_name != "__call__":
    return run(*args, **kwargs)
  if isinstance(module, nn.Conv) and module.kernel_size == (3, 3):
    if module.strides == 2:  # Looks below only; an even number of rows.
      return run(_with_halo(args[0], count, above=False))
    return run(_with_halo(args[0], count, above=True))[:, 1:-1]
  if isinstance(module, vae_blocks.UpsampleConv):
    return run(_with_halo(args[0], count, above=True))[:, 2:-2]
  if isinstance(module, vae_blocks.SpatialAttention):
    rows = args[0].shape[1]
    whole = jax.lax.all_gather(args[0], AXIS, axis=1, tiled=True)
    start = jax.lax.axis_index(AXIS) * rows
    return jax.lax.dynamic_slice_in_dim(run(whole), start, rows, axis=1)
  return run(*args, **kwargs)


def check_rows(rows: int, unit: int, shards: int) -> None:
  """Raises InputError unless `shards` parts of whole `unit`s make `rows`."""
  if rows % (unit * shards):
    raise InputError(
      f"{rows} rows do not divide over {AXIS}={shards} in whole latents of "
      f"{unit}; choose image heights that are multiples of "
      f"{unit * shards} or lower config.mesh.{AXIS}."
    )


def sharded_apply(module: VAE, mesh, variables, x, method: str):
  """`module.apply(variables, x, method=method)` with rows over `seq`.

  Args:
    module: the VAE.
    mesh: has the axes data, fsdp and seq; those of `jax.set_mesh`, if set.
    variables: `params` and `latent_stats`; they are gathered.
    x: images for `moments` and `encode`, latents for `decode_raw` and
      `decode`; the batch divides over data x fsdp.
    method: one of these four.

  Returns:
    What the method returns, with rows over `seq`.

  Raises:
    InputError: the rows do not divide.
  """
  if method not in _METHODS:
    raise ValueError(f"{method} has no sharded form; use one of {_METHODS}.")
  count = mesh.shape[AXIS]
  encodes = method in ("moments", "encode")
  check_rows(x.shape[1], module.config.factor if encodes else 1, count)

  def local(variables, x):
    interceptor = functools.partial(_exchange, count)
    with nn.intercept_methods(interceptor):
      return module.apply(variables, x, method=method)

  return jax.shard_map(
    local, mesh=mesh, in_specs=(PartitionSpec(), _ROWS), out_specs=_ROWS,
  )(variables, x)  # fmt: skip


def sharded_distance(module: LPIPS, mesh, params, a_BHWC, b_BHWC):
  """`module.apply({"params": params}, a, b)` with rows over `seq`.

  Its first maps are as large as the decoder's last ones. Shards are equally
  tall, so the mean over all rows is the mean of theirs.

  Args:
    module: the network.
    mesh: as in `sharded_apply`.
    params: of the network; they are gathered.
    a_BHWC, b_BHWC: RGB images in [-1, 1]; the batch divides over data x fsdp.

  Returns:
    fp32 `[B]`.

  Raises:
    InputError: the rows do not divide.
  """
  count = mesh.shape[AXIS]
  check_rows(a_BHWC.shape[1], module.config.smallest_side, count)

  def local(params, a, b):
    with nn.intercept_methods(functools.partial(_exchange, count)):
      distance = module.apply({"params": params}, a, b)
    return jax.lax.pmean(distance, AXIS)

  return jax.shard_map(
    local, mesh=mesh, in_specs=(PartitionSpec(), _ROWS, _ROWS),
    out_specs=PartitionSpec(("data", "fsdp")),
  )(params, a_BHWC, b_BHWC)  # fmt: skip
