# SPDX-License-Identifier: Apache-2.0
"""Which folder is a feature cache, and whether it fits a run."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.errors import InputError
from data_pipelines.features.codec import REMEDY
from data_pipelines.features.dataset import FeatureDataset
from data_pipelines.loader.config import LoaderConfig
from data_pipelines.records import Dataset, load_manifest, open_dataset

PREVIEW_FOLDER = "preview"


def read_about(path: str) -> dict[str, Any] | None:
  """What made the cache in a folder; None where it holds images.

  Raises:
    InputError: the folder is no dataset (see `load_manifest`).
  """
  return load_manifest(path).get("features")


def image_folder(path: str) -> str:
  """The dataset with images to look at: of a cache its preview."""
  return str(pathlib.Path(path) / PREVIEW_FOLDER) if read_about(path) else path


def open_any(path: str, config: LoaderConfig) -> Dataset | FeatureDataset:
  """Opens a dataset or a cache that fits a loader.

  Raises:
    InputError: unreadable, or the cache was made for other shapes.
  """
  about = read_about(path)
  if about is None:
    return open_dataset(path)
  # In order: it decides where an image lies between two buckets.
  held = [list(map(tuple, one)) for one in about["buckets"]]
  for resolution in config.resolutions.values():
    wanted = list(map(tuple, resolution.buckets))
    if wanted not in held:
      raise InputError(
        f"Feature cache {path} was made for the buckets {held}, not for "
        f"{wanted}; {REMEDY}"
      )
  for name in ("max_enlarge", "channels"):
    here = getattr(config, name)
    if here != about[name]:
      raise InputError(
        f"Feature cache {path} was made with {name} {about[name]}, not "
        f"{here}; {REMEDY}"
      )
  if config.max_references > about["max_references"]:
    raise InputError(
      f"Feature cache {path} was made with max_references "
      f"{about['max_references']}, less than {config.max_references}; {REMEDY}"
    )
  return FeatureDataset(path)


def check_models(
  paths: Sequence[str], signature: Callable[[], dict] | None,
  caption_dropout: float, reference_dropout: float,
) -> None:  # fmt: skip
  """Checks caches against the models and dropouts of a run.

  Args:
    paths: folders of the run, images or caches.
    signature: describes the models as the cache's `models` does; None where
      the objective needs pixels.
    caption_dropout: probability of an empty caption.
    reference_dropout: probability of white references.

  Raises:
    InputError: a cache does not fit, or caches and images are mixed.
  """
  found = {path: read_about(path) for path in paths}
  caches = {path: about for path, about in found.items() if about}
  if not caches:
    return
  if len(caches) < len(found):
    raise InputError(
      f"{next(iter(caches))} is a feature cache and "
      f"{next(p for p in found if p not in caches)} holds images; use folders "
      "of one kind."
    )
  path = next(iter(caches))
  if signature is None:
    raise InputError(
      f"{path} is a feature cache, but this objective needs pixels; give the "
      "dataset that it was made of."
    )
  models = signature()
  for path, about in caches.items():
    for name in sorted(models.keys() | about["models"].keys()):
      there, here = about["models"].get(name), models.get(name)
      if there != here:
        raise InputError(
          f"Feature cache {path} was made with another {name} ({there} there, "
          f"{here} here); {REMEDY}"
        )
    for field, rate in (
      ("empty_captions", caption_dropout),
      ("white_references", reference_dropout),
    ):
      if rate and not about[field]:
        raise InputError(
          f"Feature cache {path} holds no {field.replace('_', ' ')}, which a "
          f"dropout of {rate} needs; {REMEDY}"
        )


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
  """The first field in which two descriptions differ, or ''."""
  new = json.loads(json.dumps(new))
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name):
      return name
  return ""
