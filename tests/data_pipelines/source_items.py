# SPDX-License-Identifier: Apache-2.0
"""What readers make of inputs, for their tests."""

import webdataset

from data_pipelines.sources.items import Limits, Unusable
from data_pipelines.sources.plan import READERS, plan

LIMITS = Limits(image_bytes=100_000)


def read(*inputs, size=1000, limits=LIMITS):
  """id -> Item or the reason why there is none."""
  found = {}
  for part in plan([str(path) for path in inputs], size):
    for entry in READERS[part.kind](part, limits):
      assert entry.id not in found
      assert entry.id.encode("utf-8") and entry.where.encode("utf-8")
      try:
        found[entry.id] = entry.load()
      except Unusable as error:
        found[entry.id] = str(error)
      except OSError as error:
        found[entry.id] = f"OSError {error.strerror}"
  return found


def texts(found):
  return {
    id: item if isinstance(item, str) else item.caption or item.missing
    for id, item in found.items()
  }


def write_tar(path, samples):
  with webdataset.TarWriter(str(path), encoder=False) as writer:
    for sample in samples:
      writer.write(sample)
  return path
