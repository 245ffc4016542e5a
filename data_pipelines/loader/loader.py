# SPDX-License-Identifier: Apache-2.0
"""Deterministic batches for training, on Grain's MapDataset.

Every resolution is an endless stream of batches of its own size; the schedule
says which stream feeds a step. Batch k is a pure function of (config, data,
k). It does not depend on threads, and the rows of all hosts, concatenated in
host order, are the batch that a single host would see. A checkpoint therefore
stores a step number and `Loader.fingerprint`; to resume is to call
`iterate(step)`.
"""

import concurrent.futures
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.features.check import open_any
from data_pipelines.features.dataset import FeatureDataset
from data_pipelines.images import EncodedImage, decode_image
from data_pipelines.loader.buckets import Bucket, Program, fit
from data_pipelines.loader.config import LoaderConfig, check_config
from data_pipelines.loader.curriculum import (
  WINDOW,
  Curriculum,
  schedule_report,
)
from data_pipelines.loader.fingerprint import fingerprint, seed_of
from data_pipelines.loader.lengths import (
  TokenCounter,
  padded_lengths,
  token_counts,
)
from data_pipelines.loader.mixture import Mixture
from data_pipelines.loader.programs import (
  ProgramInfo,
  check_sizes,
  describe,
  make_plans,
)
from data_pipelines.loader.report import bucket_report, source_report
from data_pipelines.loader.rows import HostBatches, Numbered, Passes
from data_pipelines.records import Record

# Batches in the making or waiting, beside the one in use: enough to even out
# slow records, and their pixels still fit a host's memory.
_BATCHES_AHEAD = 3

