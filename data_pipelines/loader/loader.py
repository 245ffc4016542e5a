# SPDX-License-Identifier: Apache-2.0
"""Deterministic batches for training, on Grain's MapDataset.

Batch k is a pure function of (config, data, k). It does not depend on
threads, and the rows of all hosts, concatenated in host order, are the batch
that a single host would see. A checkpoint therefore stores a step number and
`Loader.fingerprint`; to resume is to call `iterate(step)`.
"""

import dataclasses
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np
import PIL
import PIL.features

from data_pipelines.errors import InputError
from data_pipelines.images import EncodedImage, decode_image
from data_pipelines.loader.buckets import (
  Bucket,
  Program,
  bucket_report,
  check_buckets,
  fit,
)
from data_pipelines.loader.programs import make_plan
from data_pipelines.loader.rows import HostRows, Passes
from data_pipelines.records import Record, open_dataset

# Raise it when the order of the data changes for an unchanged config.
_ORDER_VERSION = 1
# Grain's mix spaces programs evenly; shuffling steps within a window breaks
# that rhythm and keeps the shares of every aligned window.
_WINDOW = 100

Sample = dict[str, Any]
Transform = Callable[[Sample, np.random.Generator], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
  """What to read, and in which shapes.

  Attributes:
    paths: dataset folders.
    buckets: (height, width) in pixels, for targets and references alike.
    batch_size: rows of the global batch, over all hosts.
    task_weights: share of the steps per task; need not sum to 1.
    channels: 4 keeps alpha, 3 composites over white.
    max_enlarge: images needing more linear magnification are left out.
    min_bucket_records: programs with fewer records are left out.
    max_references: records with more references are left out.
    seed: of the order and of the transform's randomness.
    threads: decoding threads; 0 reads in the calling thread.
    quarantine_path: JSON-lines file to which damaged records are appended.
  """

  paths: tuple[str, ...]
  buckets: tuple[tuple[int, int], ...]
  batch_size: int
  task_weights: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {"t2i": 0.9, "ti2i": 0.1}
  )
  channels: int = 4
  max_enlarge: float = 1.5
  min_bucket_records: int = 1
  max_references: int = 4
  seed: int = 0
  threads: int = 4
  quarantine_path: str | None = None


@dataclasses.dataclass(frozen=True)
class ProgramInfo:
  """A batch shape with its number of records and its share of the steps."""

  key: Program
  count: int
  weight: float


