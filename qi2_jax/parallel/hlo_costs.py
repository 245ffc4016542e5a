# SPDX-License-Identifier: Apache-2.0
"""Products, collectives and buffers of a compiled program, for one chip.

XLA's own cost analysis counts the body of a loop once, so a scan over layers
looks 32 times too cheap. Here every instruction counts as often as it runs.

A program for TPUs has no `dot`: matrix products are convolutions, batch axes
being spatial ones in disguise, and their positions must be counted.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from qi2_jax.parallel.hlo import (
  Array,
  Computation,
  Instruction,
  Module,
  called_by,
)

_KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
  "ragged-all-to-all", "collective-permute",
)  # fmt: skip
# A gather that the compiler writes as the sum of zero-padded shards.
PADDED_GATHER = "all-gather-by-all-reduce"
# Rings that the compiler spreads over the steps of a product, so that shards
# travel while others are multiplied.
_RINGS = {
  "_ag": "all-gather-in-product", "_rs": "reduce-scatter-in-product",
}  # fmt: skip


def _dot_flops(i: Instruction, lhs: Array) -> float:
  axes = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", i.attributes)
  axes = [int(a) for a in axes.group(1).split(",") if a] if axes else []
  inner = math.prod(lhs.dims[a] for a in axes)
  return 2.0 * math.prod(i.arrays[0].dims) * inner


def _window(attributes: str, key: str, rank: int, default: str) -> list[str]:
  found = re.search(rf"window=\{{[^}}]*\b{key}=([0-9x_\-]+)", attributes)
  return found.group(1).split("x") if found else [default] * rank


def _positions(size, outputs, inputs, stride, low, dilate, dilate_k) -> int:
  """Pairs of output and kernel position that meet a true input."""
  starts = (o * stride + k * dilate_k - low
            for o in range(outputs) for k in range(size))  # fmt: skip
  last = (inputs - 1) * dilate
  return sum(0 <= p <= last and p % dilate == 0 for p in starts)


def _convolution_flops(i: Instruction, lhs: Array, rhs: Array) -> float:
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
  of_lhs, of_rhs, of_out = (
    dict(zip(label, array.dims))
    for label, array in zip(labels, (lhs, rhs, i.arrays[0]))
  )
  rank = len(labels[0]) - 2
  window = lambda key, default="1": [  # noqa: E731
    int(x.split("_")[0]) for x in _window(i.attributes, key, rank, default)
  ]
  fields = zip(
    window("stride"), window("pad", "0_0"), window("lhs_dilate"),
    window("rhs_dilate"),
  )  # fmt: skip
  flops = 2.0 * of_out["b"] * of_out["f"] * of_rhs["i"]
  for axis, (stride, low, dilate, dilate_k) in enumerate(fields):
    d = str(axis)
    flops *= _positions(
      of_rhs[d], of_out[d], of_lhs[d], stride, low, dilate, dilate_k
    )
  return flops


# Products of [N, K] and [M, K] matrices in the passes of a flash kernel: it
# computes the scores anew in each.
_FLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def _flash_flops(i: Instruction, arrays: Sequence[Array]) -> float | None:
  """FLOPs of a splash attention kernel; None for any other custom call.

  Args:
    i: the custom call.
    arrays: its operands; behind integers that describe the mask come queries
      `[B, H, N, K]` and keys `[B, H, M, K]`, without B where it is 1.
  """
  phase = re.match(r"splash_mha_(fwd|dq|dkv)_", i.name)
  if not phase:
    return None
  q, k = [a for a in arrays if a.dtype in ("bf16", "f32")][:2]
  return 2.0 * _FLASH_PRODUCTS[phase[1]] * math.prod(q.dims) * k.dims[-2]


@dataclasses.dataclass(frozen=True)
class Products:
  """Matrix products of one chip.

  Attributes:
    flops: two per multiply-add.
    bytes: every operand read once and every result written once.
  """

  flops: float
  bytes: float


def products(module: Module) -> Products:
  """Adds up products and flash kernels, each as often as it runs."""
  flops = moved = 0.0
  for times, name, i in module.executed():
    if i.opcode not in ("dot", "convolution", "custom-call"):
      continue
    body = module.computations[name]
    operands = [body[o].arrays[0] for o in i.operands if body[o].arrays]
    if i.opcode == "dot":
      one = _dot_flops(i, operands[0])
    elif i.opcode == "convolution":
      one = _convolution_flops(i, *operands[:2])
    else:
      one = _flash_flops(i, operands)
    if one is not None:
      flops += times * one
      moved += times * sum(a.bytes for a in (*operands, *i.arrays))
  return Products(flops, moved)


def _is_padded(module: Module, body: Computation, name: str) -> bool:
  """Whether `name` is a shard written into an otherwise empty array."""
  i = body.get(name)
  while i is not None and i.opcode in ("bitcast", "copy", "fusion"):
    if i.opcode == "fusion":
      body = module.computations[called_by(i)["calls"][0]]
      i = next(x for x in body.values() if x.root)
    else:
      i = body.get(i.operands[0])
  return i is not None and i.opcode == "dynamic-update-slice"


def collectives(module: Module) -> dict[str, dict[str, float]]:
  """Collectives by kind: `{kind: {"count", "bytes"}}` of one chip.

  Bytes are those of the whole array: what a gather returns, what a reduction
  takes. An all-reduce of shards padded with zeros is a gather that the
  compiler wrote differently; it has a kind of its own.
  """
  out = {}

  def add(kind, times, size):
    entry = out.setdefault(kind, {"count": 0, "bytes": 0.0})
    entry["count"] += times
    entry["bytes"] += times * size

  for times, name, i in module.executed():
    kind = i.opcode.removesuffix("-start")
    if kind not in _KINDS:
      continue
    body = module.computations[name]
    taken = {
      o: sum(a.bytes for a in body[o].arrays) for o in i.operands
    }  # fmt: skip
    given = sum(a.bytes for a in i.arrays)
    ring = re.match(r"(?:wide\.)*windowed_dot_general_body(_ag|_rs)", name)
    if kind == "collective-permute" and ring:
      add(_RINGS[ring[1]], times, sum(taken.values()))
    elif kind == "all-gather":
      started = i.opcode.endswith("-start")
      add(kind, times, given - started * sum(taken.values()))
    elif kind == "all-reduce" and name.startswith("all-reduce-scatter"):
      add("reduce-scatter", times, sum(taken.values()))
    elif kind == "all-reduce":
      padded = {o for o in taken if _is_padded(module, body, o)}
      for label, names in (
        (PADDED_GATHER, padded), (kind, taken.keys() - padded),
      ):  # fmt: skip
        if names:
          add(label, times, sum(taken[o] for o in names))
    else:
      add(kind, times, sum(taken.values()))
  return out


def largest_buffers(module: Module, count: int = 5) -> list[Array]:
  """The largest distinct arrays that exist in memory, largest first.

  Arrays inside a fused kernel are left out: they are never stored.
  """
  found = {
    array
    for _, name, i in module.executed()
    if name not in module.fused
    for array in i.arrays
  }
  return sorted(found, key=lambda a: (-a.bytes, str(a)))[:count]