Sample = dict[str, Any]
Transform = Callable[[Sample, np.random.Generator], dict[str, Any]]


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
    counter: TokenCounter | None = None,
  ):
    """Opens the datasets and plans the programs; reads no pixels.

    Args:
      config: what to read.
      transform: maps a sample (`id`, `caption`, `kind`, `task`, `image` uint8
        [H, W, C], `references` tuple of uint8 [h, w, C], `text_length` of its
        program) and a generator to a dict (or nested dicts and tuples) of
        numpy arrays whose shapes and dtypes depend on the program only.
        Called in worker threads.
      host_index: this host.
      host_count: number of hosts; divides every batch size.
      counter: measures captions, where the config has text lengths.

    Raises:
      InputError: the config, a dataset or the host numbers are unusable, or
        a program has fewer records than a batch.
    """
    check_config(config, host_index, host_count)
    self._config = config
    self._transform = transform
    self._datasets = [open_any(path, config) for path in config.paths]
    self._starts = np.cumsum([0] + [len(d) for d in self._datasets])
    lengths = _text_lengths(config, self._datasets, counter)
    indices = [dataset.index for dataset in self._datasets]
    self._plans = make_plans(config, indices, lengths)
    self._members = [m for plan in self._plans.values() for m in plan.members]
    self.programs = describe(config, self._plans)
    if not config.repeat_small:
      check_sizes(self.programs)
    self.fingerprint = fingerprint(config, self._datasets, lengths)
    self._lock = threading.Lock()  # of the next two
    self._corrupt: set[int] = set()
    self._specs: dict[int, Any] = {}
    self._idle = threading.Condition()  # of the next two
    self._rows_in_work = 0
    self._closed = False
    self._iterators: list[grain.DatasetIterator] = []
    self._pool = config.threads and concurrent.futures.ThreadPoolExecutor(
      config.threads, thread_name_prefix="loader"
    )
    self._orders = [self._order(info) for info in self.programs]
    self._batches = [
      HostBatches(
        self._rows(number), info.batch_size, host_index, host_count,
        self._pool.map if self._pool else map,
      )
      for number, info in enumerate(self.programs)
    ]  # fmt: skip
    self._schedule = self._build()
    self._steps = self._schedule.map(
      lambda numbers: self._batches[numbers[0]][numbers[1]]
    )

  def _build(self) -> grain.MapDataset:
    """Step -> (program, how many of its batches came before); lazy."""
    names = list(self._plans)
    seed = seed_of(self._config.seed, "schedule")
    curriculum = Curriculum(self._config.schedule, names, seed)
    streams = [self._stream(name) for name in names]
    return grain.MapDataset.select_from_datasets(streams, curriculum)

  def _stream(self, name: str) -> grain.MapDataset:
    """The endless programs of the batches of one resolution."""
    own = {
      number: info.weight
      for number, info in enumerate(self.programs)
      if info.resolution == name
    }
    datasets = [grain.MapDataset.source(Numbered(number)) for number in own]
    # Grain's mix spaces programs evenly; shuffling steps within a window
    # breaks that rhythm and keeps the shares of every aligned window.
    return grain.experimental.WindowShuffleMapDataset(
      grain.MapDataset.mix(datasets, list(own.values())),
      window_size=WINDOW,
      seed=seed_of(self._config.seed, "window", name),
    )

  def _seed(self, what: str, info: ProgramInfo, *more: int) -> int:
    # By name: a new program leaves the order in the others alone.
    lengths = (info.text_length,) if info.text_length else ()
    return seed_of(
      self._config.seed, what, info.resolution, info.key, *lengths, *more
    )

  def _order(self, info: ProgramInfo) -> Passes | Mixture:
    """The endless positions in a program's members that its rows take."""
    if len(info.parts) == 1:
      return Passes(info.count, self._seed("order", info))
    seeds = [self._seed("order", info, i) for i in range(len(info.parts))]
    return Mixture(info.parts, seeds, self._seed("sources", info))

  def _rows(self, number: int) -> grain.MapDataset:
    """The endless rows of one program, over all hosts."""
    # Before the split, so that randomness follows the global row number.
    return grain.MapDataset.source(self._orders[number]).random_map(
      lambda position, rng: self._load(number, position, rng),
      seed=self._seed("transform", self.programs[number]),
    )

  def peek(self, step: int) -> tuple[ProgramInfo, np.ndarray]:
    """What a step's global batch is made of; reads no record.

    Returns:
      Its program, and per row the number of its record, counted through the
      datasets in order. A damaged record is replaced when it is read.
    """
    number, before = self._schedule[step]
    info, order = self.programs[number], self._orders[number]
    first = before * info.batch_size
    rows = range(first, first + info.batch_size)
    return info, self._members[number][[order[row] for row in rows]]

  def iterate(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
    """Endless batches from `start_step` on.

    Returns:
      Iterator of the transform's dicts with a leading axis of
      batch_size / host_count rows; the batch size is that of the step's
      resolution.
    """
    if start_step < 0:
      raise InputError(f"Cannot resume at step {start_step}; use 0 or more.")
    ahead = _BATCHES_AHEAD if self._pool else 0
    # Two at a time: rows of the next are read while one is stacked.
    steps = self._steps[start_step:].to_iter_dataset(
      grain.ReadOptions(num_threads=min(2, ahead), prefetch_buffer_size=ahead)
    )
    iterator = iter(steps)
    self._iterators.append(iterator)
    return iterator

  def report(self) -> str:
    """Phases, programs, and what was left out, with reasons."""
    lines = [schedule_report(self._config.schedule)]
    for name, plan in self._plans.items():
      own = [info for info in self.programs if info.resolution == name]
      lines.append(f"{name}: {bucket_report(own, plan.dropped)}")
      if self._config.weights is not None:
        lines.append(source_report(own, self._config.paths))
    used = len(np.unique(np.concatenate(self._members)))
    lines.append(
      f"{used} of {self._starts[-1]} records are used; each of "
      f"{len(self.programs)} programs is compiled when its first batch comes"
    )
    return "\n".join(lines)

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
    if self._pool:
      self._pool.shutdown(cancel_futures=True)
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
        f"of another record of program {self.programs[number]}; give all "
        "samples of a program the same shapes and dtypes."
      )
    return output

  def _read(self, number: int, position: int) -> Sample:
    """The record at `position`, or the next undamaged one of its program."""
    members, info = self._members[number], self.programs[number]
    for offset in range(len(members)):
      record_number = int(members[(position + offset) % len(members)])
      if record_number in self._corrupt:
        continue
      which = int(np.searchsorted(self._starts, record_number, "right")) - 1
      dataset = self._datasets[which]
      i = record_number - int(self._starts[which])
      try:
        if isinstance(dataset, FeatureDataset):
          sample = dataset.sample(i, info.key)
        else:
          sample = self._sample(dataset[i], info.key)
        return sample | {"text_length": info.text_length}
      except InputError as error:
        self._note_corrupt(record_number, f"{dataset.path}#{i}", str(error))
    raise InputError(
      f"All {len(members)} records of program {info} are damaged; rebuild the "
      "datasets."
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


def _text_lengths(
  config: LoaderConfig, datasets: list, counter: TokenCounter | None
) -> list[np.ndarray] | None:
  """Padded length of every caption, per dataset; None: all have one."""
  if not config.text_lengths:
    return None
  if counter is None:
    raise InputError(
      f"Nothing here reads captions, so text lengths {config.text_lengths} "
      "cannot be kept; give none."
    )
  return [
    padded_lengths(
      token_counts(dataset, counter, config.threads), config.text_lengths
    )
    for dataset in datasets
  ]
