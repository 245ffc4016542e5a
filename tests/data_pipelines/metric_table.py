# SPDX-License-Identifier: Apache-2.0
"""Tables as the *measure* verb writes them, without images."""

import numpy as np
import pyarrow as pa

from data_pipelines.filters import decide, metrics


def rows(count, **columns):
  """A metric table of distinct, healthy records; columns override."""
  rng = np.random.default_rng(0)
  table = {
    "id": [f"r{i}" for i in range(count)],
    "shard": [i % 2 for i in range(count)],
    "error": [None] * count,
    "task": ["t2i"] * count,
    "kind": ["user"] * count,
    "caption": [f"picture {i}" for i in range(count)],
    "language": ["en"] * count,
    "references": [0] * count,
    "width": [300] * count,
    "height": [400] * count,
    "short_side": [300] * count,
    "pixels": [120_000] * count,
    "bytes": [9000] * count,
    "tokens": [10] * count,
    "entropy": [7.0] * count,
    "orientation_conflict": [False] * count,
    "jpeg_quality": [None] * count,
    "sha256": [f"{i:064d}" for i in range(count)],
    "phash": rng.integers(0, 2**64, count, np.uint64).tolist(),
    "dhash": rng.integers(0, 2**64, count, np.uint64).tolist(),
    "thumb": [rng.bytes(192) for _ in range(count)],
    **columns,
  }
  types = {"id": pa.string(), "shard": pa.int32(), "error": pa.string(),
           **metrics.METRICS}  # fmt: skip
  fields = [(n, types[n]) if n in types else pa.array(v).type
            for n, v in table.items()]  # fmt: skip
  schema = pa.schema(
    [f if isinstance(f, tuple) else (n, f) for n, f in zip(table, fields)]
  )
  return pa.table(table, schema)


def judge(table, order, seed=0, **filters):
  return decide.decide(table, filters, order, seed)


def dropped(verdicts):
  return {
    r["id"]: r["filter"] for r in verdicts.to_pylist() if not r["kept"]
  }  # fmt: skip
