# SPDX-License-Identifier: Apache-2.0
"""The choice of one caption for each record, by weights.

`original` stands for the caption that the record came with. A draw depends on
the seed and the record's id alone.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from data_pipelines import codec
from data_pipelines.caption.draw import draw
from data_pipelines.caption.kinds import KINDS, LANGUAGES, LENGTHS
from data_pipelines.engine import shards
from data_pipelines.errors import InputError

# Beside the folders of the verbs of a stage.
FOLDER = "caption"
ORIGINAL = "original"
# What weights speak of, in the order of the draws.
_KNOWN = {
  "kinds": (ORIGINAL, *KINDS),
  "languages": tuple(LANGUAGES),
  "lengths": LENGTHS,
}
_COLUMNS = {"kinds": "kind", "languages": "language", "lengths": "length"}

Weights = Mapping[str, Mapping[str, float]]
OFF: Weights = {"kinds": {}, "languages": {}, "lengths": {}}


def check_weights(weights: Weights, where: str) -> None:
  """Checks what a config says of the mix.

  Args:
    weights: by 'kinds', 'languages' and 'lengths'; see `choose_caption`.
    where: name of the config field, for the message.

  Raises:
    InputError: a name is unknown, or a weight is no number from 0 on.
  """
  if set(weights) != set(_KNOWN):
    raise InputError(f"{where} needs exactly the fields {list(_KNOWN)}.")
  for field, values in weights.items():
    unknown = sorted(set(values) - set(_KNOWN[field]))
    bad = [name for name, weight in values.items() if not _is_weight(weight)]
    if unknown or bad:
      raise InputError(
        f"{where}.{field} has the unknown names {unknown} and unusable weights "
        f"of {bad}; use numbers from 0 on for {', '.join(_KNOWN[field])}."
      )


def _is_weight(value: Any) -> bool:
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return number and 0 <= value < float("inf")


def choose_caption(
  record: codec.Record,
  captions: Sequence[Mapping[str, Any]],
  weights: Weights,
  seed: int,
) -> Mapping[str, Any] | None:
  """Chooses one caption of a record.

  A kind is drawn by weight among those that the record has, then a language
  among those of that kind, then a length. Names without a weight are left
  out, unless a field is empty, where all have the same. An edit takes
  instructions only, other records none.

  Args:
    record: not changed.
    captions: its rows, see `caption.record`; unusable ones are ignored.
    weights: by 'kinds', 'languages' and 'lengths'.
    seed: changes the draws.

  Returns:
    A row, or None for the original caption, if there is one.
  """
  left = [
    row
    for row in captions
    if row["valid"] and (row["kind"] == "edit") == (record.task == "ti2i")
  ]
  # Only kinds that can be drawn compete: a kind without a language does not.
  left = [
    row
    for row in left
    if all(_weight(row, f, weights) for f in ("languages", "lengths"))
  ]
  for field in _KNOWN:
    options = {
      row[_COLUMNS[field]]: _weight(row, field, weights) for row in left
    }
    if field == "kinds" and record.caption:
      options[ORIGINAL] = weights["kinds"].get(ORIGINAL, 0.0)
    drawn = draw(options, 1, seed, record.id, field)
    if not drawn or drawn == [ORIGINAL]:
      return None
    left = [row for row in left if row[_COLUMNS[field]] == drawn[0]]
  return left[0]


def _weight(row: Mapping[str, Any], field: str, weights: Weights) -> float:
  name = row[_COLUMNS[field]]
  # Structured captions have no length.
  if not name or not weights[field]:
    return 1.0
  return float(weights[field].get(name, 0.0))


def apply(
  record: codec.Record,
  captions: Mapping[str, Sequence[Mapping[str, Any]]],
  weights: Weights,
  seed: int,
) -> codec.Record:
  """The record with the caption that is chosen, and where that is from.

  Args:
    record: not changed.
    captions: see `load`.
    weights: see `choose_caption`.
    seed: likewise.

  Raises:
    InputError: nobody has captioned the record.
  """
  if record.id not in captions:
    raise InputError(
      f"Record {record.id!r} has no captions, as what is kept has changed; run "
      "`python -m data_pipelines.captioner` on the stage again."
    )
  row = choose_caption(record, captions[record.id], weights, seed)
  if row is None:
    about: dict[str, Any] = {"kind": ORIGINAL}
    return dataclasses.replace(
      record, provenance={**record.provenance, "caption": about}
    )
  names = ("kind", "language", "length", "model", "prompt_id")
  about = {name: row[name] for name in names}
  return dataclasses.replace(
    record,
    caption=row["text"],
    provenance={
      **record.provenance,
      "caption": {**about, "original": record.caption},
    },
  )


def identity(out: pathlib.Path, stem: str, weights: Weights, seed: int) -> Any:
  """What the mix of a shard depends on, for its fingerprint.

  Args:
    out: folder of the stage.
    stem: of the shard.
    weights: of the mix; without a kind of weight above 0 there is none.
    seed: of the draws.

  Raises:
    InputError: the shard has no captions.
  """
  if not any(weights["kinds"].values()):
    return None
  marker = shards.read_marker(out / FOLDER, stem)
  if marker is None:
    raise InputError(
      f"config.captions asks for captions and {out / FOLDER / stem} has none; "
      f"run `python -m data_pipelines.captioner --input={out}` first."
    )
  return [marker["files"][".parquet"]["sha256"], weights, seed]


def load(
  out: pathlib.Path, stem: str, weights: Weights
) -> dict[str, list[dict[str, Any]]] | None:
  """The captions of a shard by record; None if none are mixed in."""
  if not any(weights["kinds"].values()):
    return None
  return by_record(out / FOLDER, stem)


def by_record(
  folder: pathlib.Path, stem: str
) -> dict[str, list[dict[str, Any]]]:
  """The rows of a shard of captions by record."""
  found: dict[str, list[dict[str, Any]]] = {}
  for row in pq.read_table(folder / f"{stem}.parquet").to_pylist():
    found.setdefault(row["id"], []).append(row)
  return found
