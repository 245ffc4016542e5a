# SPDX-License-Identifier: Apache-2.0
"""Renders a shapes-and-glyphs dataset in parallel.

Record i depends on the options and on i alone, never on which process drew
it, so any number of workers writes the same bytes.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from data_pipelines import records
from data_pipelines.errors import InputError
from data_pipelines.shapes import edits, prompts, render
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.scene import Scene

# Raise when the pixels or the words of existing options change.
VERSION = 1

_CHUNK = 64
# A process takes as long to start as about this many records to draw.
_RECORDS_PER_WORKER = 1000
_SECONDS_BETWEEN_LINES = 2.0
_TASK_SEEDS = {"t2i": 0, "ti2i": 1}


def _equal(kinds: tuple[str, ...]) -> dict[str, float]:
  return dict.fromkeys(kinds, 1.0)


@dataclasses.dataclass(frozen=True)
class Options:
  """Everything that determines a dataset.

  Attributes:
    t2i: number of text-to-image records.
    edits: number of editing records.
    sizes: (width, height) in pixels.
    size_weights: relative frequency of each size; empty for equal.
    kinds: relative frequency of each text-to-image kind.
    edit_kinds: relative frequency of each edit kind.
    seed: changes every sample.
    split: 'seen' or 'held_out' prompts.
    shards: number of files.
  """

  t2i: int = 16000
  edits: int = 8000
  sizes: tuple[tuple[int, int], ...] = ((64, 64), (96, 64), (64, 96))
  size_weights: tuple[float, ...] = ()
  kinds: dict[str, float] = dataclasses.field(
    default_factory=lambda: _equal(vocab.T2I_KINDS)
  )
  edit_kinds: dict[str, float] = dataclasses.field(
    default_factory=lambda: _equal(vocab.EDIT_KINDS)
  )
  seed: int = 0
  split: str = "seen"
  shards: int = 4

  def __post_init__(self):
    if min(self.t2i, self.edits) < 0 or self.t2i + self.edits == 0:
      raise InputError(
        f"{self.t2i} t2i and {self.edits} edit records make no dataset; ask "
        "for at least one record."
      )
    if self.seed < 0:
      raise InputError(f"Seed {self.seed} is negative; use 0 or more.")
    if self.shards < 1:
      raise InputError(
        f"{self.shards} shards cannot be written; use 1 or more."
      )
    prompts.require_split(self.split)
    _require_sizes(self.sizes, self.size_weights)
    _require_kinds("t2i", self.kinds, vocab.T2I_KINDS)
    _require_kinds("edit", self.edit_kinds, vocab.EDIT_KINDS)


def generate(
  out: str | os.PathLike, options: Options, workers: int = 0
) -> bool:
  """Writes a dataset folder, or leaves a finished one as it is.

  Args:
    out: the folder to create (see `data_pipelines.records`).
    options: what to draw.
    workers: processes; 0 for one per CPU. More than one needs a caller whose
      main module may be imported (`if __name__ == "__main__":`).

  Returns:
    True if the dataset was written, False if it was already there.

  Raises:
    InputError: if `out` holds anything but this very dataset.
  """
  source = source_of(options)
  if _is_finished(out, source):
    print(f"{out} already holds this dataset; nothing to do.", file=sys.stderr)
    return False
  total = options.t2i + options.edits
  with records.DatasetWriter(out, options.shards, source) as writer:
    for record in _with_progress(_records(options, workers), total):
      writer.add(record)
  return True


def source_of(options: Options) -> dict[str, Any]:
  """The manifest's `source`: plain JSON that identifies the dataset."""
  source = {"generator": "data_pipelines.shapes", "version": VERSION}
  return json.loads(json.dumps({**source, **dataclasses.asdict(options)}))


def sample(
  task: str, index: int, options: Options, kind: str | None = None
) -> tuple[prompts.Example | edits.EditExample, tuple[int, int]]:
  """Draws an example and its canvas size.

  Args:
    task: 't2i' or 'ti2i'.
    index: number of the example within its task.
    options: sizes, mixture, seed and split; the counts do not matter.
    kind: by default drawn from the mixture.

  Returns:
    The example and (width, height).
  """
  rng = np.random.default_rng([options.seed, _TASK_SEEDS[task], index])
  weights = options.size_weights or [1.0] * len(options.sizes)
  size = options.sizes[_draw(rng, weights)]
  if task == "t2i":
    known, mixture = vocab.T2I_KINDS, options.kinds
  else:
    known, mixture = vocab.EDIT_KINDS, options.edit_kinds
  # In the vocabulary's order: the order of a dict is no option.
  drawn = known[_draw(rng, [mixture.get(k, 0) for k in known])]
  draw = prompts.sample_split if task == "t2i" else edits.sample_edit_split
  return draw(kind or drawn, options.split, rng), size


