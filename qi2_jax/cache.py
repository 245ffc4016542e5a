# SPDX-License-Identifier: Apache-2.0
"""Precomputes what VAE and text encoder make of a dataset: a feature cache.

    python -m qi2_jax.cache --config=experiments/sft.py:1024 --out=CACHE \\
      --config.data.path=DATA --config.vae.path=models/qi21 \\
      --config.text.path=models/qi21
    python -m qi2_jax.train --config=experiments/sft.py:1024 \\
      --workdir=runs/sft --config.data.path=CACHE ...

Take the training command, give it --out for --workdir, and afterwards train
with the cache as `config.data.path`: the batches are the same ones, with the
same dropped captions and references, and the losses are equal to rounding. A
cache serves every run that has the same VAE, text encoder, text length and
buckets and no dropout that the cache was made without; any other is refused.

Images are resized to the config's buckets as the loader does it and encoded
in batches on the devices of each host (`config.mesh` counts those of one
host); hosts share the work by shard. Interrupt it at any time: the same
command goes on with the first unfinished shard.

--storage=exact keeps latents in fp32 and states in the encoder's compute
dtype, which loses nothing; bfloat16 halves the latents (and the states of an
fp32 encoder) and rounds them.

What the real models need per record (64 channels, states of width 4096 in
bf16; a caption of 150 tokens, one reference of the target's size, exact):

                     latents    caption   references          sum
    512 px, T2I      256 KiB    1.2 MiB                       1.4 MiB
    512 px, edit     256 KiB    1.2 MiB   256 KiB + 2.0 MiB   3.7 MiB
    1024 px, T2I     1.0 MiB    1.2 MiB                       2.2 MiB
    1024 px, edit    1.0 MiB    1.2 MiB   1.0 MiB + 8.0 MiB   11.2 MiB

White references add a caption's states once more, empty captions next to
nothing. That is ten to a hundred times the record's JPEGs: cache sets that
are read many times (fine-tuning), not a pre-training corpus. A batch holds
records of one shard and one shape, and the last one of each is padded: give
shards many times --batch_size records.
"""

import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from data_pipelines.errors import InputError as DataError
from data_pipelines.features import codec, writer
from data_pipelines.features.check import PREVIEW_FOLDER, read_about
from data_pipelines.features.dataset import (
  SHARED_FILE,
  VERSION,
  pack_program,
  read_shared,
)
from data_pipelines.loader import lengths
from data_pipelines.loader.buckets import Program, check_buckets
from data_pipelines.loader.programs import make_plan
from data_pipelines.records import Dataset, DatasetWriter, open_dataset
from qi2_jax import captions, cli, train
from qi2_jax.errors import InputError
from qi2_jax.evaluation.progress import reporter
from qi2_jax.parallel import distributed
from qi2_jax.parallel import mesh as mesh_lib
from qi2_jax.producer import Producer, rows, shared_row
from qi2_jax.training import build, cached, frozen

_POLL_SECONDS = 1.0
_PREVIEW_RECORDS = 8  # of each kind; ours


def _bucket_sets(settings) -> dict[str, list[list[int]]]:
  """(height, width) of the resolutions; equal sets count once."""
  sets = {}
  for name, resolution in settings.resolutions.items():
    buckets = [list(bucket) for bucket in resolution.buckets]
    if buckets not in sets.values():
      sets[name] = buckets
  return sets


def _members(settings, dataset: Dataset) -> list[dict[Program, np.ndarray]]:
  """Per bucket set, which records feed which program; see `make_plan`."""
  plans = [
    make_plan(
      name, [dataset.index], check_buckets(buckets), {"t2i": 1.0, "ti2i": 1.0},
      settings.max_enlarge, settings.max_references, min_bucket_records=1,
    )
    for name, buckets in _bucket_sets(settings).items()
  ]  # fmt: skip
  return [dict(zip(plan.programs, plan.members)) for plan in plans]


