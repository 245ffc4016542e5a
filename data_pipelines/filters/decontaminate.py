# SPDX-License-Identifier: Apache-2.0
"""Finds records that match prompts or images of evaluation sets.

Shapes: N rows, M evaluation images.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines import images
from data_pipelines.errors import InputError
from data_pipelines.filters import dedup, duplicates, pixels, rules, text

OPTIONS = {
  "prompts",
  "images",
  "ngram",
  "min_overlap",
  "max_phash",
  "max_colour",
}  # fmt: skip
OPTIONAL = {"prompts", "images"}
_PROMPT_KEYS = ("prompt", "text", "caption", "instruction")
# Rows compared with all evaluation images at a time.
_BLOCK = 1024
_WORD = re.compile(rf"[{text.UNSPACED}]|[^\W_{text.UNSPACED}]+")


@dataclasses.dataclass(frozen=True)
class Blocklist:
  """What must not be trained on.

  Attributes:
    prompts: as they were written.
    exact: normalised words -> index into `prompts`.
    ngrams: n words in a row -> indices of the prompts that hold them.
    sizes: different n-grams of each prompt.
    ngram: n.
    names_M: files of the images.
    phash_M: uint64.
    thumb_MC: uint8, see pixels.hash_metrics.
  """

  prompts: tuple[str, ...]
  exact: Mapping[tuple[str, ...], int]
  ngrams: Mapping[tuple[str, ...], tuple[int, ...]]
  sizes: tuple[int, ...]
  ngram: int
  names_M: tuple[str, ...]
  phash_M: np.ndarray
  thumb_MC: np.ndarray


def words(caption: str) -> tuple[str, ...]:
  """Compatibility-normalised words in one case, punctuation left out.

  Characters of scripts without spaces are words of their own.
  """
  folded = unicodedata.normalize("NFKC", caption).casefold()
  return tuple(_WORD.findall(folded))


def load(
  prompts: Sequence[str | os.PathLike],
  image_folders: Sequence[str | os.PathLike],
  ngram: int,
) -> Blocklist:
  """Reads evaluation sets.

  Args:
    prompts: text files, one prompt per line; or .jsonl files, objects with
      `prompt`, `text`, `caption` or `instruction`.
    image_folders: searched recursively.
    ngram: words in a row that count as copied.

  Raises:
    InputError: a file is missing or unusable, or there is nothing in them.
  """
  lines = [p for path in prompts for p in _read_prompts(pathlib.Path(path))]
  hashes = [
    h for folder in image_folders for h in _read_images(pathlib.Path(folder))
  ]
  if not lines and not hashes:
    raise InputError(
      "Decontamination has neither prompts nor images to compare with; give "
      "files of prompts or folders of images."
    )
  exact, sizes = {}, []
  ngrams = collections.defaultdict(list)
  for number, line in enumerate(lines):
    exact.setdefault(words(line), number)
    grams = _ngrams(words(line), ngram)
    sizes.append(len(grams))
    for gram in grams:
      ngrams[gram].append(number)
  return Blocklist(
    prompts=tuple(lines),
    exact=exact,
    ngrams={gram: tuple(found) for gram, found in ngrams.items()},
    sizes=tuple(sizes),
    ngram=ngram,
    names_M=tuple(name for name, _ in hashes),
    phash_M=np.array([h["phash"] for _, h in hashes], np.uint64),
    thumb_MC=np.array(
      [np.frombuffer(h["thumb"], np.uint8) for _, h in hashes], np.uint8
    ),
  )


def match_text(caption: str, block: Blocklist) -> tuple[float, str]:
  """Largest share of a prompt's n-grams in a caption, and that prompt.

  A caption equal to a prompt after normalisation has 1. Prompts shorter than
  n words match only so: three common words prove nothing.
  """
  found = words(caption)
  if found in block.exact:
    return 1.0, block.prompts[block.exact[found]]
  counts: collections.Counter = collections.Counter()
  for gram in _ngrams(found, block.ngram):
    counts.update(block.ngrams.get(gram, ()))
  shares = {number: n / block.sizes[number] for number, n in counts.items()}
  if not shares:
    return 0.0, ""
  best = max(shares, key=lambda number: (shares[number], -number))
  return shares[best], block.prompts[best]


def match_images(
  phash_N: np.ndarray, thumb_NC: np.ndarray, block: Blocklist, max_colour: float
) -> tuple[np.ndarray, np.ndarray]:
  """Nearest evaluation image of similar colours for every row.

  Returns:
    [N] Hamming distance of the perceptual hashes, 65 if none has similar
    colours; and [N] its index.
  """
  distance_N = np.full(len(phash_N), 65, np.int64)
  nearest_N = np.zeros(len(phash_N), np.int64)
  if not len(block.phash_M):
    return distance_N, nearest_N
  even_NC = dedup.even_colours(thumb_NC)
  even_MC = dedup.even_colours(block.thumb_MC)
  for start in range(0, len(phash_N), _BLOCK):
    part = slice(start, start + _BLOCK)
    bits_NM = np.bitwise_count(phash_N[part, None] ^ block.phash_M).astype(int)
    # Colours are compared only where the hashes are alike: [N, M, C] is big.
    i, j = np.nonzero(bits_NM < 32)
    colour = np.abs(even_NC[part][i] - even_MC[j]).mean(axis=1)
    far_NM = np.ones(bits_NM.shape, bool)
    far_NM[i, j] = colour > max_colour
    bits_NM[far_NM] = 65
    nearest_N[part] = bits_NM.argmin(axis=1)
    distance_N[part] = bits_NM.min(axis=1)
  return distance_N, nearest_N


def judge(
  table: pa.Table, alive_N: np.ndarray, options: Mapping[str, Any]
) -> rules.Verdict:
  """Drops rows that match an evaluation set.

  Args:
    table: N rows with `caption`, `phash`, `dhash` and `thumb`.
    alive_N: the rows to judge.
    options: `prompts`, `images` and `ngram`, see `load`; `min_overlap`, share
      of a prompt's n-grams; `max_phash`, bits; `max_colour`, levels.

  Raises:
    InputError: see `load`.
  """
  block = load(
    options.get("prompts") or (), options.get("images") or (), options["ngram"]
  )
  return judge_with(table, alive_N, block, options)


def judge_with(
  table: pa.Table,
  alive_N: np.ndarray,
  block: Blocklist,
  options: Mapping[str, Any],
) -> rules.Verdict:
  """As `judge`, with evaluation sets that have been read."""
  rows = np.flatnonzero(alive_N)
  drop_N, value_N, threshold_N = rules.empty(table.num_rows)
  detail = {}
  captions = table["caption"].take(rows).to_pylist()
  for i, caption in zip(rows.tolist(), captions):
    share, prompt = match_text(caption or "", block)
    if share >= options["min_overlap"]:
      drop_N[i], value_N[i] = True, share
      threshold_N[i] = options["min_overlap"]
      detail[i] = f"evaluation prompt {prompt[:60]!r}"
  rows = rows[rules.to_numpy(pc.is_valid(table["phash"].take(rows)))]
  phash_N, _, thumb_NC = duplicates.fingerprints(table.take(rows))
  distance_N, nearest_N = match_images(
    phash_N, thumb_NC, block, options["max_colour"]
  )
  for k in np.flatnonzero(distance_N <= options["max_phash"]).tolist():
    i = int(rows[k])
    if not drop_N[i]:
      drop_N[i], value_N[i] = True, distance_N[k]
      threshold_N[i] = options["max_phash"]
      detail[i] = f"evaluation image {block.names_M[nearest_N[k]]}"
  return rules.Verdict(drop_N, value_N, threshold_N, detail)


def _ngrams(sequence: tuple[str, ...], n: int) -> set[tuple[str, ...]]:
  return {sequence[i : i + n] for i in range(len(sequence) - n + 1)}


def _read_prompts(path: pathlib.Path) -> list[str]:
  try:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f"Evaluation prompts {path} cannot be read ({error}); give a UTF-8 file."
    ) from error
  if path.suffix != ".jsonl":
    found = lines
  else:
    found = [_prompt_of(line, path, n) for n, line in enumerate(lines, 1)]
  return [line.strip() for line in found if words(line)]


def _prompt_of(line: str, path: pathlib.Path, number: int) -> str:
  if not line.strip():
    return ""
  try:
    fields = json.loads(line)
    return str(next(fields[key] for key in _PROMPT_KEYS if key in fields))
  except (ValueError, TypeError, StopIteration) as error:
    raise InputError(
      f"Line {number} of {path} is no object with one of {_PROMPT_KEYS}; "
      "correct or remove it."
    ) from error


def _read_images(folder: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  if not folder.is_dir():
    raise InputError(
      f"Folder of evaluation images {folder} does not exist; check the path."
    )
  found = []
  for path in sorted(folder.rglob("*")):
    if path.suffix.lower() in images.SUFFIXES and path.is_file():
      try:
        image = images.decode(path.read_bytes())
      except InputError as error:
        raise InputError(f"Evaluation image {path}: {error}") from error
      rgb = pixels.on_white(image)
      hashes = pixels.hash_metrics(rgb, rgb.convert("L"))
      found.append((path.relative_to(folder).as_posix(), hashes))
  return found
