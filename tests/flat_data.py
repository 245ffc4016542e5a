# SPDX-License-Identifier: Apache-2.0
"""Small datasets of flat or noisy images for tests of the loader."""

import numpy as np

from data_pipelines import records


def flat(rng, width, height):
  """One random colour."""
  colour = rng.integers(0, 256, 3, np.uint8)
  return records.encode_png(np.tile(colour, (height, width, 1)))


def noise(rng, width, height):
  """Random pixels."""
  return records.encode_png(rng.integers(0, 256, (height, width, 3), np.uint8))


def write(path, sizes, draw=flat, seed=0, shards=1):
  """Writes a record per entry of `sizes`; record i has the id `str(i)`.

  Args:
    path: the dataset folder to create.
    sizes: per record the (width, height) of its target and of its references.
    draw: `(rng, width, height) -> EncodedImage`.
    seed: of the pixels.
    shards: number of files.

  Returns:
    The path as a string.
  """
  rng = np.random.default_rng(seed)
  with records.DatasetWriter(path, shards, {}) as writer:
    for i, (target, *references) in enumerate(sizes):
      writer.add(
        records.Record(
          id=str(i),
          task="ti2i" if references else "t2i",
          caption=f"caption {i}",
          kind="flat",
          target=draw(rng, *target),
          references=tuple(draw(rng, *size) for size in references),
          provenance={},
        )
      )
  return str(path)


def random_sizes(count, seed, low=8, high=90, edits=0.2):
  """Sizes for `write`: sides in [low, high), some records with references."""
  rng = np.random.default_rng(seed)

  def size():
    return tuple(rng.integers(low, high, 2).tolist())

  return [
    [
      size()
      for _ in range(1 + (rng.integers(1, 4) if edits > rng.random() else 0))
    ]
    for _ in range(count)
  ]


def tagged(sample, rng):
  """A transform: images with their record's number and a random draw."""
  return {
    "image": sample["image"],
    "references": sample["references"],
    "id": np.int64(sample["id"]),
    "edit": np.bool_(sample["task"] == "ti2i"),
    "draw": np.float64(rng.random()),
  }


def assert_equal(first, second):
  """Two batches of `tagged` are the same, bit for bit."""
  assert first.keys() == second.keys()
  for name, value in first.items():
    if isinstance(value, tuple):
      assert len(value) == len(second[name])
      for a, b in zip(value, second[name]):
        np.testing.assert_array_equal(a, b)
    else:
      np.testing.assert_array_equal(value, second[name])


def joined(rows):
  """One step's batches of all hosts, in their order, as one batch."""
  return {
    name: tuple(map(np.concatenate, zip(*(r[name] for r in rows))))
    if name == "references"
    else np.concatenate([r[name] for r in rows])
    for name in rows[0]
  }
