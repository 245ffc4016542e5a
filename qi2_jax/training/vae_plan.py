# SPDX-License-Identifier: Apache-2.0
"""The VAE's step as a program, without weights or data.

The counterpart of `program.lower_step`, which is of flow matching.
"""

import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.models import vae
from qi2_jax.parallel import sharding
from qi2_jax.training import (
  build,
  program,
  steps,
  vae_build,
  vae_state,
  vae_task,
)


def lower_step(config, mesh, references: int = 0, platforms=("tpu",)):
  """Lowers the step of a VAE run for its largest bucket.

  Args:
    config: of a VAE stage. No file is read: `config.init` and the paths of
      the frozen networks may be any.
    mesh: over the devices of a topology.
    references: must be 0.
    platforms: what to lower for.

  Returns:
    `(lowered, facts)`: facts are plain values about what was lowered.

  Raises:
    InputError: the recipe contradicts itself, or batch or rows do not divide
      over the mesh.
  """
  if references:
    raise InputError("a VAE's step has no reference images; drop --references.")
  batch, parts = config.data.batch_size, config.optimizer.accumulate
  steps.check_batch(batch, parts, mesh)
  module = build.new_vae(config.vae)
  start, step, frozen = vae_task.training(
    config, module, mesh, vae_build.planned_recipe
  )

  def init(key):
    return vae.init_variables(module, key)["params"]

  state = program.abstract_state(init, start, vae_state.SHARDING_RULES, mesh)
  bucket = program.largest_bucket(config)
  image = jax.ShapeDtypeStruct(
    (batch, *bucket, module.config.image_channels), jnp.float32,
    sharding=sharding.batch_sharding(mesh),
  )  # fmt: skip
  trained, _ = vae_state.split(state.params, config.trainable)
  features = {"image": image} | frozen
  return program.lower(step, state, features, mesh, platforms), {
    "parameters": program.elements(state.params),
    "trained_parameters": program.elements(trained),
    "frozen_parameters": program.elements(frozen),
    "bucket": list(bucket),
    "references": 0,
    "global_batch": batch,
    "accumulate": parts,
    "batch_per_chip": batch / parts / mesh.size,
    "mesh": dict(mesh.shape),
    "remat": module.config.remat,
  }  # fmt: skip
