# SPDX-License-Identifier: Apache-2.0
"""Times one training step of the MMDiT against diffusers in PyTorch.

    python benchmarks/train_step_vs_diffusers.py
    python benchmarks/train_step_vs_diffusers.py --torch_compile --repeats=21 \\
      --json=train.json
    python benchmarks/train_step_vs_diffusers.py --preset=medium  # one GPU

Needs the test extra (torch, diffusers) and no download. A step is forward,
backward, clipping and AdamW, on the same random weights and the same batch.
Losses and norms of the gradient of the first steps must agree; then the sides
run in alternation in one process. A ratio is the median over rounds of this
side / diffusers, so that load which comes and goes slows both; the times are
medians too. On a busy machine threads wait for each other, and not equally on
both sides: there only one core (`taskset -c 0`) and CPU seconds compare.

With a GPU that both jax and torch see, it takes the place of the CPU and
compute is bf16 (torch: autocast); weights, gradients and moments stay fp32.
MFU counts model FLOPs (no recomputation) against --peak_tflops, which is
known for some GPUs. Nobody has run it on a GPU yet. The default sizes are for
two CPU cores and take about three minutes there.
"""

import dataclasses
import statistics
import time

from absl import flags
from sample_vs_diffusers import devices

from qi2_jax import cli
from qi2_jax.errors import InputError
from qi2_jax.evaluation import environment, store

# All ours. small: two CPU cores. medium and large (0.7 and 3 B parameters)
# hold both sides' weights, gradients and moments in about 23 and 96 GB.
PRESETS = {
  "small": {"layers": 4, "width": 512, "size": 512, "text": 128, "batch": 1},
  "medium": {"layers": 12, "width": 2048, "size": 512, "text": 256, "batch": 8},
  "large": {"layers": 24, "width": 3072, "size": 1024, "text": 512, "batch": 2},
}
# Dense bf16 tensor-core peaks of NVIDIA's data sheets, TFLOP/s; SXM modules.
PEAKS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}
# Steps that must agree before any is timed, and by how much.
CHECKED_STEPS = 3
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 5e-2)}


@dataclasses.dataclass(frozen=True)
class Result:
  """Times of one side; the field names are the JSON keys.

  Attributes:
    side: `diffusers`, `diffusers compiled` or `ours`.
    step_s: median seconds of a step.
    fastest_s: the fastest one.
    cpu_s: median seconds of all CPU cores together.
    first_s: the first step, compilation included.
    images_per_s: batch over step_s.
    tflops: model TFLOP/s.
    mfu: of the peak; None without one.
    ratio: median of (this side / diffusers) over the rounds.
    cpu_ratio: the same of CPU seconds.
    losses: of the checked steps.
  """

  side: str
  step_s: float
  fastest_s: float
  cpu_s: float
  first_s: float
  images_per_s: float
  tflops: float
  mfu: float | None
  ratio: float
  cpu_ratio: float
  losses: tuple[float, ...]


def _define_flags():
  flags.DEFINE_enum("preset", "small", list(PRESETS), "Sizes; see PRESETS.")
  for name, what in (
    ("layers", "Layers."), ("width", "Width, in heads of 128 channels."),
    ("size", "Image side in pixels."), ("text", "Prompt tokens."),
    ("batch", "Images per step."),
  ):  # fmt: skip
    flags.DEFINE_integer(
      name, None, f"{what} Default: the preset's.", lower_bound=1
    )
  flags.DEFINE_enum(
    "dtype", None, list(TOLERANCES), "Compute; default: by the device."
  )
  flags.DEFINE_bool("remat", False, "Recompute every layer, on both sides.")
  flags.DEFINE_bool("torch_compile", False, "A third side: torch.compile.")
  flags.DEFINE_float("learning_rate", 1e-4, "Of AdamW.", lower_bound=0.0)
  flags.DEFINE_float("peak_tflops", None, "The device's peak, for MFU.")
  flags.DEFINE_integer("repeats", 11, "Timed rounds.", lower_bound=1)
  flags.DEFINE_string("json", None, "File to write the numbers to.")


def fill_flags(values, platform: str) -> None:
  """Sets what was left open, from the preset and the device.

  Raises:
    InputError: sizes that no model can be built from.
  """
  for name, value in PRESETS[values.preset].items():
    if getattr(values, name) is None:
      setattr(values, name, value)
  if values.dtype is None:
    values.dtype = "float32" if platform == "cpu" else "bfloat16"
  if values.size % 32:
    raise InputError(f"--size={values.size} must be a multiple of 32.")
  if values.width % 128:
    raise InputError(f"--width={values.width} must be a multiple of 128.")


def known_peak(kind: str, dtype: str) -> float | None:
  """Peak TFLOP/s of a GPU by its name, in bf16 only."""
  if dtype != "bfloat16":
    return None
  return next((p for name, p in PEAKS.items() if name in kind), None)