def _describe(
  config, settings, dataset, models, programs, shared, storage
) -> dict:
  """`features` of the manifest."""
  return {
    "version": VERSION,
    "models": cached.signature(models),
    "storage": storage,
    "channels": settings.channels,
    "buckets": list(_bucket_sets(settings).values()),
    "max_enlarge": settings.max_enlarge,
    "max_references": settings.max_references,
    "empty_captions": config.data.caption_dropout > 0,
    "white_references": config.data.reference_dropout > 0,
    "programs": [pack_program(program) for program in programs],
    "shared": len(shared),
    "source": {
      "shards": [
        {"records": s["records"], "sha256": s["sha256"]}
        for s in dataset.manifest["shards"]
      ],
    },
  }


def producer(config, batch_size: int, storage: str) -> Producer:
  """Opens the dataset and loads the models.

  Args:
    config: of the training that the cache is for.
    batch_size: rows per call; rounded up to fill the devices.
    storage: 'exact' or 'bfloat16'.

  Raises:
    InputError: the config names no single dataset, or no such models.
  """
  path = config.data.path
  if not path or "," in path:
    raise InputError(
      f"config.data.path={path!r} is not one dataset folder; make one cache "
      "per folder."
    )
  if read_about(path):
    raise InputError(f"{path} is a feature cache already; give the dataset.")
  dataset = open_dataset(path)
  settings = train.loader_config(config.data, (path,), "", config.seed)
  members = _members(settings, dataset)
  mesh = mesh_lib.create_mesh(config.mesh.to_dict(), jax.local_devices())
  programs = sorted({program for one in members for program in one})
  shapes = {()}
  if config.data.reference_dropout:
    shapes |= {program.references for program in programs}
  shared = {key: n for n, key in enumerate(sorted(shapes))}
  module, variables = build.frozen_vae(config.vae)
  variables = distributed.to_host(variables)
  with jax.set_mesh(mesh):
    models = frozen.assemble(config, module, variables, mesh)
    about = _describe(
      config, settings, dataset, models, programs, shared, storage
    )
  split = mesh.shape["data"] * mesh.shape["fsdp"]
  half = jnp.dtype(jnp.bfloat16)
  computed = jnp.dtype(models.conditioner.encoder.model.config.dtype)
  exact = storage == "exact"
  return Producer(
    dataset, models, mesh, -(-batch_size // split) * split,
    config.data.threads, jnp.dtype(jnp.float32) if exact else half,
    computed if exact else half, about, members,
    {program: n for n, program in enumerate(programs)}, shared,
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of the dataset and the records in it."""

  name: str
  first: int
  count: int

  def own(self, numbers: np.ndarray) -> np.ndarray:
    """Those of the record numbers that are in this shard."""
    end = self.first + self.count
    return numbers[(numbers >= self.first) & (numbers < end)]


def shards_of(dataset: Dataset) -> list[Shard]:
  """The shards that hold records."""
  shards, first = [], 0
  for shard in dataset.manifest["shards"]:
    if shard["records"]:
      shards.append(Shard(shard["path"], first, shard["records"]))
      first += shard["records"]
  return shards


def encode_shard(
  job: Producer,
  folder: pathlib.Path,
  shard: Shard,
  shared: list[codec.SharedRow],
  report: Callable[[], None],
) -> None:
  """Writes one shard of the cache; complete or absent.

  Args:
    job: the source and the models.
    folder: the partial folder.
    shard: which.
    shared: the shared rows.
    report: called after every row.
  """
  sidecar = (job.dataset.path / shard.name).with_suffix(".npz")
  sets = len(job.members)
  with writer.ShardWriter(folder, shard.name, sidecar, sets) as out:
    for of_set, members in enumerate(job.members):
      for program, numbers in members.items():
        own = shard.own(numbers)
        if not len(own):
          continue
        for i, data, damaged in rows(job, program, own, shared):
          number = job.programs[program]
          out.add(data, i - shard.first, of_set, number, damaged)
          report()


def _write_preview(dataset: Dataset, folder: pathlib.Path) -> None:
  """Keeps the first images of each kind for sample grids."""
  if (folder / PREVIEW_FOLDER).exists():
    return
  edit = dataset.index.references > 0
  with DatasetWriter(folder / PREVIEW_FOLDER, 1, {"name": "preview"}) as out:
    for kind in (False, True):
      for i in np.flatnonzero(edit == kind)[:_PREVIEW_RECORDS].tolist():
        try:
          out.add(dataset[i])
        except DataError as error:
          out.quarantine(str(i), str(error), "cache")


def _begin(job: Producer, out: str) -> None:
  """The partial folder with everything but the shards; process 0 only."""
  folder = writer.prepare(out, job.about)
  _write_preview(job.dataset, folder)
  if not (folder / SHARED_FILE).exists():
    made = [shared_row(job, shapes) for shapes in job.shared]
    writer.write_shared(folder, [codec.encode_shared(row) for row in made])
  _write_lengths(job, folder)


def _write_lengths(job: Producer, folder: pathlib.Path) -> None:
  """Keeps the lengths of the captions, for `config.text.lengths`."""
  counter = captions.counter_of(job.models.conditioner)
  if (folder / lengths.file_name(job.dataset.manifest, counter)).exists():
    return
  counts = lengths.stored_counts(job.dataset, counter)
  if counts is None:  # token_counts would write into the dataset's folder
    counts = lengths.count_captions(job.dataset, counter, job.threads)
  lengths.store_counts(folder, job.dataset.manifest, counter, counts)


def _wait(done: Callable[[], bool]) -> None:
  while not done():
    time.sleep(_POLL_SECONDS)


def _finish(job: Producer, out: str, shards: list[Shard]) -> None:
  """Process 0 completes the cache when all processes have done their part."""
  names = [shard.name for shard in shards]
  if jax.process_index():
    _wait(lambda: os.path.exists(out))
    return
  folder = writer.partial_folder(out)
  _wait(lambda: all(writer.is_finished(folder, name) for name in names))
  manifest = writer.commit(out, names, job.about)
  size = sum(shard["bytes"] for shard in manifest["shards"])
  logging.info(
    "wrote %s: %d rows of %.2f MiB on average, %d damaged", out,
    manifest["records"], size / manifest["records"] / 2**20,
    manifest["quarantined"],
  )  # fmt: skip


def build_cache(config, out: str, batch_size: int, storage: str) -> None:
  """Makes a cache, or the rest of one.

  Args:
    config: of the training that it is for.
    out: the folder to create.
    batch_size: rows per call, on the devices of one host.
    storage: 'exact' or 'bfloat16'.

  Raises:
    InputError: bad config, no such models, or `out` is something else.
  """
  job = producer(config, batch_size, storage)
  if writer.is_complete(out, job.about):
    logging.info("%s is complete", out)
    return
  with jax.set_mesh(job.mesh):
    _run(job, out)


def _run(job: Producer, out: str) -> None:
  distributed.on_first(lambda: _begin(job, out))
  folder = writer.partial_folder(out)
  shared = read_shared(folder)
  shards = shards_of(job.dataset)
  own = [
    shard
    for shard in shards[jax.process_index() :: jax.process_count()]
    if not writer.is_finished(folder, shard.name)
  ]
  total = sum(
    len(shard.own(numbers))
    for shard in own
    for members in job.members
    for numbers in members.values()
  )
  logging.info(
    "%d rows in %d shards to encode, %d shards are finished", total, len(own),
    len(shards) - len(own),
  )  # fmt: skip
  done, report = itertools.count(1), reporter("cache", total)
  for shard in own:
    encode_shard(job, folder, shard, shared, lambda: report(next(done)))
  _finish(job, out, shards)


def _define_flags():
  config_flags.DEFINE_config_file(
    "config", None, "Config of the training, e.g. experiments/sft.py:1024."
  )
  flags.DEFINE_string("out", None, "Folder to create.")
  flags.DEFINE_integer(
    "batch_size", 32, "Records per call, per host.", lower_bound=1
  )
  flags.DEFINE_enum(
    "storage", "exact", ["exact", "bfloat16"], "Precision on disk."
  )
  flags.mark_flags_as_required(["config", "out"])


def main() -> None:
  """Entry point."""
  distributed.initialise()
  values = flags.FLAGS
  build_cache(values.config, values.out, values.batch_size, values.storage)


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
