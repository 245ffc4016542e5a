# SPDX-License-Identifier: Apache-2.0
"""Plans every stage on every pod and writes the table of docs/scale.md.

    python -m qi2_jax.aot_table --results=runs/plans --doc=docs/scale.md

Each row is one run of `python -m qi2_jax.aot` in a process of its own. Plans
that lie in `--results` are not compiled again, so an interrupted table goes
on where it stopped. `--only=REGEX` plans the rows whose name matches; the
table holds what is there. Count on one to three minutes per row on two idle
cores.
"""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys

from absl import flags, logging

from qi2_jax import cli
from qi2_jax.errors import InputError
from qi2_jax.evaluation import store

BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
_PRETRAIN = "experiments/pretrain.py"
_CONTINUAL = "experiments/continual.py"


@dataclasses.dataclass(frozen=True)
class Row:
  """One plan.

  Attributes:
    name: of its file.
    config: file and variant.
    topology: of one slice.
    batch_per_chip: samples per chip and microbatch; ours, chosen so that at
      least 10 % of HBM stay free.
    options: further arguments of `qi2_jax.aot`.
  """

  name: str
  config: str
  topology: str
  batch_per_chip: float
  options: tuple[str, ...] = ()

  @property
  def arguments(self) -> list[str]:
    """Arguments of `python -m qi2_jax.aot`."""
    return [
      f"--config={self.config}", f"--topology={self.topology}",
      f"--batch_per_chip={self.batch_per_chip:g}", *self.options,
    ]  # fmt: skip


# Rings of 16 or 32 chips share the state, and several of them the batch.
_V5E, _V5P, _V6E = (f"--config.mesh.data={n}" for n in (8, 4, 16))
_EDIT = "--references=1"
ROWS = (
  Row("256_v5e", f"{_PRETRAIN}:256", "v5e:16x16", 8, (_V5E,)),
  Row("256_v5p", f"{_PRETRAIN}:256", "v5p:4x4x4", 16, (_V5P,)),
  Row("256_v6e", f"{_PRETRAIN}:256", "v6e:16x16", 16, (_V6E,)),
  Row("512_v5e", f"{_PRETRAIN}:512", "v5e:16x16", 4, (_V5E,)),
  Row("512_v5p", f"{_PRETRAIN}:512", "v5p:4x4x4", 8, (_V5P,)),
  Row("512_v6e", f"{_PRETRAIN}:512", "v6e:16x16", 8, (_V6E,)),
  Row("1024_v5e", f"{_CONTINUAL}:1024", "v5e:16x16", 1, (_V5E,)),
  Row("1024_v5p", f"{_CONTINUAL}:1024", "v5p:4x4x4", 4, (_V5P,)),
  Row("1024_v6e", f"{_CONTINUAL}:1024", "v6e:16x16", 2, (_V6E,)),
  Row("2048_v5e", f"{_CONTINUAL}:2048", "v5e:16x16", 0.25,
      ("--config.mesh.data=2", "--config.mesh.seq=4")),
  Row("2048_v5p", f"{_CONTINUAL}:2048", "v5p:4x4x4", 1, (_V5P,)),
  Row("2048_v6e", f"{_CONTINUAL}:2048", "v6e:16x16", 1, (_V6E,)),
  Row("512_v5p_edit", f"{_CONTINUAL}:512", "v5p:4x4x4", 4, (_V5P, _EDIT)),
  Row("1024_v5p_edit", f"{_CONTINUAL}:1024", "v5p:4x4x4", 2, (_V5P, _EDIT)),
  Row("512_v5p_fsdp", f"{_PRETRAIN}:512", "v5p:4x4x4", 8),
  Row("512_v6e_fsdp", f"{_PRETRAIN}:512", "v6e:16x16", 8),
  Row("1024_v5p_tensor", f"{_CONTINUAL}:1024", "v5p:4x4x4", 1,
      ("--config.mesh.tensor=4",)),
  Row("512_v5e_slices", f"{_PRETRAIN}:512", "v5e:16x16", 4,
      ("--slices=2", "--config.mesh.data=16")),
)  # fmt: skip
_HEAD = (
  "plan", "topology, mesh", "bucket px", "global batch",
  "samples per chip x microbatches", "HBM GiB of limit (free)",
  "PFLOP per step (over analytic)",
  "gather / scatter / all-reduce GB per chip and microbatch",
  "compute / HBM / links s", "step s, bound by", "MFU overlapped / serial",
  "compile s, wall (CPU)",
)  # fmt: skip


