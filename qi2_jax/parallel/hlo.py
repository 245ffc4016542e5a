# SPDX-License-Identifier: Apache-2.0
"""Reads compiled HLO text: what runs on one chip, and how often.

No library offers this: the text is the one stable thing that XLA gives out.
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
    unknown_loops: loops whose length the text does not tell, see `parse`.
  """

  computations: dict[str, Computation]
  runs: dict[str, float]
  fused: frozenset[str]
  unknown_loops: tuple[str, ...]

  def executed(self) -> Iterator[tuple[float, str, Instruction]]:
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


def parse(text: str, trips: float = 1) -> Module:
  """Parses `compiled.as_text()`.

  Args:
    text: of the program.
    trips: what loops of unknown length count as, each; their mean if it is
      known from elsewhere.
  """
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
  return _count_runs(computations, entry, trips)


def called_by(instruction: Instruction) -> dict[str, list[str]]:
  """Names of called computations by role; reducers are left out."""
  out = collections.defaultdict(list)
  for role, names in _CALLED.findall(instruction.attributes):
    if role != "to_apply" or instruction.opcode == "call":
      out[role] += re.findall(r"[\w.\-]+", names)
  return out


def _count_runs(computations, entry, unknown_trips: float) -> Module:
  runs = collections.Counter({entry: 1})
  fused, unknown = set(), []
  # Callers come after callees in the text.
  for name in reversed(list(computations)):
    for instruction in computations[name].values():
      times, called = runs[name], called_by(instruction)
      if instruction.opcode == "while":
        trips = _trips(instruction, called, computations)
        unknown += [instruction.name] if trips is None and times else []
        times *= unknown_trips if trips is None else trips or 1
      for callee in itertools.chain.from_iterable(called.values()):
        runs[callee] += times
        if instruction.opcode == "fusion" or name in fused:
          fused.add(callee)
  return Module(computations, runs, frozenset(fused), tuple(unknown))


def _trips(loop: Instruction, called, computations) -> int | None:
  """Length of a loop: as annotated, or the bound that its counter meets.

  Counters start from 0; what else is in the condition makes the length
  unknown.
  """
  known = re.search(
    r'known_trip_count"?:\{"?n"?:"?(\d+)"?\}', loop.attributes
  )  # fmt: skip
  if known:
    return int(known.group(1))
  bounds, compares, counters = [], [], []
  for name in called["condition"]:
    for i in computations.get(name, {}).values():
      scalar = i.opcode == "constant" and i.arrays[0].dims == ()
      if scalar and i.arrays[0].dtype in ("s32", "u32", "s64", "u64"):
        bounds.append(int(i.attributes.partition(",")[0]))
      compares += [i] if i.opcode == "compare" else []
      counters += [i] if i.opcode == "get-tuple-element" else []
  if not len(bounds) == len(compares) == 1:
    return None
  if "direction=LT" not in compares[0].attributes:
    return None
  step = 1
  if len(counters) == 1:
    body = computations.get(called["body"][0], {}) if called["body"] else {}
    step = _step(body, _tuple_index(counters[0]))
  return -(-bounds[0] // step)


def _tuple_index(i: Instruction) -> int:
  return int(re.search(r"index=(\d+)", i.attributes).group(1))


def _step(body: Computation, index: int) -> int:
  """What one run of a loop's body adds to its counter; 1 if it hides that.

  Collective products come unrolled, two steps in a body.
  """
  root = next((i for i in body.values() if i.root), None)
  if root is None or root.opcode != "tuple":
    return 1
  i, total = body.get(root.operands[index]), 0
  while i is not None and i.opcode == "add":
    operands = [body.get(o) for o in i.operands]
    fixed = [o for o in operands if o is not None and o.opcode == "constant"]
    if len(fixed) != 1:
      return 1
    total += int(fixed[0].attributes.partition(",")[0])
    i = next(o for o in operands if o is not fixed[0])
  at_start = i is not None and i.opcode == "get-tuple-element"
  return total if at_start and _tuple_index(i) == index and total else 1
