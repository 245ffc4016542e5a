# SPDX-License-Identifier: Apache-2.0
"""A feature cache made of numbers, without models."""

import dataclasses

import numpy as np

from data_pipelines import records
from data_pipelines.features import codec, writer
from data_pipelines.features.dataset import VERSION, pack_program
from data_pipelines.loader.buckets import check_buckets
from data_pipelines.loader.programs import make_plan

BUCKETS = ((32, 32), (32, 64))
COUNT, DAMAGED = 24, 7
LAST_BY_ONE = np.float32([[0], [0], [0], [1]])
MODELS = {"vae": "abc", "text length": 16}


def rng_array(seed, *shape, dtype=np.float32):
  """Normal numbers of a seed."""
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def row(i, references=0, dtype=np.float32, **states):
  """A row whose latents all have the value of its record's number."""
  return codec.FeatureRow(
    str(i), "ti2i" if references else "t2i", f"caption {i}", "flat",
    np.full((4, 3), i, np.float32),
    tuple(np.full((4, 3), 100 + i, np.float32) for _ in range(references)),
    {"full": codec.States(rng_array(i, 5, 2, dtype=dtype)), **states}, 0,
  )  # fmt: skip


def write_source(path):
  """T2I and edits of two shapes; the pixels of one record are damaged."""
  with records.DatasetWriter(path, 3, {}) as out:
    for i in range(COUNT):
      size = (40, 70) if i % 3 == 0 else (40, 40)
      image = records.encode_png(np.full((*size, 3), i, np.uint8))
      if i == DAMAGED:
        image = dataclasses.replace(image, data=image.data[:50])
      edit = i % 4 == 0
      record = records.Record(
        str(i), "ti2i" if edit else "t2i", f"caption {i}", "flat", image,
        (records.encode_png(np.full((40, 40, 3), 100 + i, np.uint8)),) * edit,
        {},
      )  # fmt: skip
      out.add(record)
  return path


def members_of(dataset):
  """`{program: record numbers}` of a dataset."""
  plan = make_plan(
    "px32", [dataset.index], check_buckets(BUCKETS), {"t2i": 1, "ti2i": 1},
    max_enlarge=1.5, max_references=4, min_bucket_records=1,
  )  # fmt: skip
  return dict(zip(plan.programs, plan.members))


def description(dataset, programs, **changes):
  """`features` of the manifest, with some fields changed."""
  about = {
    "version": VERSION, "models": MODELS, "storage": "exact", "channels": 4,
    "buckets": [[list(b) for b in BUCKETS]], "max_enlarge": 1.5,
    "max_references": 4, "empty_captions": True, "white_references": True,
    "programs": [pack_program(p) for p in programs], "shared": 1,
    "source": {
      "shards": [
        {"records": s["records"], "sha256": s["sha256"]}
        for s in dataset.manifest["shards"]
      ]
    },
  }  # fmt: skip
  return about | changes


SHARED = codec.SharedRow(
  rng_array(50, 4, 2), (np.full((4, 3), 255, np.float32),)
)


def features_of(record):
  """A row with a condition of every kind."""
  i, edit = int(record.id), bool(record.references)
  full = np.concatenate([SHARED.states[:2], rng_array(i, 3, 2)])
  if not edit:
    states = {"full": codec.after(full, SHARED.states, "shared")}
  else:
    states = {
      "full": codec.States(full),
      "empty": codec.after(full[:4] + LAST_BY_ONE, full, "full"),
      "white": codec.after(full + 1, SHARED.states, "shared"),
    }
  return dataclasses.replace(row(i, int(edit)), states=states)


def write_shards(dataset, folder, members, programs, names):
  """Writes the named shards, rows in the order of the programs."""
  first = 0
  for shard in dataset.manifest["shards"]:
    name, last = shard["path"], first + shard["records"]
    if name in names:
      sidecar = (dataset.path / name).with_suffix(".npz")
      with writer.ShardWriter(folder, name, sidecar, 1) as out:
        for program, numbers in members.items():
          for i in numbers[(numbers >= first) & (numbers < last)].tolist():
            record = dataset[i]
            bad = record.id == str(DAMAGED)
            data = codec.encode_row(features_of(record))
            if bad:
              data = codec.encode_damaged("Unreadable image")
            out.add(data, i - first, 0, programs.index(program), bad)
    first = last


def write_cache(source, out, **changes):
  """Makes the whole cache of `write_source`; returns its path."""
  dataset = records.open_dataset(source)
  members = members_of(dataset)
  programs = sorted(members)
  about = description(dataset, programs, **changes)
  folder = writer.prepare(str(out), about)
  with records.DatasetWriter(folder / "preview", 1, {}) as preview:
    preview.add(dataset[0])
  writer.write_shared(folder, [codec.encode_shared(SHARED)])
  names = [s["path"] for s in dataset.manifest["shards"]]
  write_shards(dataset, folder, members, programs, names)
  writer.commit(str(out), names, about)
  return str(out)
