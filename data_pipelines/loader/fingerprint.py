# SPDX-License-Identifier: Apache-2.0
"""Hashes: the identity of a stream of batches, and stable seeds."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
import PIL
import PIL.features

from data_pipelines.loader.config import LoaderConfig

# Raise it when the order of the data changes for an unchanged config.
_ORDER_VERSION = 2
# They change neither order nor pixels. `repeat_small` only allows or refuses.
_IRRELEVANT = ("paths", "threads", "quarantine_path", "repeat_small")
# Fields that came later count where they are in use, so that checkpoints from
# before them go on.
_UNUSED = {"weights": None, "text_lengths": ()}


def seed_of(*parts: Any) -> int:
  """A stable 31-bit seed; Grain adds small numbers and needs 32 bits."""
  digest = hashlib.sha256(repr(parts).encode()).digest()
  return int.from_bytes(digest[:4], "big") >> 1


def fingerprint(
  config: LoaderConfig,
  datasets: list,
  text_lengths: Sequence[np.ndarray] | None,
) -> str:
  """Hash of everything that decides order and pixels.

  Args:
    config: of the loader.
    datasets: their manifests name the data by its checksums.
    text_lengths: padded length of each caption, per dataset, if it matters.
  """
  fields = dataclasses.asdict(config)
  for name in _IRRELEVANT:
    del fields[name]
  for name, unused in _UNUSED.items():
    if fields[name] == unused:
      del fields[name]
  content = {
    "order_version": _ORDER_VERSION,
    "config": fields,
    "data": [
      [(s["records"], s["sha256"]) for s in dataset.manifest["shards"]]
      for dataset in datasets
    ],
    # Decoders and resamplers differ between versions by a grey level or two.
    "versions": {
      "grain": grain.__version__,
      "pillow": PIL.__version__,
      "jpeg": PIL.features.version("jpg"),
      "jpeg_turbo": PIL.features.version("libjpeg_turbo"),
      "webp": PIL.features.version("webp"),
    },
  }
  if text_lengths is not None:
    joined = np.concatenate(text_lengths).astype("<i4")
    content["captions"] = hashlib.sha256(joined.tobytes()).hexdigest()
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
