# SPDX-License-Identifier: Apache-2.0
"""One training example and its bytes (msgpack, images still encoded)."""

import dataclasses
from typing import Any

import msgpack

from data_pipelines.errors import InputError
from data_pipelines.images import EncodedImage

SCHEMA_VERSION = 1
TASKS = ("t2i", "ti2i")


@dataclasses.dataclass(frozen=True)
class Record:
  """One training example.

  Attributes:
    id: unique within its dataset.
    task: 't2i' (no references) or 'ti2i' (at least one reference).
    caption: the text that asks for `target`.
    kind: free label for statistics, for example 'count' or 'user'.
    target: the image to learn.
    references: the images an edit starts from, in order.
    provenance: where it came from; plain JSON values.
  """

  id: str
  task: str
  caption: str
  kind: str
  target: EncodedImage
  references: tuple[EncodedImage, ...]
  provenance: dict[str, Any]


def encode(record: Record) -> bytes:
  """Serialises a record (msgpack).

  Raises:
    InputError: the task is unknown or contradicts the references.
  """
  if record.task not in TASKS or (
    (record.task == "ti2i") != bool(record.references)
  ):
    raise InputError(
      f"Record {record.id!r} has task {record.task!r} and "
      f"{len(record.references)} references; use 't2i' without references "
      "or 'ti2i' with at least one."
    )
  fields = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(record)}
  return msgpack.packb(fields)


def decode(data: bytes) -> Record:
  """Inverse of `encode`.

  Raises:
    InputError: not a record, or one of another schema version.
  """
  try:
    fields = msgpack.unpackb(data)
    version = fields.pop("schema_version")
  except Exception as error:  # msgpack raises many types on foreign bytes
    raise InputError(
      "Bytes are not a qi2_jax record; rebuild the dataset or check its path."
    ) from error
  if version != SCHEMA_VERSION:
    raise InputError(
      f"Record has schema version {version}, this code reads "
      f"{SCHEMA_VERSION}; rebuild the dataset with this version."
    )
  try:
    fields["target"] = EncodedImage(**fields["target"])
    fields["references"] = tuple(
      EncodedImage(**reference) for reference in fields["references"]
    )
    return Record(**fields)
  except (KeyError, TypeError) as error:
    raise InputError(
      f"Record fields are incomplete ({error}); rebuild the dataset."
    ) from error
