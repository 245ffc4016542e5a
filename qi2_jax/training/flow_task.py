# SPDX-License-Identifier: Apache-2.0
"""The task of training the MMDiT, or a LoRA of it, by flow matching."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from qi2_jax.conditioning.conditioner import (
  Conditioner,
  encode_images,
  to_uint8,
)
from qi2_jax.evaluation.images import grid
from qi2_jax.flow.generate import Generator, Request
from qi2_jax.models import mmdit
from qi2_jax.training import (
  adapter,
  build,
  cached,
  frozen,
  lora_task,
  program,
)
from qi2_jax.training.task import Sample, Task


def flow_task(config, workdir: str, mesh) -> Task:
  """Flow matching of the MMDiT, or of a LoRA of it, on T2I and edits."""
  lora_config = adapter.from_config(config)
  models = frozen.load(config, workdir, mesh)
  loss = program.flow_loss(config, models.module)
  start, step = program.gradient_training(config, loss)
  task = Task(
    functools.partial(mmdit.init_params, models.module), start,
    mmdit.SHARDING_RULES, flow_transform(models.conditioner, config.data),
    _encode(models), step, flow_preview(models, config),
    lambda ema, batches: None, lambda: cached.signature(models), loss=loss,
    conditioner=models.conditioner,
  )  # fmt: skip
  if lora_config is None:
    return task
  return lora_task.adapted(config, task, loss, lora_config, workdir, mesh)


def _encode(models: frozen.Models) -> Callable:
  """`Task.encode` of the flow task."""
  module, conditioner = models.vae, models.conditioner

  @jax.jit
  def encode(parameters, batch):
    if cached.is_cached(batch):
      return cached.features(batch)
    latents = encode_images(module, parameters.vae, batch["image"])
    latents = latents.reshape(latents.shape[0], -1, latents.shape[-1])
    condition = conditioner.encode(parameters, batch)
    return {"latents_BNZ": latents, "condition": condition}

  return lambda _, batch: encode(models.frozen, batch)


def flow_transform(conditioner: Conditioner, config) -> Callable:
  """`Task.transform` of every task on images; `config` is `config.data`."""

  rates = {
    "caption_dropout": config.caption_dropout,
    "reference_dropout": config.reference_dropout,
  }

  def transform(sample: Sample, rng: np.random.Generator):
    if cached.is_cached(sample):
      return cached.host(conditioner, sample, *draw_drops(rng, **rates))
    caption, references = drop_condition(
      sample["caption"], sample["references"], rng, **rates
    )
    size = sample["image"].shape[:2]
    host = conditioner.host(
      caption, references, size, sample.get("text_length")
    )
    return {"image": sample["image"], **host}

  return transform


def draw_drops(
  rng: np.random.Generator, *, caption_dropout: float, reference_dropout: float
) -> tuple[bool, bool]:
  """Whether a sample loses its caption, and its references."""
  # Always both draws: which captions are dropped does not depend on whether
  # references are.
  no_caption = rng.random() < caption_dropout
  return no_caption, rng.random() < reference_dropout


def drop_condition(
  caption: str, references: Sequence[np.ndarray], rng: np.random.Generator, *,
  caption_dropout: float, reference_dropout: float,
) -> tuple[str, tuple[np.ndarray, ...]]:  # fmt: skip
  """Drops the caption, and all reference images, each with its probability.

  A dropped reference becomes opaque white in its own size: the batch keeps
  its shape, so that no other program is compiled, and "no image" is an input
  that a sampler can give. The report drops text only; this is ours.

  Args:
    caption: text of the sample.
    references: uint8 `[h, w, C]`.
    rng: of the sample.
    caption_dropout: probability of an empty caption.
    reference_dropout: probability of white references.
  """
  no_caption, no_references = draw_drops(
    rng, caption_dropout=caption_dropout, reference_dropout=reference_dropout
  )
  if no_references:
    references = [np.full_like(r, 255) for r in references]
  return "" if no_caption else caption, tuple(references)


def flow_preview(models: frozen.Models, config) -> Callable:
  """`Task.preview` of every task that trains an MMDiT."""
  generator = Generator(models.module, models.conditioner)
  sampling = build.sampling_config(config)

  def preview(ema, samples: Sequence[Sample]):
    requests = [
      Request(s["caption"], s["references"], *s["image"].shape[:2], seed=i)
      for i, s in enumerate(samples)
    ]
    made = generator(ema, models.frozen, requests, sampling)
    made = [to_uint8(image) for image in made]
    rows = []
    for sample, image in zip(samples, made):
      rows += [*sample["references"], image]
    return {"samples": grid(rows, columns=8)}

  return preview
