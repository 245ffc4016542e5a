# SPDX-License-Identifier: Apache-2.0
"""The task of training the VAE."""

import os
from collections.abc import Callable, Sequence

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
from qi2_jax.training import (
  adapter,
  build,
  checkpoints,
  program,
  steps,
  vae_build,
  vae_loss,
  vae_state,
)
from qi2_jax.training.task import Sample, Task


def source(config) -> dict:
  """What a run keeps of the VAE folder that it starts from.

  The temporal kernels (`carried`), if the folder has them, so that an export
  is as complete as the original; and the latent statistics, unless the
  encoder is trained and changes them. A workdir without a finished VAE has
  neither.

  Raises:
    InputError: `config.init` is gone or holds no VAE. A run needs it to its
      end.
  """
  path = config.init
  if not path or (
    checkpoints.has_checkpoint(path)
    and not os.path.isdir(os.path.join(path, "vae"))
  ):
    return {}
  _, variables = model_folder.load_vae(path)
  names = ["carried"]
  if config.get("trainable") == "decoder":
    names.append("latent_stats")
  return distributed.to_host({n: variables[n] for n in names if n in variables})


def training(config, module, mesh, recipe: Callable = vae_build.recipe):
  """`(params -> state, step, frozen features)` of a run.

  Args:
    config: of the run.
    module: the VAE.
    mesh: where the frozen parameters go.
    recipe: or `vae_build.planned_recipe`, which reads nothing.

  Raises:
    InputError: as `recipe`.
  """
  if vae_build.is_plain(config):
    vae_build.check_rows(config, module.config.factor, mesh)
    loss = vae_loss.plain_l1(module, smoothing=config.l1_smoothing)
    return *program.gradient_training(config, loss), {}
  made, frozen = recipe(config, module, mesh)
  return *vae_build.training(config, made), {steps.FROZEN: frozen}


def vae_task(config, workdir: str, mesh) -> Task:
  """Training of the VAE: L1 alone, or the recipe of `config.loss`."""
  adapter.from_config(config)  # refuses a LoRA
  module = build.new_vae(config.vae)
  kept = source(config)
  start, step, frozen = training(config, module, mesh)

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
    variables = {
      "params": distributed.to_host(ema),
      "latent_stats": {"mean": mean, "std": std},
    }
    path = f"{workdir}/vae"
    distributed.on_first(
      lambda: model_folder.save_vae(path, module.config, variables | kept)
    )
    logging.info("wrote the VAE and its latent statistics to %s", path)

  return Task(
    init, start, vae_state.SHARDING_RULES, transform,
    lambda _, batch: encode(batch) | frozen, step, preview, finish,
  )  # fmt: skip
