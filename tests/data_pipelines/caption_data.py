# SPDX-License-Identifier: Apache-2.0
"""A dataset to be captioned, and what tests do with its captions."""

import numpy as np
import pyarrow.parquet as pq
from pictures import picture

from data_pipelines import codec, images, records
from data_pipelines.caption import endpoint
from data_pipelines.caption.kinds import KINDS
from data_pipelines.caption.record import Settings

SETTINGS = Settings(
  model="m", kinds=KINDS, languages={"en": 0.5, "zh": 0.5},
  lengths={"short": 0.5, "medium": 0.5}, concurrency=4, processes=1,
)  # fmt: skip
ENGLISH_ONLY = Settings(
  model="m", kinds=KINDS, languages={"en": 1.0}, lengths={"medium": 1.0},
  concurrency=4, processes=1,
)  # fmt: skip


def dataset(path, count=24, shards=2, broken=()):
  """Pictures, slides, charts with something known, and edits, in turn."""
  with records.DatasetWriter(path, shards, {"name": "test"}) as writer:
    for i in range(count):
      encoded = [
        images.encode_png(np.asarray(picture(100 * i + j, (40, 36))))
        for j in range(3)
      ]
      if i in broken:
        data = encoded[0].data[:-600]
        encoded[0] = images.EncodedImage(data, 40, 36, "RGB")
      kind = ("user", "slide_en", "chart", "edit")[i % 4]
      known = {"author": "me"} if kind == "chart" else {}
      references = tuple(encoded[1:]) if kind == "edit" else ()
      task = "ti2i" if references else "t2i"
      writer.add(
        codec.Record(
          f"r{i:02d}", task, "a picture", kind, encoded[0], references, known
        )
      )
  return path


def client(*servers, **fields):
  given = {
    "urls": tuple(s if isinstance(s, str) else s.url for s in servers),
    "model": "m", "timeout": 20.0, "attempts": 2, "backoff": 0.01,
  }  # fmt: skip
  return endpoint.Client(endpoint.Endpoint(**given | fields))


def table(out):
  rows = []
  for path in sorted(out.glob("part-*.parquet")):
    rows += pq.read_table(path).to_pylist()
  return rows


def files(out):
  return {p.name: p.read_bytes() for p in sorted(out.glob("part-*"))}