def run(row: Row, results: str) -> None:
  """Compiles a row's plan unless it is there.

  Raises:
    InputError: the plan could not be made.
  """
  path = os.path.join(results, f"{row.name}.json")
  if os.path.exists(path):
    return
  command = [sys.executable, "-m", "qi2_jax.aot", *row.arguments]
  logging.info("%s: %s", row.name, shlex.join(command[1:]))
  done = subprocess.run(
    [*command, f"--json={path}"], stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT, text=True, check=False,
  )  # fmt: skip
  if not os.path.exists(path):
    raise InputError(
      f"no plan for {row.name}: {done.stdout.strip().splitlines()[-1]}"
    )


def _moved(plan: dict) -> tuple[float, float, float]:
  """GB per chip and microbatch: gathers, scattered sums, whole sums."""
  kinds = {k: v["bytes"] / 1e9 for k, v in plan["collectives"].items()}
  pick = lambda *words: sum(  # noqa: E731
    v for k, v in kinds.items() if any(k.startswith(w) for w in words)
  )
  parts = plan["accumulate"]
  return (
    pick("all-gather") / parts,
    pick("reduce-scatter", "collective-permute") / parts,
    pick("all-reduce") / parts,
  )


def cells(row: Row, plan: dict) -> list[str]:
  """The row of a plan that fits."""
  mesh = " ".join(f"{k} {v}" for k, v in plan["mesh"].items() if v > 1)
  slices = f"{plan['slices']} x " if plan.get("slices", 1) > 1 else ""
  used, limit = plan["hbm_gib_per_chip"], plan["hbm_limit_gib"]
  flops = plan["flops_per_step"]
  seconds = plan["roofline_seconds"]
  references = f" + {plan['references']} ref." if plan["references"] else ""
  return [
    f"`{row.name}`",
    f"{slices}{row.topology}, {mesh}",
    "{} x {}".format(*plan["bucket"]) + references,
    f"{plan['global_batch']:,}",
    f"{plan['batch_per_chip']:g} x {plan['accumulate']}",
    f"{used:.1f} of {limit:.2f} ({1 - used / limit:.0%})",
    f"{flops / 1e15:,.0f} ({flops / plan['analytic_flops_per_step']:.3f})",
    " / ".join(f"{x:.1f}" for x in _moved(plan)),
    " / ".join(f"{seconds[k]:.1f}" for k in ("compute", "hbm", "links")),
    f"{plan['step_seconds_roofline']:.1f}, {plan['bound_by']}",
    f"{plan['mfu_roofline']:.0%} / {plan['mfu_serial']:.0%}",
    f"{plan['compile_seconds']:.0f} ({plan['compile_cpu_seconds']:.0f})",
  ]


def table(results: str) -> str:
  """Markdown of the plans in `results`, and the commands that make them."""
  lines = [_HEAD, ["---"] * len(_HEAD)]
  commands = []
  for row in ROWS:
    path = os.path.join(results, f"{row.name}.json")
    if not os.path.exists(path):
      continue
    with open(path, encoding="utf-8") as file:
      plan = json.load(file)
    if "roofline_seconds" in plan:
      lines += [cells(row, plan)]
    else:
      size = f"{plan['hbm_gib_per_chip']:.1f} of {plan['hbm_limit_gib']:.2f}"
      rest = ["does not fit", *[""] * (len(_HEAD) - 5)]
      lines += [[f"`{row.name}`", row.topology, "", size, *rest]]
    commands += [
      f"    python -m qi2_jax.aot {shlex.join(row.arguments)}  # {row.name}"
    ]
  text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
  return text + "\n\nOne row alone:\n\n" + "\n".join(commands)


def write(doc: str, text: str) -> None:
  """Replaces what stands between the markers of `doc`.

  Raises:
    InputError: the file or its markers are missing.
  """
  try:
    with open(doc, encoding="utf-8") as file:
      old = file.read()
  except OSError as error:
    raise InputError(f"cannot read {doc} ({error.strerror}).") from error
  pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
  if not pattern.search(old):
    raise InputError(f"{doc} lacks the lines {BEGIN} and {END}; add them.")
  store.write_text(doc, pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", old))


def _define_flags():
  flags.DEFINE_string("results", None, "Folder of the plans, kept.")
  flags.DEFINE_string("doc", "docs/scale.md", "File with the two markers.")
  flags.DEFINE_string("only", "", "Regex of row names to plan; '' is all.")
  flags.mark_flags_as_required(["results"])


def main() -> int:
  """Entry point."""
  f = flags.FLAGS
  os.makedirs(f.results, exist_ok=True)
  for row in ROWS:
    if re.search(f.only, row.name):
      run(row, f.results)
  write(f.doc, table(f.results))
  return 0


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