def _draw(rng: np.random.Generator, weights) -> int:
  weights = np.asarray(weights, np.float64)
  return int(rng.choice(len(weights), p=weights / weights.sum()))


def _record(task: str, index: int, options: Options) -> records.Record:
  example, size = sample(task, index, options)

  def encode(scene: Scene) -> records.EncodedImage:
    return records.encode_png(render.render(scene, *size))

  provenance = {
    "source": "shapes",
    "version": VERSION,
    "seed": options.seed,
    "split": options.split,
    "index": index,
    "atoms": example.atoms,
  }
  if task == "t2i":
    caption, target, references = example.prompt, example.scene, ()
  else:
    caption, target = example.instruction, example.target
    references = (encode(example.source),)
  return records.Record(
    id=f"shapes-{options.split}-{task}-{index:08d}",
    task=task,
    caption=caption,
    kind=example.kind,
    target=encode(target),
    references=references,
    provenance=provenance,
  )


def _chunk(options: Options, start: int) -> list[records.Record]:
  """Records start, start + 1, ... of the dataset: first t2i, then edits."""
  stop = min(start + _CHUNK, options.t2i + options.edits)
  return [
    _record("t2i", i, options)
    if i < options.t2i
    else _record("ti2i", i - options.t2i, options)
    for i in range(start, stop)
  ]


def _records(options: Options, workers: int) -> Iterator[records.Record]:
  starts = range(0, options.t2i + options.edits, _CHUNK)
  make = functools.partial(_chunk, options)
  useful = math.ceil(len(starts) * _CHUNK / _RECORDS_PER_WORKER)
  workers = min(workers or os.cpu_count() or 1, useful)
  if workers <= 1:
    yield from itertools.chain.from_iterable(map(make, starts))
    return
  # spawn, because forking a process that runs JAX threads can deadlock.
  pool = concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context("spawn")
  )
  try:
    yield from itertools.chain.from_iterable(pool.map(make, starts))
  except BrokenProcessPool as error:
    raise InputError(
      "A worker process died; guard the calling script with `if __name__ == "
      '"__main__":`, or use one worker.'
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _with_progress(
  items: Iterator[records.Record], total: int
) -> Iterator[records.Record]:
  """Passes items through; a line with the rate on stderr every two seconds."""
  start = last = time.monotonic()
  for done, item in enumerate(items, 1):
    yield item
    now = time.monotonic()
    if now - last >= _SECONDS_BETWEEN_LINES or done == total:
      last = now
      rate = done / max(now - start, 1e-9)
      print(
        f"shapes: {done:,}/{total:,} records, {rate:,.0f}/s",
        file=sys.stderr,
        flush=True,
      )


def _is_finished(out: str | os.PathLike, source: dict[str, Any]) -> bool:
  if not os.path.exists(os.path.join(out, "manifest.json")):
    return False
  found = records.read_manifest(out)["source"]
  if found == source:
    return True
  names = [k for k in source if found.get(k) != source[k]]
  raise InputError(
    f"{out} holds a dataset made with other options "
    f"({', '.join(names) or 'more options'} differ); delete it or choose "
    "another --out."
  )


def _require_sizes(sizes, weights):
  if not sizes:
    raise InputError("No sizes were given; give at least one, like 64x64.")
  for width, height in sizes:
    if min(width, height) < render.MIN_SIDE:
      raise InputError(
        f"Size {width}x{height} is too small; both sides must be at least "
        f"{render.MIN_SIDE} pixels."
      )
  if weights and len(weights) != len(sizes):
    raise InputError(
      f"{len(weights)} size weights do not match {len(sizes)} sizes; give one "
      "weight per size, or none."
    )
  if weights:
    _require_weights("size", weights)


def _require_kinds(
  what: str, mixture: dict[str, float], known: tuple[str, ...]
):
  unknown = [kind for kind in mixture if kind not in known]
  if unknown:
    raise InputError(
      f"Unknown {what} kinds {', '.join(unknown)}; use {', '.join(known)}."
    )
  _require_weights(f"{what} kind", mixture.values())


def _require_weights(what: str, weights):
  if min(weights, default=0) < 0 or not 0 < sum(weights) < math.inf:
    raise InputError(
      f"The {what} weights {list(weights)} are no mixture; give numbers of 0 "
      "or more that are not all 0."
    )
