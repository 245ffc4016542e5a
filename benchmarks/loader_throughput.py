# SPDX-License-Identifier: Apache-2.0
"""Does the loader keep up with the 7.1 B step?

    python benchmarks/loader_throughput.py
    python benchmarks/loader_throughput.py --side=256 --photos --threads=2
    python benchmarks/loader_throughput.py --side=1024 --photos \\
      --json=loader.json
    python benchmarks/loader_throughput.py --data=DATA --threads=16

Reads a dataset through the real loader and the real transform of
pre-training (tokenizer, token layout, references), three times: in the
calling thread, to know the CPU time of a row; with threads and no pause, to
know the most it can give; with threads and a step that sleeps, to know how
long a training step would wait. Exit status 1: the step waited for data for
more than `--max_wait` of the time.

The default data is rendered, flat shapes as PNG. `--photos` draws random
textures instead, with sides 1 to 1.5 times those of a bucket and stored as
JPEG of quality 90, which at 2.3 bits per pixel are about as large as
photographs. `--data` names a dataset folder. The built-in tokenizer stands in
for Qwen's.

The default step takes as long as the roofline of docs/scale.md says for one
host of v5p:4x4x4 (sold as v5p-128: 64 chips, 16 hosts). A host's rows there
are 2048, 1024 or 512 per step at 256, 512 or 1024 px; here the batch is
`--batch_size` and the sleep is shortened in proportion, so rows per second
are the same. The true step is slower than its roofline and needs less data.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags
from PIL import Image

from data_pipelines import records
from data_pipelines.images import from_bytes
from data_pipelines.loader.config import LoaderConfig, Phase, Resolution
from data_pipelines.loader.loader import Loader
from data_pipelines.shapes.generate import Options, generate
from experiments import common, pretrain
from qi2_jax import cli
from qi2_jax.errors import InputError
from qi2_jax.evaluation import environment, store
from qi2_jax.training import build
from qi2_jax.training.flow_task import flow_transform

# Seconds of a step over its roofline on v5p:4x4x4 by side (docs/scale.md).
ROOFLINE_S = {256: 49.5, 512: 50.0, 1024: 88.4}
HOSTS = 16


@dataclasses.dataclass(frozen=True)
class Result:
  """What was measured; the field names are the JSON keys.

  Attributes:
    side: side of the square bucket, pixels.
    threads: decoding threads.
    batch_size: rows of this host per step.
    step_seconds: length of the simulated step.
    cpu_ms_per_row: CPU time of one row, read in the calling thread.
    cpu_ms_per_image: the same by image; a row of an edit has several.
    rows_per_second: with threads, without a pause.
    images_per_second: the same by image.
    mb_per_second: of the arrays of those rows, in 10^6 bytes.
    first_batch_seconds: until the first batch; not in `wait_share`.
    wait_share: share of the paced run that was spent waiting for data.
    longest_wait_seconds: of the paced run.
    needed_rows_per_second: what this pace asks for.
    needed_cores: CPU time that it asks for, per second.
  """

  side: int
  threads: int
  batch_size: int
  step_seconds: float
  cpu_ms_per_row: float
  cpu_ms_per_image: float
  rows_per_second: float
  images_per_second: float
  mb_per_second: float
  first_batch_seconds: float
  wait_share: float
  longest_wait_seconds: float
  needed_rows_per_second: float
  needed_cores: float


def _define_flags():
  flags.DEFINE_string("data", None, "Dataset folder; none: data is made.")
  flags.DEFINE_bool("photos", False, "Make JPEG textures, not shapes.")
  flags.DEFINE_integer("records", 256, "Records to make.", lower_bound=10)
  flags.DEFINE_integer("side", 512, "Resolution: 256, 512, 1024 or 2048.")
  flags.DEFINE_integer(
    "batch_size", 32, "Rows of this host per step.", lower_bound=1
  )
  flags.DEFINE_float(
    "step_seconds", None, "Length of a step; see above.", lower_bound=0
  )
  flags.DEFINE_integer("steps", 20, "Steps of a run.", lower_bound=1)
  flags.DEFINE_integer("threads", 4, "Decoding threads.", lower_bound=1)
  flags.DEFINE_float("max_wait", 0.02, "Share of waiting that is too much.")
  flags.DEFINE_string("json", None, "File to write the numbers to.")


def step_seconds(side: int, batch_size: int) -> float:
  """The roofline's step for one host, shortened to `batch_size` rows.

  Raises:
    InputError: no step of that side was planned.
  """
  if side not in ROOFLINE_S:
    raise InputError(
      f"no step at --side={side} is in docs/scale.md; give --step_seconds."
    )
  return ROOFLINE_S[side] * batch_size / (common.BATCH_SIZES[side] / HOSTS)


def texture(rng: np.random.Generator, width: int, height: int) -> bytes:
  """A JPEG with detail at every scale: noise of falling strength."""
  total = np.zeros((height, width, 3), np.float32)
  for octave in range(8):
    cells = (max(1, width >> octave), max(1, height >> octave))
    noise = rng.integers(0, 256, (cells[1], cells[0], 3), np.uint8)
    layer = Image.fromarray(noise).resize(
      (width, height), Image.Resampling.BICUBIC
    )
    total += (np.asarray(layer, np.float32) - 128) * 1.5 ** (octave - 7)
  buffer = io.BytesIO()
  image = Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))
  image.save(buffer, "JPEG", quality=90)
  return buffer.getvalue()


def write_textures(path: str, count: int, buckets) -> None:
  """A dataset of textures, every tenth record an edit of another texture."""
  rng = np.random.default_rng(0)

  def image(bucket):
    height, width = (int(side * rng.uniform(1, 1.5)) for side in bucket)
    return from_bytes(texture(rng, width, height))

  with records.DatasetWriter(path, 1, {}) as writer:
    for i in range(count):
      bucket = buckets[i % len(buckets)]
      edit = i % 10 == 9
      writer.add(
        records.Record(
          id=str(i),
          task="ti2i" if edit else "t2i",
          caption=f"random texture number {i}, in many colours",
          kind="texture",
          target=image(bucket),
          references=(image(bucket),) if edit else (),
          provenance={},
        )
      )


@contextlib.contextmanager
def dataset(values, buckets) -> Iterator[str]:
  """The folder that `--data` names, or one made for the time of the run."""
  if values.data:
    yield values.data
    return
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "data")
    edits = values.records // 10
    if values.photos:
      write_textures(path, values.records, buckets)
    else:
      sizes = tuple((w, h) for h, w in buckets)
      options = Options(t2i=values.records - edits, edits=edits, sizes=sizes)
      generate(path, options, workers=1)
    yield path


def take(loader: Loader, steps: int, seconds: float) -> tuple:
  """Runs `steps` steps of `seconds` each, after a first batch.

  Returns:
    `(seconds to the first batch, waits of the others, bytes of the others)`.
  """
  batches = loader.iterate()
  start = time.perf_counter()
  next(batches)
  first = time.perf_counter() - start
  waits, size = [], 0
  for _ in range(steps):
    time.sleep(seconds)
    start = time.perf_counter()
    batch = next(batches)
    waits.append(time.perf_counter() - start)
    size += sum(x.nbytes for x in jax.tree.leaves(batch))
  return first, waits, size


def images_per_row(loader: Loader, steps: int) -> float:
  """Targets and references of the first steps, by row."""
  programs = [loader.peek(step)[0] for step in range(steps)]
  return sum(1 + len(p.key.references) for p in programs) / steps


def measure(config: LoaderConfig, transform, steps: int, seconds: float):
  """The three runs over one dataset; see the module docstring."""
  (resolution,) = config.resolutions.values()
  rows = resolution.batch_size
  alone = Loader(dataclasses.replace(config, threads=0), transform)
  batches = alone.iterate()
  start = time.process_time()
  count = sum(1 for _ in itertools.islice(batches, max(1, 200 // rows)))
  cpu = (time.process_time() - start) / (count * rows)
  cpu_per_image = cpu / images_per_row(alone, count)
  alone.close()
  burst = Loader(config, transform)
  start = time.perf_counter()
  _, waits, size = take(burst, steps, 0.0)
  elapsed = time.perf_counter() - start
  rate, images = (steps + 1) * rows / elapsed, images_per_row(burst, steps + 1)
  burst.close()
  paced = Loader(config, transform)
  first, waits, _ = take(paced, steps, seconds)
  paced.close()
  side = max(resolution.buckets[0])
  return Result(
    side=side, threads=config.threads, batch_size=rows, step_seconds=seconds,
    cpu_ms_per_row=1000 * cpu, cpu_ms_per_image=1000 * cpu_per_image,
    rows_per_second=rate, images_per_second=rate * images,
    mb_per_second=size / steps * (steps + 1) / elapsed / 1e6,
    first_batch_seconds=first,
    wait_share=sum(waits) / (sum(waits) + steps * seconds),
    longest_wait_seconds=max(waits),
    needed_rows_per_second=rows / seconds if seconds else float("inf"),
    needed_cores=cpu * rows / seconds if seconds else float("inf"),
  )  # fmt: skip


def text(result: Result) -> str:
  """The result in words."""
  r = result
  return (
    f"{r.side} px, {r.batch_size} rows per step of {r.step_seconds:.2f} s, "
    f"{r.threads} threads\n"
    f"a row costs {r.cpu_ms_per_row:.2f} ms of CPU, an image "
    f"{r.cpu_ms_per_image:.2f}: one core gives "
    f"{1000 / r.cpu_ms_per_image:.0f} images/s\n"
    f"without a pause: {r.rows_per_second:.1f} rows/s, "
    f"{r.images_per_second:.1f} images/s, {r.mb_per_second:.0f} MB/s\n"
    f"the step needs {r.needed_rows_per_second:.1f} rows/s, that is "
    f"{r.needed_cores:.2f} cores\n"
    f"waiting for data: {r.wait_share:.2%} of the time, at most "
    f"{r.longest_wait_seconds:.3f} s; first batch after "
    f"{r.first_batch_seconds:.1f} s"
  )


def main() -> int:
  """Entry point."""
  values = flags.FLAGS
  if values.side not in common.BUCKETS:
    raise InputError(
      f"--side={values.side} is unknown; use one of {sorted(common.BUCKETS)}."
    )
  seconds = values.step_seconds
  if seconds is None:
    seconds = step_seconds(values.side, values.batch_size)
  config = pretrain.get_config("512")
  conditioner, _ = build.conditioner(config.text, build.new_vae(config.vae))
  buckets = common.BUCKETS[values.side]
  with dataset(values, buckets) as path:
    result = measure(
      LoaderConfig(
        (path,), {"all": Resolution(buckets, values.batch_size)},
        (Phase(0, {"all": 1.0}),), threads=values.threads, repeat_small=True,
      ),
      flow_transform(conditioner, config.data), values.steps, seconds,
    )  # fmt: skip
  print(text(result))
  if values.json:
    content = dataclasses.asdict(result) | {
      "data": values.data or ("textures" if values.photos else "shapes"),
      "steps": values.steps,
      "machine": environment.machine(),
      "versions": environment.versions(),
    }
    store.write_json(values.json, content)
  return int(result.wait_share > values.max_wait)


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
