# SPDX-License-Identifier: Apache-2.0
"""The task of training the VAE."""

from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from qi2_jax.conditioning.conditioner import to_uint8, to_unit
from qi2_jax.evaluation.images import grid
from qi2_jax.interop import model_folder
from qi2_jax.models import vae
from qi2_jax.objectives.vae import latent_statistics
from qi2_jax.parallel import distributed
from qi2_jax.parallel.sharding import put_batch
from qi2_jax.training import adapter, build, program, steps
from qi2_jax.training.task import Sample, Task


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

  loss = steps.vae_loss_fn(module, smoothing=config.l1_smoothing)
  start, step = program.gradient_training(config, loss)
  return Task(
    init, start, vae.SHARDING_RULES, transform, lambda _, batch: encode(batch),
    step, preview, finish,
  )  # fmt: skip
