# SPDX-License-Identifier: Apache-2.0
"""The config of a stage as the engine sees it, checked before any work."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from data_pipelines.caption import mix
from data_pipelines.engine import score
from data_pipelines.errors import InputError
from data_pipelines.filters import decide
from data_pipelines.loader.buckets import Bucket, check_buckets
from data_pipelines.sources.items import Limits

_FORMATS = {"rgb": ("auto", "jpeg", "png", "webp"), "rgba": ("png", "webp")}


@dataclasses.dataclass(frozen=True)
class Encoding:
  """How materialised images are stored.

  Attributes:
    rgb: 'jpeg', 'png', 'webp', or 'auto': PNG for a PNG, else JPEG.
    rgba: 'png' or 'webp', without loss.
    quality: of JPEG and WebP, 1 to 100.
  """

  rgb: str
  rgba: str
  quality: int


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """See experiments/data.py for the fields that are not explained here.

  Attributes:
    resolutions: buckets of each resolution, the largest resolution first.
    plain: the whole config as plain JSON values.
  """

  name: str
  seed: int
  shard_records: int
  max_error_rate: float
  limits: Limits
  resolutions: tuple[tuple[Bucket, ...], ...]
  max_enlarge: float
  encoding: Encoding
  captions: mix.Weights
  score: Mapping[str, Mapping[str, Any]]
  filters: Mapping[str, Mapping[str, Any]]
  filter_order: tuple[str, ...]
  plain: dict[str, Any]


def parse(values: Mapping[str, Any]) -> StageConfig:
  """Checks a config.

  Args:
    values: plain values, as of `ConfigDict.to_dict`.

  Raises:
    InputError: a field is missing, unknown or unusable.
  """
  plain = json.loads(json.dumps(values))
  fields = {f.name for f in dataclasses.fields(StageConfig)}
  fields = (fields | {"buckets"}) - {"resolutions", "plain"}
  if set(plain) != fields:
    raise InputError(
      f"The config needs the fields {sorted(fields)}; missing "
      f"{sorted(fields - set(plain))}, unknown {sorted(set(plain) - fields)}."
    )
  try:
    limits = Limits(**plain["limits"])
    encoding = Encoding(**plain["encoding"])
    buckets = [check_buckets(sizes) for sizes in plain["buckets"].values()]
  except TypeError as error:
    raise InputError(
      f"The config is unusable ({error}); see experiments/data.py."
    ) from error
  config = StageConfig(
    name=plain["name"],
    seed=plain["seed"],
    shard_records=plain["shard_records"],
    max_error_rate=plain["max_error_rate"],
    limits=limits,
    resolutions=tuple(sorted(buckets, key=_area, reverse=True)),
    max_enlarge=plain["max_enlarge"],
    encoding=encoding,
    captions=plain["captions"],
    score=plain["score"],
    filters=plain["filters"],
    filter_order=tuple(plain["filter_order"]),
    plain=plain,
  )
  _check(config)
  mix.check_weights(config.captions, "config.captions")
  decide.check(config.filters, config.filter_order)
  for name, options in config.score.items():
    score.check(name, options)
  return config


def _area(buckets: tuple[Bucket, ...]) -> int:
  return max(bucket.height * bucket.width for bucket in buckets)


def _check(config: StageConfig) -> None:
  for name, known in _FORMATS.items():
    if getattr(config.encoding, name) not in known:
      raise InputError(
        f"config.encoding.{name} is {getattr(config.encoding, name)!r}; use "
        f"one of {known}."
      )
  bounds = {
    "shard_records": (config.shard_records, 1, 1_000_000),
    "max_error_rate": (config.max_error_rate, 0, 1),
    "max_enlarge": (config.max_enlarge, 1, 16),
    "encoding.quality": (config.encoding.quality, 1, 100),
    # Pillow refuses larger images, and would do so later and less clearly.
    "limits.pixels": (config.limits.pixels, 1, 178_956_970),
    "limits.seconds": (config.limits.seconds, 0.01, 86_400),
  }
  for name, (value, low, high) in bounds.items():
    if not low <= value <= high:
      raise InputError(
        f"config.{name} is {value}; use a number from {low} to {high}."
      )
  if not config.resolutions:
    raise InputError("config.buckets is empty; name at least one resolution.")
