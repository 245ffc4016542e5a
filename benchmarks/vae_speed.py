# SPDX-License-Identifier: Apache-2.0
"""Images per second and peak memory of our VAE and diffusers', one run.

    python benchmarks/vae_speed.py --sizes=256,512 --repeats=7 \\
      --json=vae_speed.json

Needs Linux, the test extra (torch, diffusers) and no download. A random VAE of
diffusers' class is saved as a folder. Two processes load it, one with torch
and one with JAX, and take turns to encode and to decode the same batch; their
outputs must agree. Each size has processes of its own, so that the peak of
resident memory is that of one side and one size. Both sides run fp32 on the
CPU with all cores and their defaults otherwise: torch eager without tiling,
ours compiled, in tiles from 2048 px on.

`--width=144` is the public model (1.35 GB of weights); the default has a
third of its width. Rates are of the fastest run, because other programs on
the machine can only add to a time; medians are in the JSON.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import flags

from qi2_jax import cli
from qi2_jax.errors import InputError
from qi2_jax.evaluation import environment, store

# Outputs further apart than this are not the same computation.
TOLERANCE = 1e-4
SIDES = ("diffusers", "ours")
WORK = ("encode", "decode")
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Result:
  """One size; the field names are the JSON keys.

  Attributes:
    size: image side in pixels.
    batch: images at a time.
    seconds: of the fastest run of a batch, by side and work.
    medians: of the same.
    loaded_gib: peak resident memory before the first image, by side.
    peak_gib: peak resident memory at the end, by side.
    max_relative_error: largest difference over the largest magnitude, by work.
  """

  size: int
  batch: int
  seconds: dict[str, dict[str, float]]
  medians: dict[str, dict[str, float]]
  loaded_gib: dict[str, float]
  peak_gib: dict[str, float]
  max_relative_error: dict[str, float]


def _define_flags():
  flags.DEFINE_list("sizes", ["256", "512"], "Image sides in pixels.")
  flags.DEFINE_integer("batch", 1, "Images at a time.", lower_bound=1)
  flags.DEFINE_integer("width", 48, "Decoder width; encoder 2/3 of it.")
  flags.DEFINE_integer("repeats", 7, "Timed runs of each side.", lower_bound=1)
  flags.DEFINE_string("json", None, "File to write the numbers to.")
  flags.DEFINE_string("markdown", None, "File to write the table to.")
  flags.DEFINE_enum("side", None, SIDES, "Set by the program for its parts.")
  flags.DEFINE_string("folder", None, "Set by the program for its parts.")


def check_flags(sizes: list[str], width: int) -> list[int]:
  """The sizes as numbers.

  Raises:
    InputError: a size or the width suits no model.
  """
  for text in sizes:
    if not text.isdigit() or not int(text) or int(text) % 16:
      raise InputError(f"--sizes={text} must be a multiple of 16, e.g. 256.")
  if width < 12 or width % 12:
    raise InputError(f"--width={width} must be 12, 24, ...")
  return [int(text) for text in sizes]


def make_model(folder: str, width: int, **fields) -> None:
  """Saves a random VAE of the public structure as a diffusers folder."""
  import diffusers
  import diffusers_cases

  z = diffusers_cases.LATENT_CHANNELS
  shape = {
    "base_dim": width * 2 // 3, "decoder_base_dim": width, "z_dim": z,
    "latents_mean": [0.0] * z, "latents_std": [1.0] * z, **fields,
  }  # fmt: skip
  model = diffusers.AutoencoderKLQwenImage21(**shape)
  diffusers_cases.randomise(model, 0).save_pretrained(folder)


def make_inputs(folder: str, batch: int, size: int) -> None:
  """Saves an RGBA image and latents of the model in `folder`."""
  with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
    published = json.load(file)
  z, factor = published["z_dim"], published["scale_factor_spatial"]
  rng = np.random.default_rng(0)
  side = size // factor
  image = rng.uniform(-1, 1, (batch, size, size, published["in_channels"]))
  latents = rng.normal(size=(batch, side, side, z))
  for name, value in (("encode", image), ("decode", latents)):
    np.save(os.path.join(folder, f"{name}.npy"), value.astype("f4"))


def _their_work(folder: str) -> dict[str, Callable]:
  """What diffusers does; inputs and outputs are channels last."""
  import diffusers
  import torch

  torch.set_num_threads(environment.cores())
  model = diffusers.AutoencoderKLQwenImage21.from_pretrained(folder).eval()

  def inputs(name):
    x = np.load(os.path.join(folder, f"{name}.npy"))
    return torch.tensor(x.transpose(0, 3, 1, 2)[:, :, None])

  @torch.inference_mode()
  def encode(x):
    return model.encode(x).latent_dist.mean

  @torch.inference_mode()
  def decode(z):
    return model.decode(z).sample

  def work(run, name):
    x = inputs(name)
    return lambda: run(x)[:, :, 0].permute(0, 2, 3, 1).numpy()

  return {"encode": work(encode, "encode"), "decode": work(decode, "decode")}


def _our_work(folder: str) -> dict[str, Callable]:
  """The same in JAX, compiled by its first call."""
  import jax

  from qi2_jax.models import vae_tiling
  from qi2_jax.training import build

  # A compiled program from an earlier run would lower the peak.
  jax.config.update("jax_enable_compilation_cache", False)
  # Beside torch on the CPU; the default of a GPU would be another race.
  jax.config.update("jax_platforms", "cpu")
  module, variables = build.load_vae(folder)

  def work(run, name):
    x = jax.numpy.asarray(np.load(os.path.join(folder, f"{name}.npy")))
    compiled = jax.jit(lambda variables, x: run(module, variables, x))
    return lambda: np.asarray(compiled(variables, x))

  return {n: work(getattr(vae_tiling, n), n) for n in WORK}


def _peak_gib() -> float:
  """Peak resident memory of this process so far.

  Not `ru_maxrss`: that starts at the peak of the process which started this.
  """
  with open("/proc/self/status", encoding="ascii") as file:
    (line,) = [text for text in file if text.startswith("VmHWM:")]
  return int(line.split()[1]) * 1024 / _GIB


def serve(side: str, folder: str) -> None:
  """One side: runs what the lines of stdin name, answers with JSON lines."""
  work = (_their_work if side == "diffusers" else _our_work)(folder)
  _answer({"peak_gib": _peak_gib()})
  for line in sys.stdin:
    name = line.strip()
    start = time.perf_counter()
    out = work[name]()
    seconds = time.perf_counter() - start
    path = os.path.join(folder, f"{side}_{name}.npy")
    if not os.path.exists(path):
      np.save(path, out)
    _answer({"seconds": seconds, "peak_gib": _peak_gib()})


def _answer(value: dict) -> None:
  print(json.dumps(value), flush=True)


class Side:
  """A process that does one side's work, one request at a time."""

  def __init__(self, name: str, folder: str):
    """Starts it; `loaded` is its first answer, when the model is there."""
    command = [sys.executable, __file__, f"--side={name}", f"--folder={folder}"]
    self.name = name
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.loaded = self._read()

  def _read(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      raise InputError(
        f"the process of {self.name} ended; its message stands above. A "
        "smaller --sizes or --batch needs less memory."
      )
    return json.loads(line)

  def do(self, work: str) -> dict:
    """Runs `encode` or `decode` and returns the answer."""
    try:
      self._process.stdin.write(f"{work}\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # It ended; the read says so.
    return self._read()

  def stop(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()


def _error(folder: str, work: str) -> float:
  theirs, ours = (
    np.load(os.path.join(folder, f"{side}_{work}.npy")) for side in SIDES
  )
  error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  if not error <= TOLERANCE:
    raise InputError(
      f"{work}: the outputs differ by {error:.1e} of their scale, more than "
      f"{TOLERANCE:.0e}; the times would not compare the same work."
    )
  return error


def measure(folder: str, batch: int, size: int, repeats: int) -> Result:
  """Times both sides in alternation on the model in `folder`.

  Raises:
    InputError: the outputs differ by more than `TOLERANCE`, or a process
      ended.
  """
  make_inputs(folder, batch, size)
  sides = {}
  try:
    for name in SIDES:
      sides[name] = Side(name, folder)
    errors, times, last = {}, {n: {} for n in SIDES}, {}
    for work in WORK:
      for side in sides.values():
        side.do(work)  # Compiles, and fills caches.
      errors[work] = _error(folder, work)
      for i in range(repeats):
        for name in SIDES if i % 2 == 0 else SIDES[::-1]:
          last[name] = sides[name].do(work)
          times[name].setdefault(work, []).append(last[name]["seconds"])
  finally:
    for side in sides.values():
      side.stop()
  pick = lambda f: {  # noqa: E731
    n: {work: f(t) for work, t in of.items()} for n, of in times.items()
  }
  return Result(
    size=size, batch=batch, seconds=pick(min), medians=pick(statistics.median),
    loaded_gib={n: s.loaded["peak_gib"] for n, s in sides.items()},
    peak_gib={n: last[n]["peak_gib"] for n in SIDES},
    max_relative_error=errors,
  )  # fmt: skip


def markdown(results: list[Result]) -> str:
  """The results as a markdown table."""
  lines = [
    "| px | batch | side | encode img/s | decode img/s | both img/s "
    "| peak GiB (after loading) | max rel. error |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for r in results:
    for name in SIDES:
      seconds = r.seconds[name]
      rates = [seconds["encode"], seconds["decode"], sum(seconds.values())]
      rates = " | ".join(f"{r.batch / s:.3g}" for s in rates)
      memory = f"{r.peak_gib[name]:.2f} ({r.loaded_gib[name]:.2f})"
      error = max(r.max_relative_error.values())
      lines.append(
        f"| {r.size} | {r.batch} | {name} | {rates} | {memory} | {error:.0e} |"
      )
  return "\n".join(lines) + "\n"


def main() -> int:
  """Entry point."""
  f = flags.FLAGS
  if f.side:
    serve(f.side, f.folder)
    return 0
  sizes = check_flags(f.sizes, f.width)
  results = []
  for size in sizes:
    with tempfile.TemporaryDirectory() as folder:
      try:
        make_model(folder, f.width)
      except ImportError as error:
        raise InputError(
          f"this benchmark needs torch and diffusers, but {error}; install "
          "qi2_jax[test]."
        ) from error
      results.append(measure(folder, f.batch, size, f.repeats))
    print(markdown(results[-1:]), flush=True)
  table = markdown(results)
  if f.json:
    names = ("sizes", "batch", "width", "repeats")
    store.write_json(f.json, {
      "machine": environment.machine(),
      "versions": environment.versions("torch", "diffusers"),
      "flags": {n: getattr(f, n) for n in names},
      "results": [dataclasses.asdict(r) for r in results],
    })  # fmt: skip
  if f.markdown:
    store.write_text(f.markdown, table)
  return 0


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
