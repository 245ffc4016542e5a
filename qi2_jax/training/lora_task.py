# SPDX-License-Identifier: Apache-2.0
"""A task turned into one that trains a LoRA of its model."""

import dataclasses

import jax
from absl import logging

from qi2_jax.models import lora
from qi2_jax.parallel import sharding
from qi2_jax.training import adapter, program, steps, weights
from qi2_jax.training.task import Task


def adapted(
  config, task: Task, loss: steps.Loss, lora_config: adapter.LoraConfig,
  workdir: str, mesh,
) -> Task:  # fmt: skip
  """The same objective over factors on a frozen base.

  Args:
    config: of the run; `config.init` says where the base is.
    task: whose parameters are an MMDiT's.
    loss: of that task.
    lora_config: which factors.
    workdir: of the run.
    mesh: where base and factors go.

  Raises:
    InputError: as `weights.own_base`, or a target matches no kernel.
  """
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  # Bad targets are found before the base is read.
  fresh = jax.eval_shape(
    lambda: adapter.init_factors(lora_config, abstract, jax.random.key(0))
  )
  base = weights.own_base(
    config.init, workdir, sharding.on_mesh(abstract, task.rules, mesh)
  )
  logging.info(
    "training a LoRA of rank %d: %d kernels of the frozen %s",
    lora_config.rank, len(jax.tree.leaves(fresh)) // 2, config.init,
  )  # fmt: skip

  loss = adapter.lora_loss(loss, lora_config)
  start, step = program.gradient_training(config, loss)
  return dataclasses.replace(
    task,
    init=lambda key: adapter.init_factors(lora_config, abstract, key),
    start=start,
    rules=lora.SHARDING_RULES,
    encode=lambda s, batch: task.encode(s, batch) | {steps.FROZEN: base},
    step=step,
    loss=loss,
    preview=lambda ema, samples: task.preview(
      adapter.merged(lora_config, base, ema), samples
    ),
  )
