# SPDX-License-Identifier: Apache-2.0
"""What each objective plugs into the one loop.

A task turns a config into functions: how a loader sample becomes a host
batch, how a batch becomes features, the loss, and the pictures to look at.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging

from qi2_jax.conditioning.conditioner import (
  Conditioner,
  Frozen,
  encode_images,
  to_uint8,
  to_unit,
)
from qi2_jax.evaluation.images import grid
from qi2_jax.flow.generate import Generator, Request
from qi2_jax.interop import model_folder
from qi2_jax.models import mmdit, vae
from qi2_jax.objectives.vae import latent_statistics
from qi2_jax.parallel import distributed
from qi2_jax.parallel.sharding import put_batch
from qi2_jax.training import (
  adapter,
  build,
  checkpoints,
  lora_task,
  program,
  steps,
)

Sample = dict


@dataclasses.dataclass(frozen=True)
class Task:
  """The parts of one objective.

  Attributes:
    init: `key -> params`.
    rules: sharding rules of the parameters.
    transform: `(sample, rng) -> dict of arrays`, in loader threads.
    encode: `host batch on the mesh -> features`.
    loss: `loss(params, features, key) -> (scalar, metrics)`.
    preview: `(ema, samples) -> {name: uint8 grid}`.
    finish: `(ema, batches) -> None`, after the last step.
  """

  init: Callable
  rules: tuple
  transform: Callable
  encode: Callable
  loss: steps.Loss
  preview: Callable
  finish: Callable


def vae_task(config, workdir: str, mesh) -> Task:
  """Reconstruction training of the VAE."""
  adapter.from_config(config)  # refuses a LoRA
  module = build.new_vae(config.vae)

  def init(key):
    return vae.init_variables(module, key)["params"]

  def transform(sample: Sample, rng):
    del rng
    return {"image": sample["image"]}

  @jax.jit
  def encode(batch):
    return {"image": to_unit(batch["image"])}

  @jax.jit
  def reconstruct(params, image):
    stats = vae.identity_stats(module.config.z_dim)
    variables = {"params": params, "latent_stats": stats}
    out, mean, _ = module.apply(variables, image)
    return out, latent_statistics(mean)

  def preview(ema, samples: Sequence[Sample]):
    shape = samples[0]["image"].shape
    images = [s["image"] for s in samples if s["image"].shape == shape]
    out, _ = reconstruct(ema, to_unit(np.stack(images)))
    both = [*images, *to_uint8(distributed.to_host(out))]
    return {"reconstruction": grid(both, columns=len(images))}

  def finish(ema, batches):
    moments = [
      reconstruct(ema, encode(put_batch(next(batches), mesh))["image"])[1]
      for _ in range(config.latent_stat_batches)
    ]
    moments = distributed.to_host(moments)
    mean, square = (np.mean([m[i] for m in moments], axis=0) for i in (0, 1))
    std = np.sqrt(np.maximum(square - mean**2, 1e-12))
    params = distributed.to_host(ema)
    variables = {
      "params": params, "latent_stats": {"mean": mean, "std": std},
    }  # fmt: skip
    path = f"{workdir}/vae"
    distributed.on_first(
      lambda: model_folder.save_vae(path, module.config, variables)
    )
    logging.info("wrote the VAE and its latent statistics to %s", path)

  return Task(
    init, vae.SHARDING_RULES, transform, encode,
    steps.vae_loss_fn(module, smoothing=config.l1_smoothing), preview, finish,
  )  # fmt: skip


def flow_task(config, workdir: str, mesh) -> Task:
  """Flow matching of the MMDiT, or of a LoRA of it, on T2I and edits."""
  lora_config = adapter.from_config(config)
  vae_module, vae_variables = _own_vae(config, workdir)
  conditioner, encoder_params = build.conditioner(config.text, vae_module, mesh)
  frozen = Frozen(
    vae=jax.device_put(
      # A restored VAE lies on devices; they may be another process's.
      distributed.to_host(vae_variables),
      jax.NamedSharding(mesh, jax.P()),
    ),
    encoder=encoder_params,
  )
  module = mmdit.MMDiT(
    build.mmdit_config(
      config.model, vae_module.config.z_dim, conditioner.encoder.width
    )
  )

  @jax.jit
  def encode(frozen, batch):
    latents = encode_images(vae_module, frozen.vae, batch["image"])
    latents = latents.reshape(latents.shape[0], -1, latents.shape[-1])
    condition = conditioner.encode(frozen, batch)
    return {"latents_BNZ": latents, "condition": condition}

  loss = program.flow_loss(config, module)
  task = Task(
    functools.partial(mmdit.init_params, module), mmdit.SHARDING_RULES,
    _flow_transform(conditioner, config.data),
    functools.partial(encode, frozen), loss,
    _flow_preview(Generator(module, conditioner), frozen, config),
    lambda ema, batches: None,
  )  # fmt: skip
  if lora_config is None:
    return task
  return lora_task.adapted(task, lora_config, config.init, workdir, mesh)


def _flow_transform(conditioner: Conditioner, config) -> Callable:
  """`Task.transform` of the flow task; `config` is `config.data`."""

  def transform(sample: Sample, rng: np.random.Generator):
    caption, references = drop_condition(
      sample["caption"], sample["references"], rng,
      caption_dropout=config.caption_dropout,
      reference_dropout=config.reference_dropout,
    )  # fmt: skip
    size = sample["image"].shape[:2]
    host = conditioner.host(caption, references, size)
    return {"image": sample["image"], **host}

  return transform


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
  # Always both draws: which captions are dropped does not depend on whether
  # references are.
  no_caption = rng.random() < caption_dropout
  no_references = rng.random() < reference_dropout
  if no_references:
    references = [np.full_like(r, 255) for r in references]
  return "" if no_caption else caption, tuple(references)


def _flow_preview(generator: Generator, frozen: Frozen, config) -> Callable:
  """`Task.preview` of the flow task."""
  sampling = build.sampling_config(config)

  def preview(ema, samples: Sequence[Sample]):
    requests = [
      Request(s["caption"], s["references"], *s["image"].shape[:2], seed=i)
      for i, s in enumerate(samples)
    ]
    made = generator(ema, frozen, requests, sampling)
    made = [to_uint8(image) for image in made]
    rows = []
    for sample, image in zip(samples, made):
      rows += [*sample["references"], image]
    return {"samples": grid(rows, columns=8)}

  return preview


def _own_vae(config, workdir: str):
  """The run's VAE. The workdir keeps a copy from its first start.

  A workdir can thus be sampled from anywhere, and a resumed run keeps its
  latents even if `config.vae.path` was trained on.
  """
  if checkpoints.has_checkpoint(workdir):
    return build.load_vae(workdir, config.vae.dtype)
  module, variables = build.frozen_vae(config.vae)
  whole = distributed.to_host(variables)
  distributed.on_first(
    lambda: model_folder.save_vae(f"{workdir}/vae", module.config, whole)
  )
  return module, variables


TASKS = {"vae": vae_task, "flow_matching": flow_task}
