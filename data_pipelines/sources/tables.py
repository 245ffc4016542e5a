# SPDX-License-Identifier: Apache-2.0
"""Parquet tables with encoded images, for example of img2dataset.

The image is in `image`, `jpg`, `jpeg`, `png`, `webp`, `image_bytes` or
`target`, as bytes or as the struct of bytes and path of the `datasets`
library; the caption in `text`, `caption`, `prompt` or `instruction`; the
references of an edit in `references`, `reference`, `source_image` or
`source`, one image or a list.
"""

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.errors import InputError
from data_pipelines.sources.items import (
  TEXT_FIELDS,
  Entry,
  Item,
  Limits,
  Part,
  Unusable,
  caption_of,
  check_bytes,
  digest,
  kept_fields,
  lost,
  printable,
  state,
)

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "target")
_REFERENCES = ("references", "reference", "source_image", "source")
_ROWS = 64  # decoded at a time; bounds memory


def plan(path: pathlib.Path, prefix: str, size: int) -> list[Part]:
  """A row group is a part, whatever `size` says; a damaged file is one too.

  Raises:
    InputError: the table has no column of images.
  """
  try:
    metadata = pq.read_metadata(path)
  except (OSError, pa.ArrowException):
    # Reading says what is wrong, and the file is accounted for.
    return [Part("table", os.fspath(path), prefix, 0, 1, digest(state(path)))]
  image_column(metadata.schema.to_arrow_schema(), path)
  return [
    Part(
      "table", os.fspath(path), prefix, group, group + 1,
      digest(group, state(path)),
    )
    for group in range(metadata.num_row_groups)
  ]  # fmt: skip


def has_images(path: pathlib.Path) -> bool:
  """Whether a Parquet file holds images; a damaged one might."""
  try:
    image_column(pq.read_schema(path), path)
  except InputError:
    return False
  except (OSError, pa.ArrowException):
    return True
  return True


def image_column(schema: pa.Schema, path: pathlib.Path) -> str:
  """Name of the column with the encoded images.

  Raises:
    InputError: there is none.
  """
  for name in IMAGES:
    if name in schema.names and _is_image(schema.field(name).type):
      return name
  raise InputError(
    f"{path} has no column of images among {list(IMAGES)} (its columns are "
    f"{schema.names}); rename the column that holds the encoded images."
  )


def _is_image(kind: pa.DataType) -> bool:
  if pa.types.is_struct(kind):
    return kind.get_field_index("bytes") >= 0
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def read(part: Part, limits: Limits) -> Iterator[Entry]:
  """The rows of a part, and one entry for what is lost to damage."""
  path = pathlib.Path(part.path)
  name = printable(path.name)
  try:
    with pq.ParquetFile(path) as file:
      image = image_column(file.schema_arrow, path)
      first = sum(
        file.metadata.row_group(group).num_rows for group in range(part.start)
      )
      batches = file.iter_batches(_ROWS, row_groups=[part.start])
      for batch in batches:
        for number, row in enumerate(batch.to_pylist(), start=first):
          where = f"{name}:{number}"
          load = functools.partial(load_row, row, image, where, limits)
          yield Entry(f"{part.prefix}:{number}", where, load)
        first += len(batch)
  except (OSError, pa.ArrowException) as error:
    text = str(error).splitlines()[0]
    yield lost(
      f"{part.prefix}:{part.start}#rest", name,
      f"damaged Parquet file ({text}; the rest of it is lost)",
    )  # fmt: skip


def load_row(
  row: dict[str, Any], image: str, where: str, limits: Limits
) -> Item:
  """The item in a row.

  Args:
    row: plain values; text may be UTF-8 bytes.
    image: name of the column with the image.
    where: see `Entry`.
    limits: of the images.

  Raises:
    Unusable: the image is missing or too large.
  """
  target = _bytes(row[image], limits)
  if target is None:
    status = row.get("error_message") or row.get("status")
    raise Unusable(f"no image ({status})" if status else "no image")
  references: list[bytes] = []
  for name in _REFERENCES:
    found = row.get(name)
    if isinstance(found, (bytes, dict, list)):
      values = found if isinstance(found, list) else [found]
      references = [_bytes(value, limits) for value in values]
      break
  if None in references:
    raise Unusable("no reference image")
  text = {name: _text(row.get(name)) for name in TEXT_FIELDS}
  caption, missing = caption_of(text)
  return Item(
    caption=caption,
    kind=str(text["kind"] or "user"),
    target=target,
    references=tuple(references),
    provenance={"where": where, **kept_fields(text)},
    missing=missing,
  )


def _text(value: Any) -> Any:
  if not isinstance(value, bytes):
    return value
  try:
    return value.decode("utf-8")
  except UnicodeDecodeError as error:
    raise Unusable("text is not UTF-8") from error


def _bytes(value: Any, limits: Limits) -> bytes | None:
  if isinstance(value, dict):
    value = value.get("bytes")
  if not isinstance(value, bytes):
    return None
  check_bytes(len(value), limits)
  return value
