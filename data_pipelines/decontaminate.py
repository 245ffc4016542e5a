# SPDX-License-Identifier: Apache-2.0
"""Copies a dataset without the records that match evaluation sets.

    python -m data_pipelines.decontaminate --data=data/mine --out=data/clean \\
      --prompts=suite.txt,bench.jsonl --images=bench/references

Prompts come one per line from text files, or from the fields `prompt`,
`text`, `caption` or `instruction` of JSON lines. A caption matches if it
equals a prompt but for case and punctuation, or shares enough runs of words
with it; an image if its target looks like an evaluation image. What was
removed is listed in OUT/quarantine.jsonl.

A stage of `data_pipelines.run` does the same with the filter `decontaminate`.
"""

import collections
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from absl import app, flags

from data_pipelines import images, records
from data_pipelines.cli import clean_exit
from data_pipelines.errors import InputError
from data_pipelines.filters import decontaminate, metrics, pixels

_COLUMNS = ("caption", "phash", "dhash", "thumb")
_SCHEMA = pa.schema([(name, metrics.METRICS[name]) for name in _COLUMNS])
# Records held at a time.
_CHUNK = 512


def clean(
  data: str | os.PathLike,
  out: str | os.PathLike,
  prompts: Sequence[str | os.PathLike],
  image_folders: Sequence[str | os.PathLike],
  options: Mapping[str, Any],
) -> dict[str, int]:
  """Writes the records of a dataset that match no evaluation set.

  Args:
    data: the dataset.
    out: the dataset to create, with as many shards.
    prompts: see `filters.decontaminate.load`.
    image_folders: likewise.
    options: `ngram`, `min_overlap`, `max_phash` and `max_colour`, see
      `filters.decontaminate.judge`.

  Returns:
    Records 'kept', and removed for an 'evaluation prompt' or an 'evaluation
    image'.

  Raises:
    InputError: an input is missing or damaged, `out` exists, or no record is
      left.
  """
  block = decontaminate.load(prompts, image_folders, options["ngram"])
  dataset = records.open_dataset(data)
  source = {
    "name": "decontaminate", "data": pathlib.Path(data).name,
    "prompts": len(block.prompts), "images": len(block.names_M), **options,
  }  # fmt: skip
  shards = len(dataset.manifest["shards"])
  counts: collections.Counter = collections.Counter()
  with records.DatasetWriter(out, shards, source) as writer:
    for chunk in _chunks(dataset):
      table = pa.Table.from_pylist([_row(r) for r in chunk], _SCHEMA)
      every = np.ones(len(chunk), bool)
      verdict = decontaminate.judge_with(table, every, block, options)
      for i, record in enumerate(chunk):
        if i in verdict.detail:
          reason = verdict.detail[i]
          writer.quarantine(record.id, reason, str(data))
          counts[" ".join(reason.split()[:2])] += 1
        else:
          writer.add(record)
          counts["kept"] += 1
  dataset.close()
  return dict(counts)


def _chunks(dataset: records.Dataset) -> Iterator[list[records.Record]]:
  for start in range(0, len(dataset), _CHUNK):
    stop = min(start + _CHUNK, len(dataset))
    yield [dataset[i] for i in range(start, stop)]


def _row(record: records.Record) -> dict[str, Any]:
  try:
    rgb = pixels.on_white(images.decode_image(record.target))
  except InputError as error:
    raise InputError(
      f"Record {record.id!r} has no usable target: {error}"
    ) from error
  return {
    "caption": record.caption,
    **pixels.hash_metrics(rgb, rgb.convert("L")),
  }


def _define_flags() -> None:
  flags.DEFINE_string("data", None, "Dataset to clean.", required=True)
  flags.DEFINE_string("out", None, "Dataset to create.", required=True)
  flags.DEFINE_list("prompts", [], "Files of evaluation prompts.")
  flags.DEFINE_list("images", [], "Folders of evaluation images.")
  # The defaults are ours.
  flags.DEFINE_integer("ngram", 8, "Words in a row.", lower_bound=1)
  flags.DEFINE_float(
    "min_overlap", 0.5, "Share of a prompt's runs of words that is too much.",
    lower_bound=0.01, upper_bound=1.0,
  )  # fmt: skip
  flags.DEFINE_integer(
    "max_phash", 8, "Bits of 64 that may differ in images that match.",
    lower_bound=0, upper_bound=31,
  )  # fmt: skip
  flags.DEFINE_float(
    "max_colour", 10.0, "Mean difference of colours, of 255, that matches."
  )


def main(argv: list[str]) -> None:
  """Cleans a dataset and says what was removed."""
  del argv
  values = flags.FLAGS
  names = ("ngram", "min_overlap", "max_phash", "max_colour")
  with clean_exit():
    counts = clean(
      values.data,
      values.out,
      values.prompts,
      values.images,
      {name: getattr(values, name) for name in names},
    )
    kept = counts.pop("kept")
    lost = ", ".join(f"{n} like an {what}" for what, n in counts.items())
    print(f"{values.out}: {kept} records kept; removed: {lost or 'none'}")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
