# SPDX-License-Identifier: Apache-2.0
"""Offline pipeline against a bare pool of processes with the same kernels.

    python benchmarks/pipeline_throughput.py
    python benchmarks/pipeline_throughput.py --images=4000 --json=pipeline.json
    python benchmarks/pipeline_throughput.py --small=100000

Both read the same JPEGs, take all CPU metrics, decide on all filters that need
no score (three kinds of deduplication among them, less embeddings), resize to
the buckets of 512 px and write ArrayRecord and Parquet files. The pool is
`multiprocessing.Pool` without Beam, markers, checksums, limits of time or
protection against crashes: what the pipeline costs beyond it. Every run is a
fresh process; start-up counts. Wall time, CPU time and peak memory are of the
process with all its children.

Exit status 1: the pipeline needs more than `--max_ratio` of the wall time of
the pool. Pictures are random textures that compress about as photographs do;
`--small=N` measures the memory of N records of 64 px instead.
"""

import io
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import app, flags
from array_record.python import array_record_module
from loader_throughput import texture
from PIL import Image

from data_pipelines.engine import ingest, materialise, measure, stage
from data_pipelines.engine.config import parse
from data_pipelines.filters import decide
from data_pipelines.sources import folder
from data_pipelines.sources.items import Unusable
from experiments import data

_SCORED = ("nsfw", "alignment", "embedding_duplicate")


def _define_flags():
  flags.DEFINE_integer("images", 2000, "JPEGs of 512 to 768 px.")
  flags.DEFINE_integer("small", 0, "Records of 64 px instead, pipeline only.")
  flags.DEFINE_integer("processes", os.cpu_count(), "Of either side.")
  flags.DEFINE_integer("repeats", 1, "Runs of each side; the fastest counts.")
  flags.DEFINE_float("max_ratio", 1.3, "Wall time over that of the pool.")
  flags.DEFINE_string("json", None, "File to write the numbers to.")
  flags.DEFINE_string("run", None, "Internal: the side that a process runs.")
  flags.DEFINE_string("folder", None, "Internal: where the input is.")
  flags.DEFINE_string("out", None, "Internal: where the output goes.")


def config(small: bool):
  """Stage 3 without what needs scores; small records get small buckets."""
  values = data.get_config("tiny" if small else "stage3")
  values.score = {}
  values.filter_order = tuple(
    name for name in values.filter_order if name not in _SCORED
  )
  return parse(values.to_dict())


def run_pipeline(source: str, out: str, processes: int, small: bool) -> int:
  """The real thing; returns the number of records kept."""
  found = stage.run(
    stage.Run(
      config=config(small), out=pathlib.Path(out), inputs=(source,),
      processes=processes,
    )
  )  # fmt: skip
  return found["kept"]


def first_pass(entry) -> tuple[bytes, dict]:
  """Reads, checks, decodes and measures one item."""
  limits = config(False).limits
  item = folder._load(entry, limits)
  record = ingest.make_record(entry["id"], item, limits)
  return record, measure.measure_record(record, limits)


def second_pass(task):
  """Resizes one record."""
  try:
    return materialise.resize_record(*task)
  except Unusable:
    return None


def run_pool(source: str, out: str, processes: int) -> int:
  """The same kernels on a bare pool; returns the number of records kept."""
  cfg = config(False)
  settings = materialise.Settings(
    cfg.name, cfg.resolutions, cfg.max_enlarge, cfg.encoding, cfg.limits
  )
  (part,) = folder.plan(pathlib.Path(source), "in", 10**9)
  os.makedirs(out)
  raw, small = (
    array_record_module.ArrayRecordWriter(
      os.path.join(out, name), "group_size:1,uncompressed"
    )
    for name in ("raw.array_record", "small.array_record")
  )
  with multiprocessing.get_context("spawn").Pool(processes) as pool:
    records, rows = [], []
    for record, row in pool.imap(first_pass, part.entries, chunksize=8):
      raw.write(record)
      records.append(record)
      rows.append(row)
    table = pa.Table.from_pylist(rows, measure.SCHEMA)
    pq.write_table(table, os.path.join(out, "rows.parquet"))
    verdicts = decide.decide(table, cfg.filters, cfg.filter_order, cfg.seed)
    kept = [
      (record, settings)
      for record, stays in zip(records, verdicts["kept"].to_pylist())
      if stays
    ]
    done = pool.imap(second_pass, kept, chunksize=8)
    count = 0
    for result in done:
      if result is not None:
        small.write(result[0])
        count += 1
  raw.close()
  small.close()
  return count


