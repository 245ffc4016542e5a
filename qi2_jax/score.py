# SPDX-License-Identifier: Apache-2.0
"""Scores records with CLIP or SigLIP: alignment, embedding, aesthetics.

    python -m qi2_jax.score --model=models/clip-vit-large-patch14 \\
      --head=aesthetic.safetensors --input=runs/stage1 --name=clip

--model is a transformers folder of CLIP, SigLIP or SigLIP 2 of a fixed
resolution (`random`: a tiny model that means nothing, for trying things out).
--input is the output folder of a stage of the offline pipeline after its verb
*ingest*, or a dataset folder. Writes, for every shard of the input,

    OUT/score/NAME/part-00000.parquet
      id              of the record
      clip_alignment  cosine of target and caption (cut to the model's length)
      embedding       unit vector of the target, float16
      aesthetic       mark of the head (see qi2_jax/interop/aesthetic.py)

and a marker when it is complete. No other run may write to the stage
meanwhile. Interrupt it at any time: the same command goes on with the first
unfinished shard, and does nothing when model, head and shards are those that
were scored. A record whose target cannot be decoded has a row with nothing but
its id. OUT is --input unless --out says otherwise.

Batches are split over the devices of a host; hosts share the work by shard.
"""

import contextlib
import dataclasses
import glob
import hashlib
import os
import pathlib
from collections.abc import Iterator

import jax
import pyarrow as pa
from absl import flags, logging

from data_pipelines import records
from data_pipelines.cli import exclusive
from data_pipelines.engine import shards
from data_pipelines.errors import InputError as DataError
from qi2_jax import cli, scorer
from qi2_jax.errors import InputError
from qi2_jax.evaluation.progress import reporter
from qi2_jax.interop import aesthetic as heads
from qi2_jax.interop import image_text
from qi2_jax.parallel import distributed
from qi2_jax.scorer import Job

