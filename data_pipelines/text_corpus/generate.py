# SPDX-License-Identifier: Apache-2.0
"""Writes the corpus as a dataset, or as a folder of images with captions."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.records import DatasetWriter, Record, encode_png
from data_pipelines.text_corpus import layout, typefaces

VERSION = 2
LANGUAGES = ("en", "zh")
SPLITS = ("seen", "held_out")


@dataclasses.dataclass(frozen=True)
class Options:
  """What to draw.

  Attributes:
    count: pages.
    sizes: (width, height) to draw from.
    languages: of `LANGUAGES`, in turn.
    kinds: of `layout.KINDS`, in turn.
    font_zh: path of a font; empty: what the system has.
    seed: changes every page.
    split: pages of the two splits are drawn independently.
    shards: files of a dataset.
  """

  count: int
  sizes: tuple[tuple[int, int], ...] = ((256, 256),)
  languages: tuple[str, ...] = ("en",)
  kinds: tuple[str, ...] = layout.KINDS
  font_zh: str = ""
  seed: int = 0
  split: str = "seen"
  shards: int = 1

  def __post_init__(self):
    """Raises InputError for anything that cannot be drawn."""
    for what, values, known in (
      ("languages", self.languages, LANGUAGES),
      ("kinds", self.kinds, layout.KINDS),
      ("split", (self.split,), SPLITS),
    ):
      if not values or set(values) - set(known):
        raise InputError(
          f"{what} {list(values)} must be some of {', '.join(known)}."
        )
    if self.count < 1 or not self.sizes:
      raise InputError("A corpus needs at least one page and one size.")
    if min(min(size) for size in self.sizes) < 64:
      raise InputError(
        f"Sizes {self.sizes} must be at least 64 px a side to hold text."
      )


def pages(options: Options) -> Iterator[tuple[str, str, np.ndarray, str]]:
  """`(id, kind, uint8 RGB, text)` of every page; each from its own stream.

  Raises:
    InputError: no font for a language.
  """
  fonts = {
    language: typefaces.fonts_of(
      language, options.font_zh if language == "zh" else ""
    )
    for language in options.languages
  }
  for i in range(options.count):
    rng = np.random.default_rng(
      [options.seed, SPLITS.index(options.split), 0x7E87, i]
    )
    kind = options.kinds[i % len(options.kinds)]
    # Kinds first, so that every language has every kind.
    language = options.languages[
      i // len(options.kinds) % len(options.languages)
    ]
    size = options.sizes[int(rng.integers(len(options.sizes)))]
    image, text = layout.draw(kind, language, size, fonts[language], rng)
    yield f"{options.split}-{i:06d}", f"{kind}_{language}", image, text


def write_dataset(out: str | os.PathLike, options: Options) -> None:
  """Writes a dataset folder (see `data_pipelines.records`).

  Raises:
    InputError: the folder exists, or no font for a language.
  """
  source = {
    "generator": "data_pipelines.text_corpus", "version": VERSION,
    **json.loads(json.dumps(dataclasses.asdict(options))),
  }  # fmt: skip
  with DatasetWriter(out, options.shards, source) as writer:
    for name, kind, image, text in pages(options):
      writer.add(Record(name, "t2i", text, kind, encode_png(image), (), {}))


def write_folder(out: str | os.PathLike, options: Options) -> None:
  """Writes PNG files and metadata.jsonl, the imagefolder convention.

  Raises:
    InputError: the folder exists, or no font for a language.
  """
  target = pathlib.Path(out)
  if os.path.lexists(target):
    raise InputError(f"Output {target} already exists; choose another.")
  temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
  try:
    temporary.mkdir(parents=True)
    with (temporary / "metadata.jsonl").open("w", encoding="utf-8") as file:
      for name, kind, image, text in pages(options):
        file_name = f"{name}.png"
        (temporary / file_name).write_bytes(encode_png(image).data)
        line: dict[str, Any] = {
          "file_name": file_name, "text": text, "kind": kind,
        }  # fmt: skip
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(temporary, target)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
