# SPDX-License-Identifier: Apache-2.0
"""The step of a distillation as a program, without weights or data.

The counterpart of `program.lower_step`, which is of flow matching.
"""

import jax
import jax.numpy as jnp

from qi2_jax.models import mmdit
from qi2_jax.parallel import sharding
from qi2_jax.training import (
  adapter,
  dmd_step,
  dmd_task,
  program,
  steps,
  weights,
)


def abstract_features(config, module: mmdit.MMDiT, references: int, mesh):
  """Features of the largest bucket, as `dmd_task` encodes them.

  Args:
    config: of the run.
    module: of student, fake score and teachers.
    references: reference images per sample, of the bucket's size.
    mesh: where they lie.
  """
  batch = config.data.batch_size
  rows = program.largest_features(config, module, references, mesh)
  category = jax.ShapeDtypeStruct(
    (batch,), jnp.int32, sharding=sharding.batch_sharding(mesh)
  )
  whole = weights.placed(module, mesh)
  frozen = {dmd_step.TEACHERS: [whole] * len(dmd_task.teacher_paths(config))}
  if config.lora.rank:
    frozen[dmd_step.BASE] = whole
  features = {
    "condition": rows["condition"], "negative": rows["condition"],
    "category_B": category, steps.FROZEN: frozen,
  }  # fmt: skip
  if dmd_task.settings(config).gan:
    features["target_BNZ"] = rows["latents_BNZ"]
  return features


def lower_step(config, mesh, references: int = 0, platforms=("tpu",)):
  """Lowers the step of a distillation.

  Args:
    config: of a `dmd` stage. `config.init` may be any name: nothing is read.
    mesh: over the devices of a topology.
    references: reference images per sample, of the bucket's size.
    platforms: what to lower for.

  Returns:
    `(lowered, facts)`: facts are plain values about what was lowered.

  Raises:
    InputError: as `dmd_task.check`.
  """
  dmd_task.check(config, mesh)
  lora_config = adapter.from_config(config)
  module = program.planned_module(config, mesh)
  start, step = dmd_task.training(config, module, lora_config)
  state = program.abstract_state(
    adapter.trained(module, lora_config), start,
    dmd_task.rules(lora_config), mesh,
  )  # fmt: skip
  features = abstract_features(config, module, references, mesh)
  teachers = features[steps.FROZEN][dmd_step.TEACHERS]
  batch = config.data.batch_size // (config.dmd.ratio + 1)
  return program.lower(step, state, features, mesh, platforms), {
    "parameters": program.elements(teachers[0]),
    "trained_parameters": program.elements(state.params),
    "teachers": len(teachers),
    "references": references,
    "global_batch": config.data.batch_size,
    "batch_per_update": batch,
    "bucket": list(program.largest_bucket(config)),
    "accumulate": 1,
    "batch_per_chip": batch / mesh.size,
    "mesh": dict(mesh.shape),
    "remat": module.config.remat,
    "kernel": module.config.kernel,
  }