_CODE = (
  "qi2_jax.scorer", "qi2_jax.interop.image_processor",
  "qi2_jax.interop.image_text", "qi2_jax.interop.text_tokens",
  "qi2_jax.models.clip", "qi2_jax.models.siglip", "qi2_jax.models.vit",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
  """A shard to score.

  Attributes:
    path: the ArrayRecord file.
    count: records in it.
    sha256: of the file.
  """

  path: pathlib.Path
  count: int
  sha256: str

  @property
  def stem(self) -> str:
    """Name of what is written for it, without suffix."""
    return self.path.name.removesuffix(".array_record")


def sources(folder: str) -> list[Source]:
  """The shards of a pipeline stage or of a dataset, in order.

  Raises:
    InputError: it is neither, or a shard is incomplete.
  """
  root = pathlib.Path(folder)
  ingest = root / "ingest"
  if not ingest.is_dir():
    manifest = records.read_manifest(folder)
    return [
      Source(root / s["path"], s["records"], s["sha256"])
      for s in manifest["shards"]
    ]
  found = []
  for path in sorted(ingest.glob("part-*.array_record")):
    stem = path.name.removesuffix(".array_record")
    sha256 = shards.sha256_of(ingest, stem, ".array_record")
    found.append(Source(path, _length(path), sha256))
  if not found:
    raise InputError(
      f"{ingest} holds no shards; run the pipeline's verb ingest first."
    )
  return found


def _length(path: pathlib.Path) -> int:
  reader = records.array_record_module.ArrayRecordReader(str(path))
  try:
    return reader.num_records()
  finally:
    reader.close()


def fingerprint(model: str, head: str) -> str:
  """SHA-256 of the code, the model's files and the head."""
  whole = hashlib.sha256(shards.code_version(*_CODE).encode())
  files = [head] if head not in ("", heads.RANDOM) else []
  if model != image_text.RANDOM:
    for pattern in ("*.json", "*.safetensors", "merges.txt"):
      files += sorted(glob.glob(os.path.join(glob.escape(model), pattern)))
  for file in files:
    try:
      with open(file, "rb") as opened:
        whole.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
      raise InputError(f"{file} is unreadable ({error.strerror}).") from error
  whole.update(f"{jax.default_backend()} {head == heads.RANDOM}".encode())
  return whole.hexdigest()


def score_shard(
  job: Job, source: Source, folder: pathlib.Path, about: dict, report
) -> None:
  """Writes the scores of one shard; complete or absent.

  Args:
    job: the models.
    source: the shard.
    folder: of the scores.
    about: `fingerprint`, and what the marker says of the model.
    report: called with every batch's number of rows.

  Raises:
    InputError: the shard is damaged or the disk is full.
  """
  parts = []
  # Outside of the writer, which takes every RuntimeError for a full disk.
  for part in scorer.tables(job, source.path):
    parts.append(part)
    report(part.num_rows)
  whole = pa.concat_tables(parts or [scorer.empty_table(job)])
  made = _fingerprint_of(source, about)
  with shards.write(folder, source.stem, made) as shard:
    shard.table(whole)
    damaged = whole["clip_alignment"].null_count
    shard.counts = {
      **about["counts"], "records": whole.num_rows, "damaged": damaged,
      "source_sha256": source.sha256,
    }  # fmt: skip


def _fingerprint_of(source: Source, about: dict) -> str:
  both = about["fingerprint"] + source.sha256
  return hashlib.sha256(both.encode()).hexdigest()


def score(values) -> pathlib.Path:
  """Scores what is not scored yet; returns the folder of the scores.

  Args:
    values: the flags, see the module docstring.

  Raises:
    InputError: bad flags, model, head or input.
  """
  if not values.name or values.name in (".", "..") or "/" in values.name:
    raise InputError(
      f"--name={values.name!r} is no name of a folder; use one such as clip."
    )
  sources(values.input)  # before a folder is made
  folder = pathlib.Path(values.out or values.input) / "score" / values.name
  image_text.kind_of(values.model)
  about = {
    "fingerprint": fingerprint(values.model, values.head),
    "counts": {
      "model": os.path.basename(os.path.normpath(values.model)),
      "head": os.path.basename(values.head),
      "random": image_text.RANDOM in (values.model, values.head),
    },
  }
  with _locked(values):
    return _score_missing(values, folder, about)


@contextlib.contextmanager
def _locked(values) -> Iterator[None]:
  """Keeps other runs out of the folders that are read and written.

  One process holds the locks for all of its hosts, which share the work.

  Raises:
    InputError: another run writes to one of them.
  """
  folders = {pathlib.Path(values.out or values.input).resolve()}
  if (pathlib.Path(values.input) / "ingest").is_dir():
    folders.add(pathlib.Path(values.input).resolve())
  with contextlib.ExitStack() as stack:

    def lock() -> None:
      for folder in sorted(folders):
        try:
          stack.enter_context(exclusive(folder))
        except DataError as error:
          raise InputError(str(error)) from error

    distributed.on_first(lock)
    yield
    distributed.on_first(lambda: None)  # the locks outlive the slowest host


def _score_missing(values, folder: pathlib.Path, about: dict) -> pathlib.Path:
  """Scores this host's part of what is not scored yet."""
  found = sources(values.input)
  folder.mkdir(parents=True, exist_ok=True)
  distributed.on_first(lambda: shards.sweep(folder))
  own = [
    source
    for source in found[jax.process_index() :: jax.process_count()]
    if not shards.is_done(folder, source.stem, _fingerprint_of(source, about))
  ]
  logging.info("%d of %d shards to score", len(own), len(found))
  if not own:
    return folder
  job = scorer.load(
    values.model, values.head, values.batch_size, values.threads
  )
  done, show = 0, reporter("score", sum(source.count for source in own))

  def report(rows: int) -> None:
    nonlocal done
    done += rows
    show(done)

  with jax.set_mesh(job.mesh):
    for source in own:
      score_shard(job, source, folder, about, report)
  return folder


def _define_flags():
  flags.DEFINE_string("model", None, "Folder of CLIP or SigLIP.")
  flags.DEFINE_string("input", None, "Output of a stage, or a dataset folder.")
  flags.DEFINE_string("out", "", "Where to write score/NAME; default --input.")
  flags.DEFINE_string("name", None, "Name of the score, e.g. clip.")
  flags.DEFINE_string("head", "", "Aesthetic head (.safetensors), if any.")
  flags.DEFINE_integer("batch_size", 64, "Records per call.", lower_bound=1)
  flags.DEFINE_integer("threads", 4, "That decode images.", lower_bound=1)
  flags.mark_flags_as_required(["model", "input", "name"])


def main() -> None:
  """Entry point."""
  distributed.initialise()
  print(score(flags.FLAGS))


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
