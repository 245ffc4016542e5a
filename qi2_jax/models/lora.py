# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of the MMDiT: `W + weight * scale * a @ b`.

An adapter lives beside the parameters, under the slash paths of the kernels
that it changes. It is merged into them before the model runs (`merge`), or
stays apart while it is trained (`attach`, `beside_kernels`); the modules know
nothing of either. `scale` is alpha / rank (Hu et al. 2021, arXiv
2106.09685, section 4.1). The sum is fp32; what the kernel's dtype cannot
hold is rounded away, so a bf16 kernel does not see a change below half of
its last bit.

Shapes: L layers, r rank; `in...` and `out...` are a kernel's fan-in and
fan-out axes, e.g. D and H, K of `to_q`.
"""

import contextlib
import re
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qi2_jax.errors import InputError
from qi2_jax.models import layers, mmdit
from qi2_jax.parallel.sharding import path_name

# The seven linear layers of a block, as the public trainers adapt them.
DEFAULT_TARGETS = (
  r"blocks/attn/to_(q|k|v|out)/kernel",
  r"blocks/mlp/(proj|gate|out)/kernel",
)


@flax.struct.dataclass
class Lora:
  """One adapter.

  Attributes:
    factors: kernel path -> `{"a": [L, in..., r], "b": [L, r, out...]}`,
      without L outside the scanned blocks.
    scales: kernel path -> fp32 alpha / rank, a scalar or `[L]`; constant in
      training.
  """

  factors: dict[str, dict[str, jax.Array]]
  scales: dict[str, jax.Array]


def num_inputs(path: str) -> int:
  """Number of fan-in axes of a kernel: the one place that says so.

  Args:
    path: slash path of a kernel, or a sharding rule that ends like one.
  """
  return 2 if path.endswith("attn/to_out/kernel") else 1


def split_shape(path: str, shape: Sequence[int]) -> tuple[tuple, tuple, tuple]:
  """Splits a kernel's shape into `(layer, fan-in, fan-out)` dimensions."""
  stacked = int(path.startswith("blocks/"))
  cut = stacked + num_inputs(path)
  return tuple(shape[:stacked]), tuple(shape[stacked:cut]), tuple(shape[cut:])


def kernels(params) -> dict[str, tuple[int, ...]]:
  """Shapes of all kernels of a parameter tree by slash path."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  named = {path_name(path): tuple(leaf.shape) for path, leaf in leaves}
  return {name: s for name, s in named.items() if name.endswith("/kernel")}


def _sharding_rules():
  """The base kernels' axes; the rank is never split."""
  rules = [(r"(.*/)?scales/.*", ())]
  for pattern, axes in mmdit.SHARDING_RULES:
    if pattern.endswith("/kernel"):
      cut = num_inputs(pattern)
      rules.append((pattern + "/a", (*axes[:cut], None)))
      rules.append((pattern + "/b", (None, *axes[cut:])))
  return tuple(rules)


# Factors follow their kernel, so a merge moves nothing between devices.
SHARDING_RULES = _sharding_rules()


def _matches(targets: Sequence[str], shapes: dict) -> list[str]:
  """Kernel paths that a target matches, in order of the names."""
  for target in targets:
    if not any(re.fullmatch(target, name) for name in shapes):
      raise InputError(
        f"LoRA target {target!r} matches no kernel of this model; its "
        f"kernels are {sorted(shapes)}."
      )
  return sorted(n for n in shapes if any(re.fullmatch(t, n) for t in targets))


def init(
  abstract_params,
  targets: Sequence[str],
  rank: int,
  alpha: float,
  key: jax.Array,
) -> Lora:
  """A fresh fp32 adapter that changes nothing yet: `b` is zero.

  `a` is uniform in +-1 / sqrt(fan-in), PEFT's default (Kaiming uniform with
  slope sqrt(5)).

  Args:
    abstract_params: MMDiT parameters, or their shapes.
    targets: regexes that are matched against whole kernel paths.
    rank: r of every target.
    alpha: the change is scaled by alpha / rank.
    key: random key.

  Raises:
    InputError: the rank is below 1 or a target matches no kernel.
  """
  if rank < 1:
    raise InputError(f"LoRA rank {rank} must be at least 1.")
  shapes = kernels(abstract_params)
  names = _matches(targets, shapes)
  factors, scales = {}, {}
  for name, sub in zip(names, jax.random.split(key, len(names))):
    layer, inputs, outputs = split_shape(name, shapes[name])
    bound = float(np.prod(inputs)) ** -0.5
    a = jax.random.uniform(
      sub, (*layer, *inputs, rank), minval=-bound, maxval=bound
    )
    factors[name] = {"a": a, "b": jnp.zeros((*layer, rank, *outputs))}
    # One array each: a shared buffer could not be donated.
    scales[name] = jnp.asarray(alpha / rank, jnp.float32)
  return Lora(factors, scales)


