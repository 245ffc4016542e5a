# SPDX-License-Identifier: Apache-2.0
"""Times the sampler's parts against diffusers on the same random weights.

    python benchmarks/sample_vs_diffusers.py
    python benchmarks/sample_vs_diffusers.py --size=256 --repeats=9 \\
      --json=race.json --markdown=race.md

Needs the test extra (torch, diffusers) and no download. Random diffusers
modules are built, their weights go through `qi2_jax.interop` into ours, the
outputs must agree, and both are timed in alternation in one process. Runs on
the CPU, and on a GPU too when both jax and torch see one. The defaults take
about two minutes on two CPU cores; docs/benchmarks.md shows a result.

The time of a side is its fastest run: other programs on the machine can only
add to it, and they slow the two sides unequally. Medians are in the JSON.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from absl import flags

from qi2_jax import cli
from qi2_jax.errors import InputError
from qi2_jax.evaluation import environment, store

# Outputs further apart than this are not the same computation.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Result:
  """Times of one case; the field names are the JSON keys.

  Attributes:
    work: name of the case.
    device: `cpu` or the GPU's name.
    diffusers_s: seconds of diffusers' fastest run.
    ours_s: seconds of our fastest run.
    ratio: ours / diffusers; below 1 is faster.
    compile_s: first call of ours minus the fastest later one.
    max_relative_error: largest difference over the largest magnitude.
    diffusers_median_s: median seconds of diffusers.
    ours_median_s: median seconds of qi2_jax.
  """

  work: str
  device: str
  diffusers_s: float
  ours_s: float
  ratio: float
  compile_s: float
  max_relative_error: float
  diffusers_median_s: float
  ours_median_s: float


def _define_flags():
  flags.DEFINE_integer("size", 512, "Image side in pixels.", lower_bound=32)
  flags.DEFINE_integer("layers", 4, "MMDiT layers.", lower_bound=1)
  flags.DEFINE_integer("width", 512, "MMDiT width, heads of 128.")
  flags.DEFINE_integer("text", 128, "Prompt tokens.", lower_bound=1)
  flags.DEFINE_integer("steps", 8, "Sampling steps.", lower_bound=2)
  flags.DEFINE_integer("vae_width", 48, "Decoder width; encoder 2/3 of it.")
  flags.DEFINE_integer("repeats", 11, "Timed runs of each side.", lower_bound=1)
  flags.DEFINE_string("json", None, "File to write the numbers to.")
  flags.DEFINE_string("markdown", None, "File to write the table to.")


def check_flags(values) -> None:
  """Raises InputError for sizes that no model can be built from."""
  if values.size % 32:
    raise InputError(f"--size={values.size} must be a multiple of 32.")
  if values.width < 128 or values.width % 128:
    raise InputError(f"--width={values.width} must be a multiple of 128.")
  if values.vae_width < 12 or values.vae_width % 12:
    raise InputError(f"--vae_width={values.vae_width} must be 12, 24, ...")


def _timed(run: Callable) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def measure(case, device: str, repeats: int) -> Result:
  """Checks that both sides agree, then times them in alternation.

  Args:
    case: a `diffusers_cases.Case`.
    device: name for the report.
    repeats: timed runs of each side.

  Raises:
    InputError: the outputs differ by more than `TOLERANCE`.
  """
  theirs = case.theirs()
  start = time.perf_counter()
  ours = case.ours()
  first = time.perf_counter() - start
  error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  if not error <= TOLERANCE:
    raise InputError(
      f"{case.name}: the outputs differ by {error:.1e} of their scale, more "
      f"than {TOLERANCE:.0e}; the times would not compare the same work."
    )
  times = {"theirs": [], "ours": []}
  for i in range(repeats):
    order = ("theirs", "ours") if i % 2 == 0 else ("ours", "theirs")
    for side in order:
      times[side].append(_timed(getattr(case, side)))
  theirs_s, ours_s = min(times["theirs"]), min(times["ours"])
  return Result(
    work=case.name, device=device, diffusers_s=theirs_s, ours_s=ours_s,
    ratio=ours_s / theirs_s, compile_s=max(first - ours_s, 0.0),
    max_relative_error=error,
    diffusers_median_s=statistics.median(times["theirs"]),
    ours_median_s=statistics.median(times["ours"]),
  )  # fmt: skip


def devices() -> list[tuple]:
  """`(name, jax device, torch device)`: the CPU, and a GPU both sides see."""
  import jax
  import torch

  found = [("cpu", jax.devices("cpu")[0], "cpu")]
  try:
    gpu = jax.devices("cuda")[0]
  except RuntimeError:
    return found
  if torch.cuda.is_available():
    found.append((gpu.device_kind, gpu, "cuda"))
  return found


def markdown(results: list[Result]) -> str:
  """The results as a markdown table."""
  lines = [
    "| work | device | diffusers s | ours s | ours / diffusers | compile s "
    "| max rel. error |",
    "|---|---|---|---|---|---|---|",
  ]
  for r in results:
    lines.append(
      f"| {r.work} | {r.device} | {r.diffusers_s:.3f} | {r.ours_s:.3f} | "
      f"{r.ratio:.2f} | {r.compile_s:.1f} | {r.max_relative_error:.0e} |"
    )
  return "\n".join(lines) + "\n"


def report(results: list[Result], values) -> dict:
  """Everything needed to read the numbers later."""
  names = ("size", "layers", "width", "text", "steps", "vae_width", "repeats")
  return {
    "machine": environment.machine(),
    "versions": environment.versions("torch", "diffusers"),
    "flags": {name: getattr(values, name) for name in names},
    "results": [dataclasses.asdict(r) for r in results],
  }


def main() -> int:
  """Entry point."""
  values = flags.FLAGS
  check_flags(values)
  try:
    import diffusers_cases
    import torch
  except ImportError as error:
    raise InputError(
      f"this benchmark needs torch and diffusers, but {error}; install "
      "qi2_jax[test]."
    ) from error
  import jax

  # Compile times are reported, so none may come from an earlier run. Plain
  # fp32 on both sides: a GPU would round to TF32 otherwise.
  jax.config.update("jax_enable_compilation_cache", False)
  jax.config.update("jax_default_matmul_precision", "highest")
  torch.backends.cudnn.allow_tf32 = False
  torch.set_num_threads(os.cpu_count() or 1)
  results = []
  for name, device, torch_device in devices():
    for build in (diffusers_cases.mmdit_cases, diffusers_cases.vae_cases):
      for case in build(values, device, torch_device):
        results.append(measure(case, name, values.repeats))
        print(markdown(results[-1:]).splitlines()[-1], flush=True)
  table = markdown(results)
  print(f"\n{table}")
  if values.json:
    store.write_json(values.json, report(results, values))
  if values.markdown:
    store.write_text(values.markdown, table)
  return 0


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
