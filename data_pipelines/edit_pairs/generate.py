# SPDX-License-Identifier: Apache-2.0
"""Makes a dataset of edit pairs in several processes.

Pair i depends on the options, on the inputs and on i alone, never on the
process that makes it, so any number of processes writes the same bytes.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import tqdm
from PIL import Image

from data_pipelines.edit_pairs import (
  attribute,
  background,
  catalogue,
  compose,
  instructions,
  masks,
  restore,
  retext,
  structure,
  style,
)
from data_pipelines.edit_pairs.pair import Pair
from data_pipelines.edit_pairs.supply import Candidates, Rules, Supply
from data_pipelines.engine import pool
from data_pipelines.errors import InputError
from data_pipelines.images import EncodedImage
from data_pipelines.records import DatasetWriter, Record
from data_pipelines.sources import plan
from data_pipelines.sources.items import Unusable
from data_pipelines.synthesis.fonts import faces_of
from data_pipelines.synthesis.languages import language_of

# Raise when the pixels or the words of existing options change.
VERSION = 1
KINDS: dict[str, Callable[[Supply, np.random.Generator], Pair]] = {
  "restore": restore.draw,
  "style": style.draw,
  "attribute": attribute.draw,
  "background": background.draw,
  "text": retext.draw,
  "structure": structure.draw,
  "compose": compose.draw,
}
_SECONDS = 60.0  # wall time of one pair
# Inputs that a pair may try or need, of each sort.
_AHEAD = {"pictures": 4, "places": 5, "things": 6, "marked": 3}
# Pictures beyond what the pairs can use are not even opened.
_PER_PAIR = 4
_SMALLEST_SIDE = 128
_ATTEMPTS = 3  # at a pair, with other draws
_PNG = b"\x89PNG"


@dataclasses.dataclass(frozen=True)
class Options:
  """Everything that determines a dataset, beside its inputs.

  Attributes:
    count: pairs.
    kinds: of KINDS, in turn.
    languages: of instructions, in turn.
    seed: changes every pair.
    shards: files of the dataset.
    rules: see there.
  """

  count: int = 1000
  kinds: tuple[str, ...] = tuple(KINDS)
  languages: tuple[str, ...] = instructions.LANGUAGES
  seed: int = 0
  shards: int = 1
  rules: Rules = dataclasses.field(default_factory=lambda: Rules(((512, 512),)))

  def __post_init__(self):
    """Raises InputError for anything that cannot be made."""
    for what, values, known in (
      ("kinds", self.kinds, tuple(KINDS)),
      ("languages", self.languages, instructions.LANGUAGES),
    ):
      if not values or set(values) - set(known):
        raise InputError(
          f"--{what} {','.join(values)!r} must be some of {', '.join(known)}."
        )
    if self.count < 1 or self.seed < 0:
      raise InputError(
        f"--count {self.count} must be 1 or more, --seed {self.seed} 0 or more."
      )
    sizes = self.rules.sizes
    if not sizes or min(min(size) for size in sizes) < _SMALLEST_SIDE:
      raise InputError(
        f"--sizes {list(sizes)} must be at least one WIDTHxHEIGHT with sides "
        f"of {_SMALLEST_SIDE} pixels or more."
      )
    if not 0 <= self.rules.inverse <= 1:
      raise InputError(f"--inverse {self.rules.inverse} must be 0 to 1.")
    if "text" in self.kinds:
      for code in self.rules.text_languages or [""]:
        language = language_of(code)
        faces_of(language, self.rules.fonts)
        if language.direction == "ttb":
          raise InputError(
            f"--text_languages {code} is written in columns, and signs have "
            "rows; leave it out."
          )


def generate(
  out: str | os.PathLike,
  inputs: Sequence[str],
  options: Options,
  processes: int = 0,
) -> dict[str, Any]:
  """Writes a dataset folder (see `data_pipelines.records`).

  Args:
    out: the folder to create.
    inputs: see `catalogue.find`; none: everything is drawn by code.
    options: what to make.
    processes: 0: one per core.

  Returns:
    `{"records", "quarantined"}`.

  Raises:
    InputError: the folder exists, an input is unusable as a whole, or a kind
      lacks its inputs.
  """
  source = {
    "generator": "data_pipelines.edit_pairs", "version": VERSION,
    **json.loads(json.dumps(dataclasses.asdict(options))),
    "inputs": plan.describe(inputs),
  }  # fmt: skip
  writer = DatasetWriter(out, options.shards, source)
  found, problems = _usable(inputs, options)
  _require_inputs(found, options)
  workers = pool.Pool(processes or os.cpu_count() or 1)
  counts = {"records": 0, "quarantined": 0}
  try:
    with writer, tqdm.tqdm(total=options.count, unit="pair") as bar:
      for result in _with_known(problems, workers, found, options):
        record, noted = result
        for id, reason, where in noted:
          writer.quarantine(id, reason, where)
        counts["quarantined"] += len(noted)
        if record is not None:
          writer.add(record)
          counts["records"] += 1
        bar.update(counts["records"] - bar.n)
  finally:
    workers.close()
  return counts


def _with_known(problems, workers, found: Candidates, options: Options):
  """Records with what is to be noted, every input only once."""
  yield None, problems
  known = {id for id, _, _ in problems}
  tasks = ((i, _candidates(i, found, options), options)
    for i in range(options.count))  # fmt: skip
  for i, result in enumerate(workers.map(make, tasks, _SECONDS)):
    if isinstance(result, Unusable):
      result = None, [(_id(i, options), str(result), "")]
    record, noted = result
    yield record, [p for p in noted if p[0] not in known]
    known.update(id for id, _, _ in noted)


def _usable(inputs: Sequence[str], options: Options):
  """Sorts the inputs by what they can be used for; headers are read.

  Returns:
    The candidates for all pairs, and (id, reason, where) of what is no image.
  """
  listed = catalogue.find(inputs)
  most = _PER_PAIR * options.count
  if len(listed) > most:
    rng = np.random.default_rng([options.seed, 0xED17])
    chosen = np.sort(rng.permutation(len(listed))[:most])
    listed = [listed[i] for i in chosen]
  sorts: dict[str, list] = {name: [] for name in _AHEAD}
  problems = []
  for source in listed:
    try:
      loaded = catalogue.load(source, options.rules.limits)
    except Unusable as error:
      problems.append((source.id, str(error), source.path))
      continue
    sorts["pictures"].append(source)
    transparent = loaded.encoded.mode == "RGBA"
    if loaded.mask is not None:
      sorts["marked"].append(source)
    if transparent or loaded.mask is not None:
      sorts["things"].append(source)
    if not transparent:
      sorts["places"].append(source)
  if inputs and not sorts["pictures"]:
    reason = problems[0][1] if problems else "there is none"
    raise InputError(
      f"No image of the input can be used ({reason}); check --input."
    )
  return Candidates(**{k: tuple(v) for k, v in sorts.items()}), problems


def _require_inputs(found: Candidates, options: Options) -> None:
  if options.rules.embedded:
    return
  for kind in options.kinds:
    if not found.pictures:
      missing = "pictures"
    elif kind in ("attribute", "background", "compose") and not found.things:
      missing = "cut-outs (RGBA images, or images with a mask)"
    elif kind in ("attribute", "background", "compose") and not found.places:
      missing = "pictures without transparency for backgrounds"
    else:
      continue
    raise InputError(
      f"--kinds {kind} needs {missing} in --input; add some, leave the kind "
      "out, or allow drawn ones with --embedded."
    )


def _candidates(i: int, found: Candidates, options: Options) -> Candidates:
  """The inputs of pair i: each kind goes through all of them in turn."""
  turn = i // len(options.kinds)
  chosen = {}
  for name, ahead in _AHEAD.items():
    given = getattr(found, name)
    first = turn * (3 if name == "things" else 1)
    chosen[name] = tuple(
      given[(first + k) % len(given)] for k in range(min(ahead, len(given)))
    )
  return Candidates(**chosen)


def make(
  i: int, candidates: Candidates, options: Options
) -> tuple[Record | None, list[tuple[str, str, str]]]:
  """Pair i and the inputs that it could not use; runs in the pool."""
  kind = options.kinds[i % len(options.kinds)]
  problems: dict[str, tuple[str, str, str]] = {}
  for attempt in range(_ATTEMPTS):
    rng = np.random.default_rng([options.seed, i, attempt])
    supply = Supply(candidates, options.rules, rng)
    record, reason = None, ""
    try:
      pair = KINDS[kind](supply, rng)
      _check(pair)
      record = _record(i, kind, pair, supply, options, rng)
    except Unusable as error:
      reason = f"no pair ({error})"
    problems |= {problem[0]: problem for problem in supply.problems}
    if record is not None:
      return record, [*problems.values()]
  return None, [*problems.values(), (_id(i, options), reason, kind)]


def _check(pair: Pair) -> None:
  """Compares the bytes that will be stored with what the mask promises."""
  first = pair.references[0]
  differing_HW = masks.differing(first, pair.target)
  if not differing_HW.any():
    raise Unusable("the edit changed nothing")
  if pair.change_HW is not None and (differing_HW & ~pair.change_HW).any():
    raise RuntimeError(f"{pair.operation} changed pixels outside of its mask")


def _id(i: int, options: Options) -> str:
  return f"edit_pairs-{options.seed}-{i:08d}"


def _record(
  i: int, kind: str, pair: Pair, supply: Supply, options: Options, rng
) -> Record:
  turn = i // len(options.kinds)
  language = pair.language or options.languages[turn % len(options.languages)]
  if language not in options.languages:
    language = options.languages[0]
  caption = instructions.write(pair.operation, language, pair.slots, rng)
  if pair.change_HW is not None:
    mask = masks.encode(pair.change_HW)
  else:
    mask = {"scope": "redrawn" if pair.redrawn else "whole"}
  exact = pair.change_HW is not None
  return Record(
    id=_id(i, options),
    task="ti2i",
    caption=caption,
    kind=f"edit-{kind}",
    target=encode(pair.target, supply, exact),
    references=tuple(encode(x, supply, exact) for x in pair.references),
    provenance={
      "source": "edit_pairs",
      "version": VERSION,
      "operation": pair.operation,
      "parameters": pair.parameters,
      "slots": instructions.spelled(pair.slots, language),
      "language": language,
      "inputs": supply.used,
      "mask": mask,
    },
  )


def encode(image: Image.Image, supply: Supply, exact: bool) -> EncodedImage:
  """The bytes of an image, without loss.

  An input that was taken as it is keeps its bytes; where a mask makes a
  promise, only if they are PNG: a later stage would store JPEG again as JPEG.
  """
  kept = supply.bytes_of(image)
  if kept is not None and (not exact or kept.data.startswith(_PNG)):
    return kept
  # OpenCV at this level is three times as fast as Pillow, for 8 % more bytes.
  array = cv2.cvtColor(
    np.asarray(image),
    cv2.COLOR_RGBA2BGRA if image.mode == "RGBA" else cv2.COLOR_RGB2BGR,
  )
  data = cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
  return EncodedImage(data.tobytes(), *image.size, image.mode)


def records(inputs: Sequence[str], options: Options) -> Iterator[Record]:
  """The records of `generate`, made in this process."""
  found, _ = _usable(inputs, options)
  for i in range(options.count):
    record, _ = make(i, _candidates(i, found, options), options)
    if record is not None:
      yield record