def write_input(path: pathlib.Path, count: int, small: bool) -> None:
  """JPEGs with captions; a tenth of them are there twice."""
  path.mkdir()
  rng = np.random.default_rng(0)
  for i in range(count):
    if i % 10 != 9:
      low, high = (64, 96) if small else (512, 768)
      size = tuple(int(side) for side in rng.integers(low, high, 2))
      last = blur(rng, *size) if small else texture(rng, *size)
    (path / f"{i:07d}.jpg").write_bytes(last)
    (path / f"{i:07d}.txt").write_text(f"random texture, number {i // 10}")


def blur(rng: np.random.Generator, width: int, height: int) -> bytes:
  """A JPEG that costs little to make: 81 colours, interpolated."""
  colours = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
  buffer = io.BytesIO()
  colours.resize((width, height)).save(buffer, "JPEG", quality=90)
  return buffer.getvalue()


class _Memory(threading.Thread):
  """Largest sum of proportional set sizes of a process and its children."""

  def __init__(self, pid: int):
    super().__init__(daemon=True)
    self._pid, self.peak = pid, 0

  def run(self) -> None:
    while True:
      total = sum(_pss(pid) for pid in _tree(self._pid))
      if not total:
        return
      self.peak = max(self.peak, total)
      time.sleep(0.25)


def _tree(pid: int) -> list[int]:
  found = [pid]
  for parent in found:
    try:
      for task in os.listdir(f"/proc/{parent}/task"):
        text = pathlib.Path(f"/proc/{parent}/task/{task}/children").read_text()
        found += [int(child) for child in text.split()]
    except OSError:
      continue
  return found


def _pss(pid: int) -> int:
  try:
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
  except OSError:
    return 0
  lines = [line for line in text.splitlines() if line.startswith("Pss:")]
  return int(lines[0].split()[1]) * 1024 if lines else 0


def measure_side(side: str, source: pathlib.Path, values) -> dict[str, float]:
  """Runs one side in a process of its own."""
  with tempfile.TemporaryDirectory() as place:
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(
      [
        sys.executable, __file__, f"--run={side}", f"--folder={source}",
        f"--out={place}/out", f"--processes={values.processes}",
        f"--small={values.small}",
      ],
      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    memory = _Memory(process.pid)
    memory.start()
    text, _ = process.communicate()
    seconds = time.perf_counter() - start
    after = os.times()
  if process.returncode:
    raise SystemExit(f"{side} failed with status {process.returncode}")
  cpu = (
    after.children_user + after.children_system
    - before.children_user - before.children_system
  )  # fmt: skip
  count = values.small or values.images
  return {
    "kept": int(text.strip().splitlines()[-1]),
    "seconds": seconds,
    "images_per_second": count / seconds,
    "cpu_seconds": cpu,
    "cpu_ms_per_image": 1000 * cpu / count,
    "peak_mb": memory.peak / 1e6,
  }


def compare(values) -> int:
  """Both sides on one input, one after the other."""
  sides = ("pipeline",) if values.small else ("pool", "pipeline")
  results = {}
  with tempfile.TemporaryDirectory() as place:
    source = pathlib.Path(place) / "in"
    write_input(source, values.small or values.images, bool(values.small))
    for _ in range(values.repeats):
      for side in sides:
        found = measure_side(side, source, values)
        best = results.setdefault(side, found)
        if found["seconds"] < best["seconds"]:
          results[side] = found
  for side, r in results.items():
    print(
      f"{side:<9} {r['images_per_second']:6.1f} images/s, "
      f"{r['cpu_ms_per_image']:5.1f} CPU-ms per image, "
      f"{r['peak_mb']:5.0f} MB, {r['kept']} kept"
    )
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(results, indent=2))
  if values.small:
    return 0
  ratio = results["pipeline"]["seconds"] / results["pool"]["seconds"]
  cpu = results["pipeline"]["cpu_seconds"] / results["pool"]["cpu_seconds"]
  print(f"ratio: {ratio:.2f} of wall time, {cpu:.2f} of CPU time")
  return int(ratio > values.max_ratio)


def main(argv: list[str]) -> int:
  """Entry point."""
  del argv
  values = flags.FLAGS
  if values.run == "pool":
    print(run_pool(values.folder, values.out, values.processes))
  elif values.run == "pipeline":
    print(
      run_pipeline(
        values.folder, values.out, values.processes, bool(values.small)
      )
    )
  else:
    return compare(values)
  return 0


if __name__ == "__main__":
  _define_flags()
  app.run(main)
