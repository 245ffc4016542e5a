# SPDX-License-Identifier: Apache-2.0
"""What a shard of each verb depends on, as one checksum.

A verb's fingerprint covers its own code and settings and the checksums of
what it reads, so a change reaches exactly the shards that depend on it. Paths
of the stage, the number of processes and limits of time are left out: they
change no result.
"""

import functools
import importlib.metadata
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.caption import mix
from data_pipelines.engine import (
  deciding,
  ingest,
  materialise,
  measure,
  score,
  shards,
)
from data_pipelines.engine.config import StageConfig
from data_pipelines.sources.items import Part, digest, state

# Another decoder or hash may give other pixels or bits.
LIBRARIES = (
  "numpy",
  "pillow",
  "pyarrow",
  "imagehash",
  "opencv-python-headless",
)


@functools.cache
def code(modules: tuple[str, ...]) -> str:
  """Checksum of modules and of the libraries they lean on."""
  return digest(shards.code_version(*modules), versions())


@functools.cache
def versions() -> dict[str, str]:
  """Versions of the libraries, '' where one is not installed by that name."""
  found = {}
  for name in LIBRARIES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = ""
  return found


def of_ingest(config: StageConfig, part: Part) -> str:
  """Fingerprint of a shard of *ingest*."""
  limits = config.limits
  return digest(
    code(ingest.CODE), part.kind, part.prefix, part.start, part.stop,
    part.digest, limits.image_bytes, limits.pixels, limits.references,
    limits.caption_bytes, limits.uncaptioned,
  )  # fmt: skip


def of_measure(config: StageConfig, out: pathlib.Path, stem: str) -> str:
  """Fingerprint of a shard of *measure*."""
  return digest(code(measure.CODE), config.limits.pixels, _records(out, stem))


def of_score(
  config: StageConfig, out: pathlib.Path, name: str, stem: str
) -> str:
  """Fingerprint of a shard of *score* that stand-ins make."""
  return digest(
    code(score.CODE), name, config.score[name], config.limits.pixels,
    _records(out, stem),
  )  # fmt: skip


def of_decide(config: StageConfig, out: pathlib.Path, count: int) -> str:
  """Fingerprint of the verdicts."""
  stems = shards.names(count)
  folders = [out / ingest.FOLDER, out / measure.FOLDER]
  folders += [out / score.FOLDER / name for name in sorted(config.score)]
  return digest(
    code(deciding.CODE), config.filters, config.filter_order, config.seed,
    [[_table(folder, stem) for stem in stems] for folder in folders],
    _files_named_in(config.filters),
  )  # fmt: skip


def of_materialise(
  config: StageConfig, out: pathlib.Path, stem: str, kept: str
) -> str:
  """Fingerprint of a shard of *materialise*."""
  return digest(
    code(materialise.CODE), config.name, config.resolutions,
    config.max_enlarge, vars(config.encoding), config.limits.pixels,
    _records(out, stem), kept,
    mix.identity(out, stem, config.captions, config.seed),
  )  # fmt: skip


def _records(out: pathlib.Path, stem: str) -> str:
  return shards.sha256_of(out / ingest.FOLDER, stem, ".array_record")


def _table(folder: pathlib.Path, stem: str) -> Any:
  """Checksum of a table; its size and time where another program wrote it."""
  marker = shards.read_marker(folder, stem)
  if marker is not None and ".parquet" in marker["files"]:
    return marker["files"][".parquet"]["sha256"]
  return state(folder / f"{stem}.parquet")


def _files_named_in(filters: Mapping[str, Mapping[str, Any]]) -> list[Any]:
  """State of the files that options name, such as evaluation prompts."""
  names = [
    name
    for options in filters.values()
    for value in options.values()
    for name in _strings(value)
  ]
  return [
    state(file)
    for name in sorted(set(names))
    if os.path.exists(name)
    for file in _files(pathlib.Path(name))
  ]


def _strings(value: Any) -> Sequence[str]:
  if isinstance(value, str):
    return [value] if value else []
  if isinstance(value, (list, tuple)):
    return [item for item in value if isinstance(item, str) and item]
  return []


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path.rglob("*")) if path.is_dir() else [path]
