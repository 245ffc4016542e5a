# SPDX-License-Identifier: Apache-2.0
"""Writes a dataset as a prepared builder of TensorFlow Datasets.

    python -m data_pipelines.export_tfds --input=data/stage1 --out=tfds/stage1

    builder = tfds.builder_from_directory("tfds/stage1")
    source = builder.as_data_source("train")     # random access, for Grain

--input is a stage, or a dataset folder such as its `data`. The one split is
called 'train'; its examples stay in order and have `id`, `task`, `kind`,
`caption`, `image`, `references` (a list) and `provenance` (JSON). Neither
writing nor reading this way needs TensorFlow. Images keep their bytes, and
their channels where they are read as above: 4 for RGBA, else 3.
"""

import base64
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image
from tqdm import tqdm

from data_pipelines import codec, records
from data_pipelines.cli import clean_exit
from data_pipelines.errors import InputError
from data_pipelines.images import EncodedImage, decode_image, encode_png
from data_pipelines.sources.datasets import is_stage

SPLIT = "train"
_VERSION = "1.0.0"
_BATCH = 64  # examples in memory; the library writes its metadata after each
_ORIENTATION = 0x0112


def export(
  path: pathlib.Path, out: pathlib.Path, shard_records: int = 1000
) -> int:
  """Writes the builder; complete or absent.

  Args:
    path: a stage or a dataset folder.
    out: folder to create; its last name becomes that of the dataset.
    shard_records: examples of a file.

  Returns:
    The number of examples.

  Raises:
    InputError: there is no dataset, `out` exists or cannot be written.
  """
  if os.path.lexists(out):
    raise InputError(f"Output {out} already exists; choose another.")
  name = out.name.replace("-", "_").replace(".", "_")
  if not name.isidentifier():
    raise InputError(
      f"Output {out} gives the dataset its name; end it in a word of letters, "
      "digits and underscores."
    )
  data = records.open_dataset(path / "data" if is_stage(path) else path)
  temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
  shutil.rmtree(temporary, ignore_errors=True)  # of a dead process
  try:
    temporary.mkdir(parents=True)
    _write(data, name.lower(), temporary, shard_records)
    os.rename(temporary, out)
  except (OSError, RuntimeError) as error:  # ArrayRecord: RuntimeError
    raise InputError(
      f"Writing {out} failed ({error}); check the free space."
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
    data.close()
  return len(data)


def _write(
  data: records.Dataset, name: str, folder: pathlib.Path, size: int
) -> None:
  # Importing it takes seconds, which bad input should not cost.
  import tensorflow_datasets as tfds

  text, image = tfds.features.Text, tfds.features.Image
  # With TensorFlow this says how many channels every image is read with.
  channels = 4 if any(_is_transparent(record) for record in _all(data)) else 3
  pixels = image(shape=(None, None, channels))
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=name, version=tfds.core.Version(_VERSION), data_dir=os.fspath(folder),
    module_name="",
  )  # fmt: skip
  info = tfds.core.DatasetInfo(
    builder=identity,
    description="Written by data_pipelines.export_tfds.",
    features=tfds.features.FeaturesDict({
      "id": text(), "task": text(), "kind": text(), "caption": text(),
      "image": pixels, "references": tfds.features.Sequence(pixels),
      "provenance": text(),
    }),
    disable_shuffling=True,
  )  # fmt: skip
  writer = tfds.core.SequentialWriter(info, size, file_format="array_record")
  writer.initialize_splits([SPLIT])
  batch = []
  for record in tqdm(_all(data), total=len(data), unit=" records"):
    batch.append(example(record))
    if len(batch) == _BATCH:
      writer.add_examples({SPLIT: batch})
      batch = []
  writer.add_examples({SPLIT: batch})
  writer.close_all()


def _all(data: records.Dataset) -> Iterator[codec.Record]:
  return (data[i] for i in range(len(data)))


def _is_transparent(record: codec.Record) -> bool:
  return any(i.mode == "RGBA" for i in (record.target, *record.references))


def example(record: codec.Record) -> dict[str, Any]:
  """A record as the library's features take it."""
  return {
    "id": record.id,
    "task": record.task,
    "kind": record.kind,
    "caption": record.caption,
    "image": _file(record.target),
    "references": [_file(image) for image in record.references],
    "provenance": json.dumps(
      record.provenance, ensure_ascii=False, default=_as_text
    ),
  }


def _as_text(value: bytes) -> str:
  """Bytes in a record's provenance, such as a mask."""
  return base64.b64encode(value).decode()


def _file(image: EncodedImage) -> io.BytesIO:
  """A file that every reader decodes to the same pixels as we do.

  The library's readers know neither orientation nor palettes nor 16 bits.
  """
  with Image.open(io.BytesIO(image.data)) as header:
    plain = (
      header.mode == image.mode
      and getattr(header, "n_frames", 1) == 1
      and header.getexif().get(_ORIENTATION, 1) == 1
    )
  if plain:
    return io.BytesIO(image.data)
  return io.BytesIO(encode_png(np.asarray(decode_image(image))).data)


def _define_flags() -> None:
  flags.DEFINE_string("input", None, "A stage or a dataset.", required=True)
  flags.DEFINE_string("out", None, "Folder to create.", required=True)
  flags.DEFINE_integer("shard_records", 1000, "Examples of a file.", 1)


def main(argv: list[str]) -> None:
  """Exports, then says how to read it."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  values = flags.FLAGS
  with clean_exit():
    path, out = pathlib.Path(values.input), pathlib.Path(values.out)
    count = export(path, out, values.shard_records)
  print(f"{out}: {count} examples; tfds.builder_from_directory({str(out)!r})")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
