# SPDX-License-Identifier: Apache-2.0
"""A task turned into one that trains a LoRA of its model."""

import dataclasses

import jax
from absl import logging

from qi2_jax.models import lora
from qi2_jax.parallel.sharding import tree_shardings
from qi2_jax.training import adapter, steps, weights


def adapted(
  task, lora_config: adapter.LoraConfig, init: str, workdir: str, mesh
):
  """The same objective over factors on a frozen base.

  Args:
    task: a `tasks.Task` whose parameters are an MMDiT's.
    lora_config: which factors.
    init: `config.init`, where the base is.
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
  base = weights.own_base(init, workdir, _on_mesh(abstract, task.rules, mesh))
  logging.info(
    "training a LoRA of rank %d: %d kernels of the frozen %s",
    lora_config.rank, len(jax.tree.leaves(fresh)) // 2, init,
  )  # fmt: skip

  @jax.jit
  def merged(base, factors):
    return lora.merge(base, adapter.to_lora(lora_config, factors))

  return dataclasses.replace(
    task,
    init=lambda key: adapter.init_factors(lora_config, abstract, key),
    rules=lora.SHARDING_RULES,
    encode=lambda batch: task.encode(batch) | {steps.FROZEN: base},
    loss=adapter.lora_loss(task.loss, lora_config),
    preview=lambda ema, samples: task.preview(merged(base, ema), samples),
  )


def _on_mesh(abstract, rules, mesh):
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    abstract, tree_shardings(abstract, rules, mesh),
  )  # fmt: skip
