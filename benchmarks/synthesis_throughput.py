# SPDX-License-Identifier: Apache-2.0
"""How many synthetic samples a machine draws per second, by strategy.

    python benchmarks/synthesis_throughput.py
    python benchmarks/synthesis_throughput.py --processes=2 --sizes=768x512 \\
      --strategies=pure --count=400 --json=synthesis.json

Each strategy writes datasets to a temporary folder with the generator's own
function: drawing, encoding, checksums and shards count, and samples that were
rejected and drawn again are part of the time. The start of processes and the
loading of fonts are not: two runs are timed, each in a fresh process, one of
`--count` samples and one of twice as many, and their difference is told. CPU
time is of all processes, per sample.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import resource
import sys
import tempfile
import time

from absl import app, flags

from data_pipelines.cli import clean_exit, parse_sizes
from data_pipelines.errors import InputError
from data_pipelines.synthesis import generate
from data_pipelines.synthesis.languages import LANGUAGES


def _define_flags():
  flags.DEFINE_list("strategies", list(generate.STRATEGIES), "Strategies.")
  flags.DEFINE_list("languages", list(LANGUAGES), "Languages.")
  flags.DEFINE_list("sizes", ["768x512"], "WIDTHxHEIGHT, ...")
  flags.DEFINE_integer("count", 160, "Samples per strategy.", lower_bound=8)
  flags.DEFINE_integer("processes", os.cpu_count() or 1, "Processes.")
  flags.DEFINE_enum("format", "png", ["png", "jpeg"], "Encoding.")
  flags.DEFINE_string("json", "", "File for the table.")


def cpu_seconds() -> float:
  """CPU time of this process and of its finished children."""
  return sum(
    use.ru_utime + use.ru_stime
    for use in map(
      resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
  )


def timed(options: generate.Options, processes: int):
  """Wall seconds, CPU seconds and rejected samples of a run on its own."""
  with concurrent.futures.ProcessPoolExecutor(
    1, multiprocessing.get_context("spawn")
  ) as fresh:
    return fresh.submit(_timed, options, processes).result()


def _timed(options: generate.Options, processes: int):
  with tempfile.TemporaryDirectory() as folder:
    cpu, wall = cpu_seconds(), time.perf_counter()
    rejected = generate.generate(f"{folder}/out", options, processes)
    return (
      time.perf_counter() - wall,
      cpu_seconds() - cpu,
      sum(rejected.values()),
    )


def row_of(strategy: str) -> dict[str, object]:
  """A strategy's row of the table."""
  values = flags.FLAGS

  def options(count: int) -> generate.Options:
    return generate.Options(
      count=count,
      strategies=(strategy,),
      languages=tuple(values.languages),
      sizes=parse_sizes(values.sizes),
      encoding=values.format,
    )

  short = timed(options(values.count), values.processes)
  long = timed(options(2 * values.count), values.processes)
  wall, cpu, rejected = (b - a for a, b in zip(short, long))
  if min(wall, cpu) <= 0:
    raise InputError(
      "The longer run took less time than the shorter one, so other programs "
      "disturbed them; raise --count or wait."
    )
  return {
    "strategy": strategy,
    "samples": values.count,
    "samples_per_s": round(values.count / wall, 1),
    "cpu_ms": round(1000 * cpu / values.count, 1),
    "rejected": rejected,
  }


def main(argv: list[str]):
  """Measures, and prints a table."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  values = flags.FLAGS
  with clean_exit():
    rows = [row_of(strategy) for strategy in values.strategies]
  print(
    f"{', '.join(values.sizes)}, {values.format}, {len(values.languages)} "
    f"languages, {values.processes} processes"
  )
  print("| " + " | ".join(rows[0]) + " |")
  print("|" + "---|" * len(rows[0]))
  for row in rows:
    print("| " + " | ".join(map(str, row.values())) + " |")
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(rows, indent=2) + "\n")
  sys.stdout.flush()


if __name__ == "__main__":
  _define_flags()
  app.run(main)
