# SPDX-License-Identifier: Apache-2.0
"""Writes a dataset of synthetic text; the same whatever the processes."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from data_pipelines.engine import pool
from data_pipelines.errors import InputError
from data_pipelines.images import SUFFIXES, EncodedImage
from data_pipelines.records import DatasetWriter, Record
from data_pipelines.sources.items import Unusable
from data_pipelines.synthesis.fonts import Face, faces_of
from data_pipelines.synthesis.languages import LANGUAGES, language_of
from data_pipelines.synthesis.sample import Rejected, Sample
from data_pipelines.synthesis.texts import read_texts

VERSION = 1
# Modules with a `draw`; those that are not asked for are not imported.
STRATEGIES = {"pure": "pure", "composed": "composed", "template": "templates"}
_WITH_PHOTOS = ("pure", "composed")
_SMALLEST, _LARGEST = 128, 4096
_TRIES = 10
_CHUNK = 8
_SECONDS = 600.0  # of a chunk; nothing takes that long
_STREAM = 0x7E8C


@dataclasses.dataclass(frozen=True)
class Options:
  """What to draw.

  Attributes:
    count: images.
    strategies: of `STRATEGIES`, in turn.
    languages: of `languages.LANGUAGES`, in turn.
    sizes: (width, height) to draw from.
    texts: file of the user's texts (see `texts`); empty: random words.
    fonts: folder of fonts to use; empty: the system's.
    backgrounds: folder of photos to draw on; empty: none.
    seed: changes every image.
    shards: files of the dataset.
    encoding: 'png' (lossless) or 'jpeg' (quality 95, 4:4:4).
  """

  count: int
  strategies: tuple[str, ...] = tuple(STRATEGIES)
  languages: tuple[str, ...] = tuple(LANGUAGES)
  sizes: tuple[tuple[int, int], ...] = ((512, 512), (768, 512))
  texts: str = ""
  fonts: str = ""
  backgrounds: str = ""
  seed: int = 0
  shards: int = 1
  encoding: str = "png"

  def __post_init__(self):
    """Raises InputError for anything that cannot be drawn."""
    for what, values, known in (
      ("strategies", self.strategies, STRATEGIES),
      ("languages", self.languages, LANGUAGES),
      ("format", (self.encoding,), ("png", "jpeg")),
    ):
      if not values or set(values) - set(known):
        raise InputError(
          f"{what} {list(values)} must be some of {', '.join(known)}."
        )
    if not pairs_of(self):
      raise InputError(
        "Templates have no vertical text; add a strategy or a language."
      )
    if self.count < 1 or not self.sizes or self.seed < 0:
      raise InputError(
        "Synthesis needs at least one image, one size and a seed of 0 or more."
      )
    for width, height in self.sizes:
      if not _SMALLEST <= min(width, height) <= max(width, height) <= _LARGEST:
        raise InputError(
          f"Size {width}x{height} must have sides of {_SMALLEST} to {_LARGEST} "
          "px to hold text."
        )


@dataclasses.dataclass(frozen=True)
class Job:
  """Everything that a process needs to draw any of the images.

  Attributes:
    options: see `Options`.
    faces: by language.
    texts: of the user, by language; empty: random words.
    photos: paths.
  """

  options: Options
  faces: dict[str, tuple[Face, ...]]
  texts: dict[str, tuple[str, ...]]
  photos: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Made:
  """One image or none, and why others were not drawn in its place."""

  record: Record | None
  name: str
  where: str
  rejected: tuple[str, ...]


def generate(
  out: str | os.PathLike, options: Options, processes: int = 0
) -> dict[str, int]:
  """Writes a dataset folder (see `data_pipelines.records`).

  Args:
    out: the folder to create.
    options: what to draw.
    processes: 0 for one per CPU. More than one needs a caller whose main
      module may be imported (`if __name__ == "__main__":`).

  Returns:
    How many samples were rejected, by reason. Another one is drawn in the
    place of each; what is rejected ten times over is quarantined.

  Raises:
    InputError: the folder exists, or fonts, texts or photos are missing.
  """
  job = prepare(options)
  source = source_of(job)
  rejected: collections.Counter[str] = collections.Counter()
  with (
    DatasetWriter(out, options.shards, source) as writer,
    # Ends the processes here and now, whatever stops this one.
    contextlib.closing(_made(job, processes)) as images,
  ):
    progress = tqdm.tqdm(
      images, "synthesis", options.count, unit="image", file=sys.stderr,
      mininterval=1,
    )  # fmt: skip
    for made in progress:
      rejected.update(made.rejected)
      if made.record is None:
        writer.quarantine(made.name, made.rejected[-1], made.where)
      else:
        writer.add(made.record)
    # The writer keeps the dictionary, and writes it when the block ends.
    source["rejected"] = dict(sorted(rejected.items()))
  return dict(rejected)


def prepare(options: Options) -> Job:
  """Looks for fonts, texts and photos.

  Raises:
    InputError: some are missing or unreadable.
  """
  faces = {
    code: faces_of(language_of(code), options.fonts)
    for code in options.languages
  }
  texts = read_texts(options.texts, options.languages) if options.texts else {}
  photos: tuple[str, ...] = ()
  if options.backgrounds:
    folder = pathlib.Path(options.backgrounds)
    photos = tuple(
      sorted(
        str(path)
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
      )
    )
    if not photos:
      raise InputError(
        f"Folder {folder} holds no photo ({', '.join(SUFFIXES)}); check "
        "--backgrounds."
      )
  return Job(options, faces, texts, photos)


def source_of(job: Job) -> dict[str, Any]:
  """The manifest's `source`: what determines every image; plain JSON."""
  faces = {face for faces in job.faces.values() for face in faces}
  fields = dataclasses.asdict(job.options)
  if job.options.texts:
    with open(job.options.texts, "rb") as file:
      fields["texts_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
  # By name and contents: where they are installed changes nothing.
  fields["font_files"] = {
    face.file: face.sha256 for face in sorted(faces, key=lambda f: f.file)
  }
  fields["photos"] = len(job.photos)
  source = {"generator": "data_pipelines.synthesis", "version": VERSION}
  return json.loads(json.dumps({**source, **fields}))


def pairs_of(options: Options) -> list[tuple[str, str]]:
  """(strategy, language) in turn; typst sets no columns."""
  return [
    (strategy, code)
    for code in options.languages
    for strategy in options.strategies
    if strategy != "template" or LANGUAGES[code].direction != "ttb"
  ]


def make(job: Job, index: int) -> _Made:
  """Draws image number `index`; each from its own stream of numbers."""
  options = job.options
  pairs = pairs_of(options)
  strategy, code = pairs[index % len(pairs)]
  name = f"synthesis-{options.seed}-{index:08d}"
  reasons: list[str] = []
  for attempt in range(_TRIES):
    rng = np.random.default_rng([options.seed, _STREAM, index, attempt])
    size = options.sizes[int(rng.integers(len(options.sizes)))]
    sample = draw(strategy, code, size, job, rng)
    if isinstance(sample, Rejected):
      reasons.append(sample.reason)
      continue
    record = _record(name, index, strategy, sample, options)
    return _Made(record, name, "", tuple(reasons))
  return _Made(None, name, f"{strategy} {code}", tuple(reasons))


def draw(
  strategy: str, code: str, size: tuple[int, int], job: Job,
  rng: np.random.Generator,
) -> Sample | Rejected:  # fmt: skip
  """One sample of a strategy and a language."""
  module = importlib.import_module(
    f"data_pipelines.synthesis.{STRATEGIES[strategy]}"
  )
  given = job.texts.get(code, ())
  photos = {"photos": job.photos} if strategy in _WITH_PHOTOS else {}
  return module.draw(
    language_of(code), job.faces[code], size, rng, given, **photos
  )


def _record(name, index, strategy, sample: Sample, options) -> Record:
  provenance = {
    "generator": "data_pipelines.synthesis",
    "version": VERSION,
    "seed": options.seed,
    "index": index,
    "strategy": strategy,
    "language": sample.layout["language"],
    "text": sample.text,
    "layout": sample.layout,
  }
  target = _encode(sample.image, options.encoding)
  return Record(
    name, "t2i", sample.caption, sample.kind, target, (), provenance
  )


def _encode(image, encoding: str) -> EncodedImage:
  """PNG packed fast: a tenth larger than Pillow's default, in a third of it."""
  buffer = io.BytesIO()
  if encoding == "jpeg" and image.mode == "RGB":
    # Chroma at full resolution: coloured text would fringe.
    image.save(buffer, "JPEG", quality=95, subsampling=0)
  else:
    image.save(buffer, "PNG", compress_level=1)
  return EncodedImage(buffer.getvalue(), *image.size, image.mode)


def _chunk(job: Job, start: int) -> list[_Made]:
  stop = min(start + _CHUNK, job.options.count)
  return [make(job, i) for i in range(start, stop)]


def _made(job: Job, processes: int) -> Iterator[_Made]:
  starts = range(0, job.options.count, _CHUNK)
  processes = min(processes or os.cpu_count() or 1, len(starts))
  if processes <= 1:
    chunks = map(functools.partial(_chunk, job), starts)
    yield from itertools.chain.from_iterable(chunks)
    return
  workers = pool.Pool(processes)
  try:
    tasks = ((job, start) for start in starts)
    for chunk in workers.map(_chunk, tasks, _SECONDS):
      if isinstance(chunk, Unusable):
        raise InputError(
          f"Drawing failed ({chunk}); if memory ran out, use fewer --processes."
        )
      yield from chunk
  finally:
    workers.close()
