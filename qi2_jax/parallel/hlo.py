# SPDX-License-Identifier: Apache-2.0
"""Reads compiled HLO text: products, collectives and buffers of one chip.

XLA's own cost analysis counts the body of a loop once, so a scan over layers
looks 32 times too cheap. Here every instruction counts as often as it runs.
No library offers this: the text is the one stable thing that XLA gives out.

A program for TPUs has no `dot`: matrix products are convolutions, batch axes
being spatial ones in disguise, and their positions must be counted.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

_WIDTH = {
  "pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"\b(body|condition|calls|to_apply|branch_computations|"
  r"true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
  "ragged-all-to-all", "collective-permute",
)  # fmt: skip
# A gather that the compiler writes as the sum of zero-padded shards.
PADDED_GATHER = "all-gather-by-all-reduce"


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape: `dtype` and `dims`."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def bytes(self) -> float:
    """Size without padding."""
    digits = re.sub(r"[^0-9].*", "", self.dtype.lstrip("bfsuec") or "0")
    width = _WIDTH.get(self.dtype, int(digits or 0) / 8)
    return math.prod(self.dims) * width

  def __str__(self):
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    name: without the percent sign.
    arrays: what it produces; several for a tuple.
    opcode: e.g. `convolution`.
    operands: names.
    attributes: the text behind the operands.
    root: whether it is its computation's result.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  root: bool


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A parsed program.

  Attributes:
    computations: by name, callees before callers.
    runs: how often each computation runs.
    fused: names of computations that live inside one kernel.
    unknown_loops: loops whose length the text does not tell; counted once.
  """

  computations: dict[str, Computation]
  runs: dict[str, int]
  fused: frozenset[str]
  unknown_loops: tuple[str, ...]

  def executed(self) -> Iterator[tuple[int, str, Instruction]]:
    """Every instruction that runs: `(times, computation, instruction)`."""
    for name, body in self.computations.items():
      if self.runs[name]:
        for instruction in body.values():
          yield self.runs[name], name, instruction


def _closing(text: str) -> int:
  """Index just behind the bracket that closes `text[0]`."""
  depth = 0
  for i, c in enumerate(text):
    depth += (c == "(") - (c == ")")
    if depth == 0:
      return i + 1
  return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
  return tuple(
    Array(dtype, tuple(int(d) for d in dims.split(",") if d))
    for dtype, dims in _ARRAY.findall(text)
  )


def _instruction(line: str) -> Instruction | None:
  match = _LINE.match(line)
  if not match:
    return None
  root, name, rest = match.groups()
  end = _closing(rest) if rest.startswith("(") else rest.find(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, bracket, _ = rest.partition("(")
  if not bracket:
    return None
  tail = rest[len(opcode) :]
  end = _closing(tail)
  operands = tail[1 : end - 1]
  if opcode == "constant":  # Its operand is the value, which loops need.
    return Instruction(name, _arrays(shape), opcode, (), operands, bool(root))
  return Instruction(
    name, _arrays(shape), opcode, tuple(_NAME.findall(operands)), tail[end:],
    bool(root),
  )  # fmt: skip


def parse(text: str) -> Module:
  """Parses `compiled.as_text()`."""
  computations, entry, body = {}, None, None
  for line in text.splitlines():
    if line and not line[0].isspace() and line.rstrip().endswith("{"):
      head = re.match(r"(ENTRY )?%?([\w.\-]+) ", line)
      if head:
        body = computations.setdefault(head.group(2), {})
        entry = head.group(2) if head.group(1) else entry
    elif body is not None and " = " in line:
      made = _instruction(line)
      if made:
        body[made.name] = made
  return _count_runs(computations, entry)


def _called(instruction: Instruction) -> dict[str, list[str]]:
  """Names of called computations by role; reducers are left out."""
  out = collections.defaultdict(list)
  for role, names in _CALLED.findall(instruction.attributes):
    if role != "to_apply" or instruction.opcode == "call":
      out[role] += re.findall(r"[\w.\-]+", names)
  return out


def _count_runs(computations, entry) -> Module:
  runs = collections.Counter({entry: 1})
  fused, unknown = set(), []
  # Callers come after callees in the text.
  for name in reversed(list(computations)):
    for instruction in computations[name].values():
      times, called = runs[name], _called(instruction)
      if instruction.opcode == "while":
        trips = _trips(instruction, called, computations)
        unknown += [instruction.name] if trips is None and times else []
        times *= trips or 1
      for callee in itertools.chain.from_iterable(called.values()):
        runs[callee] += times
        if instruction.opcode == "fusion" or name in fused:
          fused.add(callee)
  return Module(computations, runs, frozenset(fused), tuple(unknown))


def _trips(loop: Instruction, called, computations) -> int | None:
  """Length of a loop: as annotated, or the bound that its counter meets.

  Scans count from 0 in steps of 1; what else is in the condition makes the
  length unknown.
  """
  known = re.search(
    r'known_trip_count"?:\{"?n"?:"?(\d+)"?\}', loop.attributes
  )  # fmt: skip
  if known:
    return int(known.group(1))
  bounds, compares = [], []
  for name in called["condition"]:
    body = computations.get(name, {})
    for i in body.values():
      scalar = i.opcode == "constant" and i.arrays[0].dims == ()
      if scalar and i.arrays[0].dtype in ("s32", "u32", "s64", "u64"):
        bounds.append(int(i.attributes))
      compares += [i] if i.opcode == "compare" else []
  if len(bounds) == 1 and len(compares) == 1:
    return bounds[0] if "direction=LT" in compares[0].attributes else None
  return None


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
  """Adds up `dot` and `convolution`, each as often as it runs."""
  flops = moved = 0.0
  for times, name, i in module.executed():
    if i.opcode not in ("dot", "convolution"):
      continue
    body = module.computations[name]
    lhs, rhs = (body[o].arrays[0] for o in i.operands)
    if i.opcode == "dot":
      flops += times * _dot_flops(i, lhs)
    else:
      flops += times * _convolution_flops(i, lhs, rhs)
    moved += times * sum(a.bytes for a in (lhs, rhs, *i.arrays))
  return Products(flops, moved)


def _is_padded(module: Module, body: Computation, name: str) -> bool:
  """Whether `name` is a shard written into an otherwise empty array."""
  i = body.get(name)
  while i is not None and i.opcode in ("bitcast", "copy", "fusion"):
    if i.opcode == "fusion":
      body = module.computations[_called(i)["calls"][0]]
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
    if kind == "all-gather":
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
