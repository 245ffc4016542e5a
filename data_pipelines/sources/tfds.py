# SPDX-License-Identifier: Apache-2.0
"""Datasets that TensorFlow Datasets has prepared, read without TensorFlow.

Of every split the features are taken that `tables` knows by name. The files
must be ArrayRecord, which can be read by position: prepare the builder with
`file_format="array_record"`.
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.sources import tables
from data_pipelines.sources.items import (
  Entry,
  Limits,
  Part,
  Unusable,
  digest,
  printable,
  state,
)

_INFO = "dataset_info.json"


def is_builder(path: pathlib.Path) -> bool:
  """Whether a folder holds a prepared version of a builder."""
  return (path / _INFO).is_file() and (path / "features.json").is_file()


def label(path: pathlib.Path) -> str:
  """Name and version; the folder of a version is named by that alone."""
  return f"{path.parent.name}-{path.name}"


def plan(path: pathlib.Path, prefix: str, size: int) -> list[Part]:
  """Cuts every split into parts of `size` examples.

  Raises:
    InputError: the files are of another format, or no feature is an image.
  """
  try:
    info = json.loads((path / _INFO).read_text(encoding="utf-8"))
    splits = {
      split["name"]: sum(int(length) for length in split["shardLengths"])
      for split in info["splits"]
    }
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{path / _INFO} is unreadable ({error}); prepare the dataset again."
    ) from error
  if info.get("fileFormat") != "array_record":
    raise InputError(
      f"{path} is stored as {info.get('fileFormat')}; prepare it with "
      'file_format="array_record".'
    )
  _image_feature(path, _builder(path).info.features)
  files = [state(file) for file in sorted(path.glob("*array_record*"))]
  return [
    Part(
      "tfds", os.fspath(path), f"{prefix}/{name}", start,
      min(start + size, count), digest(start, size, files),
    )
    for name, count in splits.items()
    for start in range(0, count, size)
  ]  # fmt: skip


def read(part: Part, limits: Limits) -> Iterator[Entry]:
  """The examples of a part."""
  path = pathlib.Path(part.path)
  split = part.prefix.rpartition("/")[2]
  builder = _builder(path)
  image = _image_feature(path, builder.info.features)
  source = builder.as_data_source(split, decoders=_as_bytes(builder))
  name = builder.info.full_name
  for number in range(part.start, part.stop):
    where = f"{name} {split}:{number}"
    load = functools.partial(_load, source, number, image, where, limits)
    yield Entry(f"{part.prefix}:{number}", where, load)


def _load(source, number: int, image: str, where: str, limits: Limits):
  try:
    row = {name: _plain(value) for name, value in source[number].items()}
  except Exception as error:  # the library has no type for damage
    text = printable(str(error).splitlines()[0]) if str(error) else ""
    raise Unusable(f"damaged example ({text})") from error
  return tables.load_row(row, image, where, limits)


def _plain(value: Any) -> Any:
  """Images stay bytes; text, which comes as bytes too, is told by its use."""
  if isinstance(value, np.ndarray):
    return value.tolist()
  return value.item() if isinstance(value, np.generic) else value


def _builder(path: pathlib.Path):
  # Importing it takes seconds, and most inputs are something else.
  import tensorflow_datasets as tfds

  return tfds.builder_from_directory(path)


def _as_bytes(builder) -> dict[str, Any]:
  import tensorflow_datasets as tfds

  # SkipDecoding of the library knows nothing of lists of images.
  class Bytes(tfds.decode.Decoder):
    def decode_example(self, example):
      return example

    decode_example_np = decode_batch_example_np = decode_example

  return {
    name: Bytes()
    for name, feature in builder.info.features.items()
    if isinstance(getattr(feature, "feature", feature), tfds.features.Image)
  }


def _image_feature(path: pathlib.Path, features) -> str:
  import tensorflow_datasets as tfds

  for name in tables.IMAGES:
    if isinstance(dict(features.items()).get(name), tfds.features.Image):
      return name
  raise InputError(
    f"{path} has no image feature among {list(tables.IMAGES)} (its features "
    f"are {sorted(features)}); rename the feature that holds the images."
  )
