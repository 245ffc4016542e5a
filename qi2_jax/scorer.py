# SPDX-License-Identifier: Apache-2.0
"""Records to rows of scores, for `score`: decode, embed, put into a table.

Shapes: B records of a call, H, W pixels of a prepared image, T text tokens, P
width of the common space.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from absl import logging

from data_pipelines import codec
from data_pipelines.engine import shards
from data_pipelines.errors import InputError as DataError
from data_pipelines.images import decode_image
from qi2_jax.errors import InputError
from qi2_jax.interop import aesthetic as heads
from qi2_jax.interop import image_processor, image_text
from qi2_jax.interop.image_text import ImageText
from qi2_jax.models.aesthetic import Head, rate
from qi2_jax.parallel import mesh as mesh_lib
from qi2_jax.parallel.sharding import batch_sharding, tree_shardings


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """Everything that turns records into rows.

  Attributes:
    scorer: the model, on `mesh`.
    head: of aesthetics, or None.
    mesh: devices of this host.
    batch_size: rows per call.
    threads: that decode and prepare.
  """

  scorer: ImageText
  head: Head | None
  mesh: jax.sharding.Mesh
  batch_size: int
  threads: int


@dataclasses.dataclass(frozen=True)
class Row:
  """A record, prepared; without image and ids if it is damaged."""

  id: str | None
  image: np.ndarray | None = None
  ids: np.ndarray | None = None


def load(model: str, head: str, batch_size: int, threads: int) -> Job:
  """Reads model and head onto the devices of this host.

  Args:
    model: folder, see the module docstring.
    head: file, or "" for none.
    batch_size: rows per call; rounded up to fill the devices.
    threads: that decode and prepare.

  Raises:
    InputError: they are missing, damaged or do not belong together.
  """
  mesh = mesh_lib.create_mesh({"data": -1}, jax.local_devices())
  rules = image_text.sharding_rules(image_text.kind_of(model))
  # A CPU is slower in half precision.
  half = jax.default_backend() != "cpu"
  scorer = image_text.load(
    model, dtype=jnp.bfloat16 if half else jnp.float32,
    shardings=lambda tree: tree_shardings(tree, rules, mesh),
  )  # fmt: skip
  layers = heads.load(head, scorer.width) if head else None
  size = -(-batch_size // mesh.size) * mesh.size
  return Job(scorer, layers, mesh, size, threads)


def prepared(scorer: ImageText, data: bytes) -> Row:
  """Decodes and prepares one record; never raises for a damaged one."""
  try:
    record = codec.decode(data)
  except DataError as error:
    logging.warning("a record is damaged: %s", error)
    return Row(None)
  try:
    pixels = np.asarray(decode_image(record.target))
    image = image_processor.prepare(pixels, scorer.processor)
    return Row(record.id, image, scorer.tokens([record.caption])[0])
  # Pillow refuses huge images by MemoryError too.
  except (DataError, InputError, MemoryError) as error:
    logging.warning("record %s is damaged: %s", record.id, error)
    return Row(record.id)


@functools.partial(jax.jit, static_argnames="model")
def _scores(params, head, image_BHWC, ids_BT, *, model) -> dict:
  apply = functools.partial(model.apply, {"params": params})
  image_BP = apply(image_BHWC, method="embed_images")
  text_BP = apply(ids_BT, method="embed_texts")
  out = {
    "clip_alignment": jnp.sum(image_BP * text_BP, axis=-1),
    "embedding": image_BP.astype(jnp.float16),
  }
  return out if head is None else out | {"aesthetic": rate(head, image_BP)}


def dispatched(job: Job, rows: list[Row]) -> dict:
  """Starts to score the sound ones of at most a batch of rows."""
  config = job.scorer.model.config
  side = config.image_size
  images = np.zeros((job.batch_size, side, side, 3), np.float32)
  ids = np.zeros((job.batch_size, config.length), np.int32)
  sound = [row for row in rows if row.image is not None]
  for i, row in enumerate(sound):
    images[i], ids[i] = row.image, row.ids
  put = functools.partial(jax.device_put, device=batch_sharding(job.mesh))
  return _scores(
    job.scorer.params, job.head, put(images), put(ids), model=job.scorer.model
  )


def table(rows: list[Row], made: dict[str, np.ndarray]) -> pa.Table:
  """Rows of the file; null where a record is damaged.

  Args:
    rows: of a batch.
    made: values of the sound ones among them, in order.
  """
  sound = np.asarray([row.image is not None for row in rows], bool)
  columns = {"id": pa.array([row.id for row in rows], pa.string())}
  for name, values in made.items():
    whole = np.zeros((len(rows), *values.shape[1:]), values.dtype)
    whole[sound] = values[: sound.sum()]
    if whole.ndim == 1:
      columns[name] = pa.array(whole, mask=~sound)
    else:
      starts = np.arange(len(rows) + 1, dtype=np.int32) * whole.shape[1]
      columns[name] = pa.ListArray.from_arrays(
        pa.array(starts), pa.array(whole.ravel()), mask=pa.array(~sound)
      )
  return pa.table(columns)


def _batches(job: Job, path: pathlib.Path) -> Iterator[list[Row]]:
  """Rows of a shard, prepared in threads."""
  data = shards.read_records(path)
  prepare = functools.partial(prepared, job.scorer)
  with ThreadPoolExecutor(job.threads) as pool:
    while chunk := list(itertools.islice(data, job.batch_size)):
      yield list(pool.map(prepare, chunk))


def tables(job: Job, path: pathlib.Path) -> Iterator[pa.Table]:
  """The rows of a shard in order; one batch is computed ahead."""
  waiting = None
  for rows in _batches(job, path):
    made = dispatched(job, rows)
    if waiting:
      yield table(waiting[0], jax.device_get(waiting[1]))
    waiting = rows, made
  if waiting:
    yield table(waiting[0], jax.device_get(waiting[1]))


def empty_table(job: Job) -> pa.Table:
  """The columns, for a shard without records."""
  made = jax.device_get(dispatched(job, []))
  return table([], {name: values[:0] for name, values in made.items()})
