# SPDX-License-Identifier: Apache-2.0
"""Records to rows of a feature cache: VAE and text encoder over a dataset.

Shapes: B rows of a call, H W pixels, N latents, T encoder tokens, C their
width, Z latent channels.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from data_pipelines.errors import InputError
from data_pipelines.features import codec
from data_pipelines.loader.buckets import Bucket, Program
from data_pipelines.loader.loader import pixels
from data_pipelines.records import Dataset
from qi2_jax.conditioning import encoder as encoder_lib
from qi2_jax.conditioning.conditioner import Conditioner, encode_images, stack
from qi2_jax.models.vae import VAE
from qi2_jax.parallel.sharding import batch_sharding
from qi2_jax.training import frozen

_TEXT_FIELDS = ("ids", "ids_valid", "positions", "image_index")
# No condition depends on the target's size; its positions, not used here, do.
_ANY_SIZE = (64, 64)


@dataclasses.dataclass(frozen=True)
class Producer:
  """Everything that turns records into rows.

  Attributes:
    dataset: the source.
    models: VAE and text encoder on `mesh`.
    mesh: devices of this host.
    batch_size: rows per call.
    threads: that decode images.
    latent_dtype: of stored latents.
    state_dtype: of stored states.
    about: description of the cache.
    members: per bucket set, `{program: record numbers}`.
    programs: number of each program.
    shared: number of the shared row by the shapes of the references.
  """

  dataset: Dataset
  models: frozen.Models
  mesh: jax.sharding.Mesh
  batch_size: int
  threads: int
  latent_dtype: jnp.dtype
  state_dtype: jnp.dtype
  about: dict
  members: list[dict[Program, np.ndarray]]
  programs: dict[Program, int]
  shared: dict[tuple[Bucket, ...], int]


@functools.partial(jax.jit, static_argnames=("vae", "dtype"))
def _latents(variables, image_BHWC, *, vae: VAE, dtype) -> jax.Array:
  """Normalised latents `[B, N, Z]` of uint8 images."""
  z = encode_images(vae, variables, image_BHWC)
  return z.reshape(z.shape[0], -1, z.shape[-1]).astype(dtype)


@functools.partial(jax.jit, static_argnames=("conditioner", "dtype"))
def _states(params, batch, *, conditioner: Conditioner, dtype) -> jax.Array:
  """States without the system turn `[B, T, C]`."""
  return conditioner.encode_text(params, batch).astype(dtype)


def _text(host: dict) -> dict:
  return {name: host[name] for name in _TEXT_FIELDS}


def _prepared(job: Producer, program: Program, i: int) -> dict | str:
  """Host arrays of one record; of a damaged one the reason."""
  try:
    record = job.dataset[i]
    images = [
      pixels(encoded, bucket, job.about["channels"])
      for encoded, bucket in zip(
        (record.target, *record.references),
        (program.target, *program.references),
        strict=True,
      )
    ]
  except InputError as error:
    return str(error)
  host = functools.partial(
    job.models.conditioner.host,
    references=images[1:], target=tuple(program.target),
  )  # fmt: skip
  texts = {"full": _text(host(record.caption))}
  if images[1:] and job.about["empty_captions"]:
    texts["empty"] = _text(host(""))
  return {
    "labels": (record.id, record.task, record.caption, record.kind),
    "images": tuple(images),
    "texts": texts,
  }


def _encode(job: Producer, images: tuple, texts: dict) -> dict:
  """Dispatches one batch; the result is still being computed.

  Args:
    job: models and dtypes.
    images: uint8 `[B, H, W, C]` of the target (or None) and the references.
    texts: arrays of the prompts by name.

  Returns:
    `{"latents": [[B, N, Z]], "states": {name: [B, T, C]}}`.
  """
  put = functools.partial(jax.device_put, device=batch_sharding(job.mesh))
  images, texts = put((images, texts))
  references = images[1:]

  def states(text, references):
    return _states(
      job.models.frozen.encoder, {**text, "references": references},
      conditioner=job.models.conditioner, dtype=job.state_dtype,
    )  # fmt: skip

  made = {name: states(text, references) for name, text in texts.items()}
  if references and "full" in texts and job.about["white_references"]:
    white = tuple(jnp.full_like(r, 255) for r in references)
    made["white"] = states(texts["full"], white)
  latents = [
    _latents(
      job.models.frozen.vae, image, vae=job.models.vae, dtype=job.latent_dtype
    )
    for image in images
    if image is not None
  ]
  return {"latents": latents, "states": made}


def _count(job: Producer, text: dict) -> int:
  """True encoder tokens after the system turn."""
  system = encoder_lib.num_system_tokens(job.models.conditioner.encoder)
  return int(text["ids_valid"].sum()) - system


def shared_row(job: Producer, shapes: tuple[Bucket, ...]) -> codec.SharedRow:
  """The condition of no caption and white references of these shapes."""
  whites = [np.full((*s, job.about["channels"]), 255, np.uint8) for s in shapes]
  text = _text(job.models.conditioner.host("", whites, _ANY_SIZE))
  images, texts = stack([((None, *whites), {"shared": text})] * job.batch_size)
  made = jax.device_get(_encode(job, images, texts))
  return codec.SharedRow(
    made["states"]["shared"][0][: _count(job, text)],
    tuple(z[0] for z in made["latents"]),
  )


def _dispatched(job: Producer, batch: list) -> dict:
  """Starts to encode `(number, host arrays)` pairs, padded to a full batch."""
  rows = [prepared for _, prepared in batch]
  rows += rows[-1:] * (job.batch_size - len(rows))
  images, texts = stack([(row["images"], row["texts"]) for row in rows])
  return _encode(job, images, texts)


def _row(
  job: Producer, program: Program, prepared: dict,
  latents: list[np.ndarray], states: dict[str, np.ndarray],
  shared: list[codec.SharedRow],
) -> codec.FeatureRow:  # fmt: skip
  """One row from its part of an encoded batch."""
  texts = prepared["texts"]
  full = states["full"][: _count(job, texts["full"])]
  number = job.shared.get(program.references, -1)
  if not program.references:
    stored = {"full": codec.after(full, shared[number].states, "shared")}
  else:
    stored = {"full": codec.States(full)}
  if "empty" in states:
    empty = states["empty"][: _count(job, texts["empty"])]
    stored["empty"] = codec.after(empty, full, "full")
  if "white" in states:
    white = states["white"][: len(full)]
    stored["white"] = codec.after(white, shared[number].states, "shared")
  return codec.FeatureRow(
    *prepared["labels"], latents[0], tuple(latents[1:]), stored, number
  )  # fmt: skip


def _batches(items: Iterator, size: int) -> Iterator[list]:
  while batch := list(itertools.islice(items, size)):
    yield batch


def _one_ahead(items: Iterator) -> Iterator:
  """Delays a stream by one, so that the device works while we write."""
  previous = next(items, None)
  for item in items:
    yield previous
    previous = item
  if previous is not None:
    yield previous


def rows(
  job: Producer,
  program: Program,
  numbers: np.ndarray,
  shared: list[codec.SharedRow],
) -> Iterator[tuple[int, bytes, bool]]:
  """Encodes records of one program.

  Args:
    job: the source and the models.
    program: shapes of these records.
    numbers: which records.
    shared: the shared rows.

  Yields:
    `(record number, serialised row, whether the record is damaged)`.
  """
  threads = job.threads
  prepared = grain.MapDataset.source(numbers.tolist()).map(
    lambda i: (i, _prepared(job, program, i))
  )
  prepared = prepared.to_iter_dataset(
    grain.ReadOptions(threads, threads + job.batch_size if threads else 0)
  )
  damaged = []

  def sound():
    for i, row in prepared:
      if isinstance(row, str):
        damaged.append((i, row))
      else:
        yield i, row

  encoded = (
    (b, _dispatched(job, b)) for b in _batches(sound(), job.batch_size)
  )
  for batch, made in _one_ahead(encoded):
    made = jax.device_get(made)
    for j, (i, row) in enumerate(batch):
      latents = [z[j] for z in made["latents"]]
      states = {name: value[j] for name, value in made["states"].items()}
      row = _row(job, program, row, latents, states, shared)
      yield i, codec.encode_row(row), False
  for i, reason in damaged:
    logging.warning("record %d is damaged: %s", i, reason)
    yield i, codec.encode_damaged(reason), True
