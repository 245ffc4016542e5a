# SPDX-License-Identifier: Apache-2.0
"""Turns a folder of images with captions into a dataset.

    python -m data_pipelines.imagefolder --input=photos --out=data/photos

Captions come from `metadata.jsonl` files (the imagefolder convention: one
JSON object per line with `file_name` and `text`, paths relative to that
file), or else from a `.txt` file beside each image. A line may name
`references`, a list of image files, which makes it an edit: references plus
text give the image. It may also name a `kind`, a label for statistics.

Every image is decoded once. What is damaged or incomplete is left out,
counted, and listed with its reason in OUT/quarantine.jsonl.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import Any

from absl import app, flags

from data_pipelines import images
from data_pipelines import reasons as categories
from data_pipelines.cli import clean_exit
from data_pipelines.errors import InputError
from data_pipelines.pairing import Item, Problem, pair
from data_pipelines.records import DatasetWriter, Record, read_manifest

# Records decoded ahead of the writer: bounds memory, keeps the input order.
_CHUNK = 64


def find_items(folder: pathlib.Path) -> tuple[list[Item], list[Problem]]:
  """Pairs images with captions; what has none is a problem.

  Args:
    folder: see `pairing.pair`.

  Returns:
    Items in a stable order, and what could not be paired.
  """
  items, problems = pair(folder)
  problems += [
    Problem(item.name, item.missing, item.where)
    for item in items
    if item.missing
  ]
  return [item for item in items if not item.missing], problems


def is_held_out(item: Item, share: float) -> bool:
  """Whether an item belongs to the held-out part.

  By a hash of the image's name: captions of one image stay together, and an
  image keeps its side when others are added.
  """
  name = item.name.encode("utf-8", "surrogateescape")
  digest = hashlib.sha256(name).digest()
  return int.from_bytes(digest[:8], "big") < share * 2**64


def load(item: Item) -> Record | Problem:
  """Reads and decodes the images of one item."""
  encoded = []
  for path in (item.target, *item.references):
    try:
      encoded.append(images.from_bytes(path.read_bytes()))
    except InputError as error:
      return Problem(item.id, str(error), f"{path.name} ({item.where})")
    except OSError as error:
      reason = f"unreadable file ({error.strerror})"
      return Problem(item.id, reason, f"{path.name} ({item.where})")
  return Record(
    id=item.id,
    task="ti2i" if item.references else "t2i",
    caption=item.caption,
    kind=item.kind,
    target=encoded[0],
    references=tuple(encoded[1:]),
    provenance={
      "where": item.where,
      "sha256": hashlib.sha256(encoded[0].data).hexdigest(),
    },
  )


def convert(
  input_dir: str | os.PathLike,
  out_dir: str | os.PathLike,
  shards: int = 1,
  held_out: float = 0.0,
  threads: int = 4,
) -> dict[str, Any]:
  """Writes a dataset from a folder of images with captions.

  Args:
    input_dir: the folder, searched recursively.
    out_dir: the dataset to create.
    shards: number of files.
    held_out: share of the images that goes to `{out_dir}-held_out` instead.
    threads: images decoded at a time.

  Returns:
    The manifest of `out_dir`. Its records and quarantined, plus those of the
    held-out dataset if any, are everything that was found.

  Raises:
    InputError: no such folder, nothing usable in it, or an output exists.
  """
  folder = pathlib.Path(os.path.normpath(input_dir))
  if not folder.is_dir():
    raise InputError(f"Input folder {folder} does not exist; check --input.")
  items, problems = find_items(folder)
  if not items:
    raise InputError(
      f"No captioned image in {folder} ({_tally(p.reason for p in problems)});"
      " add metadata.jsonl or a .txt file beside each image."
    )
  parts = [
    (_out_path(out_dir), [i for i in items if not is_held_out(i, held_out)])
  ]
  if held_out:
    parts.append(
      (held_out_path(out_dir), [i for i in items if is_held_out(i, held_out)])
    )
  if not all(part for _, part in parts):
    raise InputError(
      f"--held_out={held_out} of {len(items)} images leaves one side empty; "
      "choose another share between 0 and 1."
    )
  source = {"name": "imagefolder", "folder": folder.name, "held_out": held_out}
  progress = _Progress(len(items))
  with contextlib.ExitStack() as stack:  # both folders appear, or neither
    writers = [
      stack.enter_context(DatasetWriter(out, shards, source))
      for out, _ in parts
    ]
    for problem in problems:
      writers[0].quarantine(**dataclasses.asdict(problem))
    for writer, (out, part) in zip(writers, parts):
      _write(part, out, writer, threads, progress)
  return read_manifest(parts[0][0])


def held_out_path(out_dir: str | os.PathLike) -> pathlib.Path:
  """Where `convert` puts the held-out part."""
  out = _out_path(out_dir)
  return out.with_name(f"{out.name}-held_out")


def _out_path(out_dir: str | os.PathLike) -> pathlib.Path:
  return pathlib.Path(os.path.normpath(out_dir))


def _write(
  items: list[Item],
  out: pathlib.Path,
  writer: DatasetWriter,
  threads: int,
  progress: "_Progress",
) -> None:
  problems = []
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(items), _CHUNK):
      for result in pool.map(load, items[start : start + _CHUNK]):
        if isinstance(result, Record):
          writer.add(result)
        else:
          problems.append(result)
          writer.quarantine(**dataclasses.asdict(result))
        progress.step()
  if len(problems) == len(items):
    raise InputError(
      f"None of the {len(items)} images for {out} is usable "
      f"({_tally(p.reason for p in problems)}); repair the input."
    )


def _tally(reasons: Iterable[str]) -> str:
  """'12 empty caption, 3 Unreadable image', most frequent first."""
  counts = categories.tally(reasons).most_common()
  texts = [f"{count} {reason}" for reason, count in counts]
  return ", ".join(texts) or "no image and no caption found"


class _Progress:
  """A line with the rate on stderr, every two seconds."""

  def __init__(self, total: int):
    self._total = total
    self._done = 0
    self._start = self._printed = time.monotonic()

  def step(self) -> None:
    self._done += 1
    now = time.monotonic()
    if now - self._printed > 2 or self._done == self._total:
      self._printed = now
      rate = self._done / max(now - self._start, 1e-6)
      line = f"{self._done}/{self._total} images, {rate:.0f}/s"
      print(line, file=sys.stderr, flush=True)


def summarise(out_dir: str | os.PathLike) -> str:
  """What a dataset holds and what was left out of it, for a person."""
  manifest = read_manifest(out_dir)
  lines = [f"{out_dir}: {manifest['records']} records {manifest['by_task']}"]
  if manifest["quarantined"]:
    path = pathlib.Path(out_dir) / "quarantine.jsonl"
    rows = [json.loads(r) for r in path.read_text("utf-8").splitlines()]
    lines.append(f"  {len(rows)} left out, listed in {path}:")
    lines.append(f"  {_tally(row['reason'] for row in rows)}")
  return "\n".join(lines)


def _define_flags() -> None:
  flags.DEFINE_string("input", None, "Folder of images.", required=True)
  flags.DEFINE_string("out", None, "Dataset folder to create.", required=True)
  flags.DEFINE_integer("shards", 1, "Number of files.", lower_bound=1)
  flags.DEFINE_float(
    "held_out",
    0.0,
    "Share of the images to write to OUT-held_out instead, for evaluation.",
    lower_bound=0,
    upper_bound=0.99,
  )
  flags.DEFINE_integer("threads", 4, "Images decoded at a time.", lower_bound=1)


def main(argv: list[str]) -> None:
  """Converts, then prints what was kept and what was not."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  values = flags.FLAGS
  with clean_exit():
    convert(
      values.input, values.out, values.shards, values.held_out, values.threads
    )
  print(summarise(values.out))
  if values.held_out:
    print(summarise(held_out_path(values.out)))


if __name__ == "__main__":
  _define_flags()
  app.run(main)
