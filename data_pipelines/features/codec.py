# SPDX-License-Identifier: Apache-2.0
"""Rows of a feature cache and their bytes (msgpack, arrays as they lie).

States are stored at their true length. A caption follows its images and the
encoder is causal, so two conditions of a record, and all records of a
program, begin with equal states; those are stored once (`States.skip`).

Shapes: T true encoder tokens after the system turn, C their width, N target
latents, n latents of one reference, Z latent channels.
"""

import dataclasses
from typing import Any

import ml_dtypes  # noqa: F401, teaches numpy bfloat16
import msgpack
import numpy as np

from data_pipelines.errors import InputError

REMEDY = (
  "make the cache again with python -m qi2_jax.cache, or train on the images."
)


@dataclasses.dataclass(frozen=True)
class States:
  """Encoder states of one condition, less those that another one has too.

  Attributes:
    rows: [T - skip, C].
    skip: so many leading rows are equal to those of `base`.
    base: 'full' (of the same row), 'shared' or '' (nothing is skipped).
  """

  rows: np.ndarray
  skip: int = 0
  base: str = ""


@dataclasses.dataclass(frozen=True)
class FeatureRow:
  """Features of one record in one program.

  Attributes:
    id: of the record.
    task: of the record.
    caption: of the record.
    kind: of the record.
    latents: of the target, [N, Z].
    references: latents of each reference, [n, Z].
    states: 'full' (caption and references), and where an edit can lose them,
      'empty' (no caption) and 'white' (white references).
    shared: number of the row's `SharedRow`, -1 for none.
  """

  id: str
  task: str
  caption: str
  kind: str
  latents: np.ndarray
  references: tuple[np.ndarray, ...]
  states: dict[str, States]
  shared: int


@dataclasses.dataclass(frozen=True)
class SharedRow:
  """The condition without caption and with white references, if any.

  Attributes:
    states: [T, C].
    references: latents of each white reference, [n, Z].
  """

  states: np.ndarray
  references: tuple[np.ndarray, ...]


def common_rows(a: np.ndarray, b: np.ndarray) -> int:
  """Number of leading rows of [T, C] and [U, C] that are equal to the bit."""
  length = min(len(a), len(b))
  bits = [
    np.ascontiguousarray(x[:length])
    .view(np.uint8)
    .reshape(length, x.shape[1] * x.itemsize)
    for x in (a, b)
  ]
  differ = (bits[0] != bits[1]).any(axis=1)
  return int(differ.argmax()) if differ.any() else length


def after(states: np.ndarray, other: np.ndarray, base: str) -> States:
  """`states` [T, C] as what follows their common rows with `other` [U, C]."""
  skip = common_rows(states, other)
  return States(states[skip:], skip, base)


def _pack_array(array: np.ndarray) -> dict[str, Any]:
  return {
    "dtype": array.dtype.name,
    "shape": list(array.shape),
    "data": np.ascontiguousarray(array).tobytes(),
  }


def _unpack_array(fields: dict[str, Any]) -> np.ndarray:
  array = np.frombuffer(fields["data"], np.dtype(fields["dtype"]))
  return array.reshape(fields["shape"])


def encode_row(row: FeatureRow) -> bytes:
  """Serialises a row."""
  fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
  fields["latents"] = _pack_array(row.latents)
  fields["references"] = [_pack_array(r) for r in row.references]
  fields["states"] = {
    name: [_pack_array(s.rows), s.skip, s.base]
    for name, s in row.states.items()
  }
  return msgpack.packb(fields)


def encode_damaged(reason: str) -> bytes:
  """Serialises a row whose record could not be read, for `reason`."""
  return msgpack.packb({"damaged": reason})


def decode_row(data: bytes) -> FeatureRow:
  """Inverse of `encode_row`.

  Raises:
    InputError: no such row, or its record was damaged.
  """
  fields = _unpack(data)
  if "damaged" in fields:
    raise InputError(fields["damaged"])
  try:
    fields["latents"] = _unpack_array(fields["latents"])
    fields["references"] = tuple(map(_unpack_array, fields["references"]))
    fields["states"] = {
      name: States(_unpack_array(rows), skip, base)
      for name, (rows, skip, base) in fields["states"].items()
    }
    return FeatureRow(**fields)
  except (KeyError, TypeError, ValueError) as error:
    raise InputError(
      f"A row of features is incomplete ({error}); {REMEDY}"
    ) from error


def encode_shared(row: SharedRow) -> bytes:
  """Serialises a shared row."""
  return msgpack.packb(
    {
      "states": _pack_array(row.states),
      "references": [_pack_array(r) for r in row.references],
    }
  )


def decode_shared(data: bytes) -> SharedRow:
  """Inverse of `encode_shared`."""
  fields = _unpack(data)
  return SharedRow(
    _unpack_array(fields["states"]),
    tuple(map(_unpack_array, fields["references"])),
  )


def _unpack(data: bytes) -> dict[str, Any]:
  try:
    fields = msgpack.unpackb(data)
  except Exception as error:  # msgpack raises many types on foreign bytes
    raise InputError(f"Bytes are no row of features; {REMEDY}") from error
  if not isinstance(fields, dict):
    raise InputError(f"Bytes are no row of features; {REMEDY}")
  return fields