def check(race, dtype: str) -> tuple[dict, dict]:
  """Runs the first steps; returns `(losses, seconds of the first)` by side.

  A second and third loss agree only if the updates did.

  Raises:
    InputError: the sides do not compute the same.
  """
  losses, first = {}, {}
  tolerance = TOLERANCES[dtype]
  wanted = []
  for side, step in race.steps.items():
    start = time.perf_counter()
    found = [step()]
    first[side] = time.perf_counter() - start
    print(f"{side}: first step {first[side]:.1f} s", flush=True)
    found += [step() for _ in range(CHECKED_STEPS - 1)]
    losses[side] = tuple(loss for loss, _ in found)
    wanted = wanted or found
    for i, (ours, theirs) in enumerate(zip(found, wanted), 1):
      for what, a, b, most in zip(
        ("loss", "gradient norm"), ours, theirs, tolerance
      ):
        if not abs(a - b) <= most * abs(b):
          raise InputError(
            f"step {i}: the {what} of {side} is {a:.7g}, that of diffusers "
            f"{b:.7g}, more than {most:.0e} apart; the times would not "
            "compare the same work."
          )
  return losses, first


def measure(race, repeats: int) -> dict[str, list[tuple[float, float]]]:
  """Seconds and CPU seconds of steps; the order turns with every round."""
  times = {side: [] for side in race.steps}
  names = list(times)
  for i in range(repeats):
    turn = i % len(names)
    for side in names[turn:] + names[:turn]:
      start, cpu = time.perf_counter(), time.process_time()
      race.steps[side]()
      times[side].append(
        (time.perf_counter() - start, time.process_time() - cpu)
      )
    shown = ", ".join(f"{s} {t[-1][0]:.3f} s" for s, t in times.items())
    print(f"round {i + 1}/{repeats}: {shown}", flush=True)
  return times


def results(race, times, losses, first, batch: int, peak) -> list[Result]:
  """One entry per side."""
  made = []
  for side, pairs in times.items():
    seconds, cpu = zip(*pairs)
    step = statistics.median(seconds)
    rate = race.flops / step / 1e12
    ratio, cpu_ratio = (
      statistics.median(a[i] / b[i] for a, b in zip(pairs, times["diffusers"]))
      for i in (0, 1)
    )
    made.append(
      Result(
        side, step, min(seconds), statistics.median(cpu), first[side],
        batch / step, rate, rate / peak if peak else None, ratio, cpu_ratio,
        losses[side],
      )
    )  # fmt: skip
  return made


def markdown(found: list[Result]) -> str:
  """The results as a markdown table."""
  lines = [
    "| side | s per step | CPU s | images/s | model TFLOP/s | MFU "
    "| side / diffusers | of CPU s |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for r in found:
    mfu = "" if r.mfu is None else f"{r.mfu:.1%}"
    lines.append(
      f"| {r.side} | {r.step_s:.3f} | {r.cpu_s:.3f} | {r.images_per_s:.2f} | "
      f"{r.tflops:.3f} | {mfu} | {r.ratio:.2f} | {r.cpu_ratio:.2f} |"
    )
  return "\n".join(lines) + "\n"


def report(found, race, values, device: str, peak) -> dict:
  """Everything needed to read the numbers later."""
  names = (
    *PRESETS["small"], "preset", "dtype", "remat", "learning_rate", "repeats",
  )  # fmt: skip
  return {
    "machine": environment.machine(),
    "device": device,
    "peak_tflops": peak,
    "versions": environment.versions("torch", "diffusers"),
    "flags": {name: getattr(values, name) for name in names},
    "kernel": race.kernel,
    "parameters": race.parameters,
    "model_flops_per_step": race.flops,
    "results": [dataclasses.asdict(r) for r in found],
  }


def main() -> int:
  """Entry point."""
  values = flags.FLAGS
  try:
    import torch
    import train_cases
  except ImportError as error:
    raise InputError(
      f"this benchmark needs torch and diffusers, but {error}; install "
      "qi2_jax[test]."
    ) from error
  import jax

  name, device, torch_device = devices()[-1]
  fill_flags(values, device.platform)
  peak = values.peak_tflops or known_peak(name, values.dtype)
  # First steps include compilation. fp32 is plain fp32 on both sides: a GPU
  # would round to TF32 otherwise.
  jax.config.update("jax_enable_compilation_cache", False)
  if values.dtype == "float32":
    jax.config.update("jax_default_matmul_precision", "highest")
  torch.set_num_threads(environment.cores())
  race = train_cases.race(values, device, torch_device)
  tokens = (values.size // 16) ** 2
  print(
    f"{name}: {race.parameters / 1e6:.1f} M parameters, {values.batch} x "
    f"({values.text} + {tokens}) tokens, {values.dtype}, our attention "
    f"kernel: {race.kernel}",
    flush=True,
  )
  losses, first = check(race, values.dtype)
  times = measure(race, values.repeats)
  found = results(race, times, losses, first, values.batch, peak)
  print(f"\n{markdown(found)}")
  if values.json:
    store.write_json(values.json, report(found, race, values, name, peak))
  return 0


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
