# SPDX-License-Identifier: Apache-2.0
"""How many tokens the captions of a dataset have, counted once and kept.

Only a tokenizer knows the length of a caption, and tokenizers live outside of
this package; a `TokenCounter` brings one. Counts are stored in the dataset's
folder under the hash of the counter's name and of the records:

    caption_tokens-0123456789ab.npy     int32 [N], N records
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.features.codec import REMEDY
from data_pipelines.features.dataset import FeatureDataset
from data_pipelines.records import Dataset

_CHUNK = 256  # records a thread takes at a time
_REPORT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class TokenCounter:
  """A tokenizer, as far as sorting by length needs one.

  Attributes:
    count: `(caption, number of references) -> tokens`; called in threads.
    name: of tokenizer and prompt template; equal names count equally.
  """

  count: Callable[[str, int], int]
  name: str


def padded_lengths(counts: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
  """The first of the rising `lengths` that holds each count, else the last."""
  which = np.searchsorted(lengths, counts)
  return np.asarray(lengths)[np.minimum(which, len(lengths) - 1)]


def token_counts(
  dataset: Dataset | FeatureDataset, counter: TokenCounter, threads: int
) -> np.ndarray:
  """Tokens of every caption, from the folder or counted and stored there.

  Args:
    dataset: with captions; a feature cache must have been made with counts.
    counter: counts one caption.
    threads: that read; 0: this one.

  Returns:
    int32 [N]; 0 for records that cannot be read.

  Raises:
    InputError: a feature cache has no such counts.
  """
  counts = stored_counts(dataset, counter)
  if counts is not None:
    return counts
  if isinstance(dataset, FeatureDataset):
    # A row tells no caption where its record's image is damaged, so counts
    # made from rows could differ from those of the dataset.
    raise InputError(
      f"Feature cache {dataset.path} does not know the lengths of its captions "
      f"for this tokenizer; {REMEDY}"
    )
  counts = count_captions(dataset, counter, threads)
  try:
    store_counts(dataset.path, dataset.manifest, counter, counts)
  except OSError as error:
    print(
      f"Cannot store caption lengths in {dataset.path} ({error.strerror}); "
      "they are counted at every start.",
      file=sys.stderr,
    )
  return counts


def stored_counts(
  dataset: Dataset | FeatureDataset, counter: TokenCounter
) -> np.ndarray | None:
  """`token_counts` from the folder; None where they are absent or cut."""
  try:
    counts = np.load(dataset.path / file_name(dataset.manifest, counter))
  except (OSError, ValueError, EOFError):
    return None
  whole = counts.shape == (len(dataset),) and counts.dtype == np.int32
  return counts if whole else None


def count_captions(
  dataset: Dataset, counter: TokenCounter, threads: int
) -> np.ndarray:
  """`token_counts`, always counted; a line on stderr every few seconds."""
  total, done, shown = len(dataset), 0, time.monotonic()
  counts = np.zeros(total, np.int32)

  def count(first: int) -> list[int]:
    numbers = range(first, min(first + _CHUNK, total))
    return [_count_one(dataset, counter, i) for i in numbers]

  with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
    mapped = (pool.map if threads else map)(count, range(0, total, _CHUNK))
    for chunk in mapped:
      counts[done : done + len(chunk)] = chunk
      done += len(chunk)
      if time.monotonic() - shown > _REPORT_SECONDS:
        shown = time.monotonic()
        print(
          f"{dataset.path}: measured {done:,} of {total:,} captions",
          file=sys.stderr,
        )
  return counts


def _count_one(dataset: Dataset, counter: TokenCounter, i: int) -> int:
  try:
    record = dataset[i]
  except InputError:
    return 0  # the loader replaces it when it comes to it
  return counter.count(record.caption, len(record.references))


def file_name(manifest: dict[str, Any], counter: TokenCounter) -> str:
  """Where counts lie within a folder.

  Args:
    manifest: of the dataset; of a feature cache that of its source.
    counter: what counted.
  """
  shards = [(s["records"], s["sha256"]) for s in manifest["shards"]]
  text = json.dumps([counter.name, shards])
  return f"caption_tokens-{hashlib.sha256(text.encode()).hexdigest()[:12]}.npy"


def store_counts(
  folder: str | os.PathLike, manifest: dict[str, Any], counter: TokenCounter,
  counts: np.ndarray,
) -> None:  # fmt: skip
  """Writes counts where `token_counts` looks for them, in one rename.

  Raises:
    OSError: the folder cannot be written to.
  """
  path = pathlib.Path(folder) / file_name(manifest, counter)
  # Several hosts may write to one folder at once.
  temporary = path.with_name(
    f"{path.name}.tmp-{os.uname().nodename}-{os.getpid()}"
  )
  try:
    with temporary.open("wb") as file:
      np.save(file, counts)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