def _check(name: str, shape, a_shape, b_shape) -> None:
  """Raises InputError unless the factors fit a kernel of `shape`."""
  layer, inputs, outputs = split_shape(name, shape)
  rank = a_shape[-1]
  expected = (*layer, *inputs, rank), (*layer, rank, *outputs)
  if (tuple(a_shape), tuple(b_shape)) != expected:
    raise InputError(
      f"the LoRA factors of {name} have shapes {tuple(a_shape)} and "
      f"{tuple(b_shape)} but its kernel {tuple(shape)} needs {expected[0]} "
      f"and {expected[1]}; this adapter is for another model."
    )


def _check_names(lora: Lora, shapes: dict) -> None:
  """Raises InputError if the adapter changes kernels that are not there."""
  unknown = sorted(lora.factors.keys() - shapes.keys())
  if unknown:
    raise InputError(
      f"this model has no kernel {unknown[0]}; this adapter is for another "
      "model."
    )


def _scaled(a, scale):
  """fp32 `scale * a`; the scale is constant."""
  scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
  scale = scale.reshape(scale.shape + (1,) * (a.ndim - scale.ndim))
  return a.astype(jnp.float32) * scale


def _merged(name: str, kernel, a, b, scale, weight):
  """`kernel + weight * scale * a @ b` in the kernel's dtype."""
  _check(name, kernel.shape, a.shape, b.shape)
  stacked = len(split_shape(name, kernel.shape)[0])
  batch = tuple(range(stacked))
  delta = jax.lax.dot_general(
    _scaled(a, scale),
    b.astype(jnp.float32),
    (((a.ndim - 1,), (stacked,)), (batch, batch)),
    # The default of fp32 products on TPU is one bf16 pass.
    precision=jax.lax.Precision.HIGHEST,
  )
  return (kernel.astype(jnp.float32) + weight * delta).astype(kernel.dtype)


def attach(params, lora: Lora):
  """Puts the factors next to their kernels, for `beside_kernels`.

  Gradients flow to the factors (not to the scales).

  Args:
    params: MMDiT parameters.
    lora: the adapter.

  Returns:
    A tree with `lora_a` (times the scale) and `lora_b` beside each kernel.

  Raises:
    InputError: as `merge`.
  """
  shapes = kernels(params)
  _check_names(lora, shapes)
  flat = traverse_util.flatten_dict(params, sep="/")
  for name, pair in lora.factors.items():
    a, b = pair["a"], pair["b"]
    _check(name, shapes[name], a.shape, b.shape)
    where = name.removesuffix("kernel")
    flat[f"{where}lora_a"] = _scaled(a, lora.scales[name])
    flat[f"{where}lora_b"] = b
  return traverse_util.unflatten_dict(flat, sep="/")


@contextlib.contextmanager
def beside_kernels():
  """Lets `layers.Einsum` add `x @ a @ b` where factors are attached.

  That is the merged model up to rounding, without a merged copy of the
  kernels or a gradient of their size, and without the products for it.
  """

  def add(call, args, kwargs, context):
    out = call(*args, **kwargs)
    module = context.module
    if not isinstance(module, layers.Einsum) or module.is_initializing():
      return out
    factors = module.variables.get("params", {})
    if context.method_name != "__call__" or "lora_a" not in factors:
      return out
    axes = len(module.fan_in)
    low = jnp.tensordot(
      args[0].astype(module.dtype), factors["lora_a"].astype(module.dtype), axes
    )
    return out + jnp.tensordot(low, factors["lora_b"].astype(module.dtype), 1)

  with nn.intercept_methods(add):
    yield


def merge(params, lora: Lora, weight: float | jax.Array = 1.0):
  """Adds an adapter to the kernels it is for; other leaves are untouched.

  Runs under `jit`, and gradients flow to the factors (not to the scales).

  Args:
    params: MMDiT parameters.
    lora: the adapter.
    weight: strength; 0 gives the kernels back, 1 the adapter as trained.

  Returns:
    A tree like `params`, leaf dtypes unchanged.

  Raises:
    InputError: the adapter names a kernel that `params` lacks, or its
      factors have other shapes.
  """
  _check_names(lora, kernels(params))

  def one(path, leaf):
    name = path_name(path)
    if name not in lora.factors:
      return leaf
    a, b = lora.factors[name]["a"], lora.factors[name]["b"]
    return _merged(name, leaf, a, b, lora.scales[name], weight)

  return jax.tree_util.tree_map_with_path(one, params)