def images_only(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
  """The default transform: keeps `image` and `references`."""
  del rng
  return {"image": sample["image"], "references": sample["references"]}


class Loader:
  """Batches of fixed shapes from dataset folders.

  Attributes:
    programs: every batch shape that can occur, with counts and weights.
    fingerprint: hash of everything that decides the order and the pixels,
      except the transform. Equal fingerprints mean equal batches.
  """

  def __init__(
    self,
    config: LoaderConfig,
    transform: Transform = images_only,
    host_index: int = 0,
    host_count: int = 1,
  ):
    """Opens the datasets and plans the programs; reads no pixels.

    Args:
      config: what to read.
      transform: maps a sample (`id`, `caption`, `kind`, `task`, `image` uint8
        [H, W, C], `references` tuple of uint8 [h, w, C]) and a generator to a
        dict (or nested dicts and tuples) of numpy arrays whose shapes and
        dtypes depend on the program only. Called in worker threads.
      host_index: this host.
      host_count: number of hosts; divides `batch_size`.

    Raises:
      InputError: the config, a dataset or the host numbers are unusable.
    """
    _check(config, host_index, host_count)
    self._config = config
    self._transform = transform
    self._datasets = [open_dataset(path) for path in config.paths]
    self._starts = np.cumsum([0] + [len(d) for d in self._datasets])
    self._plan = make_plan(
      [dataset.index for dataset in self._datasets],
      check_buckets(config.buckets),
      config.task_weights,
      config.max_enlarge,
      config.max_references,
      config.min_bucket_records,
    )
    self.programs = [
      ProgramInfo(program, len(members), weight)
      for program, members, weight in zip(
        self._plan.programs, self._plan.members, self._plan.weights
      )
    ]
    self.fingerprint = _fingerprint(config, self._datasets)
    self._lock = threading.Lock()  # of the next two
    self._corrupt: set[int] = set()
    self._specs: dict[int, Any] = {}
    self._idle = threading.Condition()  # of the next two
    self._rows_in_work = 0
    self._closed = False
    self._iterators: list[grain.DatasetIterator] = []
    self._steps = self._build(host_index, host_count)

  def _build(self, host_index: int, host_count: int) -> grain.MapDataset:
    """The step -> local batch map; lazy, nothing is read here."""
    seed, batch_size = self._config.seed, self._config.batch_size
    datasets = []
    for number, info in enumerate(self.programs):
      # Seeds by name: a new program leaves the order in the others alone.
      order = Passes(info.count, _seed(seed, "order", info.key))
      # Before the split, so that randomness follows the global row number.
      rows = grain.MapDataset.source(order).random_map(
        lambda position, rng, number=number: self._load(number, position, rng),
        seed=_seed(seed, "transform", info.key),
      )
      rows = grain.MapDataset.source(
        HostRows(rows, batch_size, host_index, host_count)
      )
      datasets.append(rows.batch(batch_size // host_count))
    weights = [info.weight for info in self.programs]
    return grain.experimental.WindowShuffleMapDataset(
      grain.MapDataset.mix(datasets, weights),
      window_size=_WINDOW,
      seed=_seed(seed, "window"),
    )

  def iterate(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
    """Endless batches from `start_step` on.

    Returns:
      Iterator of the transform's dicts with a leading axis of
      batch_size / host_count rows.
    """
    if start_step < 0:
      raise InputError(f"Cannot resume at step {start_step}; use 0 or more.")
    threads = self._config.threads
    steps = self._steps[start_step:].to_iter_dataset(
      grain.ReadOptions(
        num_threads=threads,
        prefetch_buffer_size=threads + 2 if threads else 0,
      )
    )
    iterator = iter(steps)
    self._iterators.append(iterator)
    return iterator

  def report(self) -> str:
    """A table of the programs and of what was left out, with reasons."""
    programs = [(info.key, info.count, info.weight) for info in self.programs]
    dropped = self._plan.dropped
    return bucket_report(programs, dropped, self._config.batch_size)

  @property
  def corrupt_count(self) -> int:
    """Number of damaged records met (and replaced) so far on this host."""
    return len(self._corrupt)

  def close(self) -> None:
    """Stops the threads, waits for the rows in work, and closes the files."""
    for iterator in self._iterators:
      iterator.close()
    self._iterators.clear()
    with self._idle:
      self._closed = True
      self._idle.wait_for(lambda: self._rows_in_work == 0)
    for dataset in self._datasets:
      dataset.close()

  def _load(
    self, number: int, position: int, rng: np.random.Generator
  ) -> dict[str, Any]:
    """Reads, decodes and transforms one row of program `number`."""
    # Grain does not wait for its threads, and no file may close under one.
    with self._idle:
      if self._closed:
        raise RuntimeError("The loader is closed.")
      self._rows_in_work += 1
    try:
      return self._transformed(number, self._read(number, position), rng)
    finally:
      with self._idle:
        self._rows_in_work -= 1
        self._idle.notify_all()

  def _transformed(
    self, number: int, sample: Sample, rng: np.random.Generator
  ) -> dict[str, Any]:
    """The transform's output, checked against its program's other samples."""
    try:
      output = self._transform(sample, rng)
      spec = _spec(output)
    except Exception as error:
      error.add_note(f"in the loader's transform, record {sample['id']!r}")
      raise
    with self._lock:
      expected = self._specs.setdefault(number, spec)
    if spec != expected:
      raise InputError(
        f"The transform made {spec} of record {sample['id']!r}, but {expected} "
        f"of another record of program {self.programs[number].key}; give all "
        "samples of a program the same shapes and dtypes."
      )
    return output

  def _read(self, number: int, position: int) -> Sample:
    """The record at `position`, or the next undamaged one of its program."""
    members = self._plan.members[number]
    for offset in range(len(members)):
      record_number = int(members[(position + offset) % len(members)])
      if record_number in self._corrupt:
        continue
      which = int(np.searchsorted(self._starts, record_number, "right")) - 1
      dataset = self._datasets[which]
      i = record_number - int(self._starts[which])
      try:
        return self._sample(dataset[i], self.programs[number].key)
      except InputError as error:
        self._note_corrupt(record_number, f"{dataset.path}#{i}", str(error))
    raise InputError(
      f"All {len(members)} records of program {self.programs[number].key} are "
      "damaged; rebuild the datasets."
    )

  def _sample(self, record: Record, program: Program) -> Sample:
    channels = self._config.channels
    images = [
      pixels(encoded, bucket, channels)
      for encoded, bucket in zip(
        (record.target, *record.references),
        (program.target, *program.references),
        strict=True,
      )
    ]
    return {
      "id": record.id,
      "caption": record.caption,
      "kind": record.kind,
      "task": record.task,
      "image": images[0],
      "references": tuple(images[1:]),
    }

  def _note_corrupt(self, record_number: int, where: str, reason: str) -> None:
    with self._lock:
      if record_number in self._corrupt:
        return
      self._corrupt.add(record_number)
      print(f"Replaced damaged record {where}: {reason}", file=sys.stderr)
      if self._config.quarantine_path:
        line = json.dumps({"id": where, "reason": reason, "where": "loader"})
        with open(self._config.quarantine_path, "a", encoding="utf-8") as file:
          file.write(line + "\n")


def _check(config: LoaderConfig, host_index: int, host_count: int) -> None:
  if not config.paths:
    raise InputError("The loader has no dataset; give at least one path.")
  if config.channels not in (3, 4):
    raise InputError(f"Images have 3 or 4 channels, not {config.channels}.")
  if not 0 <= host_index < host_count:
    raise InputError(
      f"Host {host_index} of {host_count} does not exist; count from 0."
    )
  if config.batch_size < 1 or config.batch_size % host_count:
    raise InputError(
      f"Batch size {config.batch_size} is not a positive multiple of the "
      f"{host_count} hosts; change batch_size."
    )


def pixels(encoded: EncodedImage, bucket: Bucket, channels: int) -> np.ndarray:
  """Decodes an image and fits it to a bucket: uint8 [h, w, channels].

  Raises:
    InputError: the bytes are damaged, or of another size than recorded.
  """
  image = decode_image(encoded)
  if image.size != (encoded.width, encoded.height):
    # The bucket was chosen by the recorded size.
    raise InputError(
      f"Image is {image.size}, its record says "
      f"{(encoded.width, encoded.height)}; rebuild the dataset."
    )
  fitted = fit(image, bucket, channels)
  assert fitted.shape == (*bucket, channels), (fitted.shape, bucket)
  return fitted


def _spec(tree: Any) -> Any:
  """Shapes and dtypes of nested dicts and tuples of arrays, comparable."""
  if isinstance(tree, dict):
    return tuple((key, _spec(tree[key])) for key in sorted(tree))
  if isinstance(tree, (tuple, list)):
    return tuple(_spec(item) for item in tree)
  if isinstance(tree, (np.ndarray, np.generic)):
    return tree.shape, tree.dtype.str
  raise InputError(
    f"The transform returned a {type(tree).__name__}; return numpy arrays in "
    "dicts and tuples."
  )


def _seed(*parts: Any) -> int:
  """A stable 31-bit seed; Grain adds small numbers and needs 32 bits."""
  digest = hashlib.sha256(repr(parts).encode()).digest()
  return int.from_bytes(digest[:4], "big") >> 1


def _fingerprint(config: LoaderConfig, datasets: list) -> str:
  # Paths, threads and the quarantine file change neither order nor pixels.
  fields = dataclasses.asdict(config)
  for name in ("paths", "threads", "quarantine_path"):
    del fields[name]
  content = {
    "order_version": _ORDER_VERSION,
    "config": fields,
    "data": [
      [(s["records"], s["sha256"]) for s in dataset.manifest["shards"]]
      for dataset in datasets
    ],
    # Decoders and resamplers differ between versions by a grey level or two.
    "versions": {
      "grain": grain.__version__,
      "pillow": PIL.__version__,
      "jpeg": PIL.features.version("jpg"),
      "jpeg_turbo": PIL.features.version("libjpeg_turbo"),
      "webp": PIL.features.version("webp"),
    },
  }
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
