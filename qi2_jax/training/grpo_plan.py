# SPDX-License-Identifier: Apache-2.0
"""Rollout and update of Flow-GRPO as programs, without weights or data.

The counterpart of `program.lower_step`, which is of flow matching. The two
run one after the other on the same chips. The frozen VAE and the text encoder
lie there too; no plan has them.

Shapes: P prompts of a step, K images of a prompt, B = P K images.
"""

import math

import jax
import jax.numpy as jnp

from qi2_jax.models import mmdit_flops
from qi2_jax.parallel import sharding
from qi2_jax.training import (
  adapter,
  grpo_loss,
  grpo_task,
  program,
  rollout,
  rollout_encode,
  steps,
  weights,
)


def images(config) -> int:
  """B of a config: images of one step."""
  return config.data.batch_size // config.rl.candidates * config.rl.group


def _rows(count: int, example, mesh):
  """`example` with `count` rows, split over the mesh."""
  place = sharding.batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (count, *x.shape[1:]), x.dtype, sharding=place
    ),
    example,
  )


class _Run:
  """What both programs of a config share, all of it abstract."""

  def __init__(self, config, mesh, references: int):
    """Raises InputError for a config that could not be trained."""
    rollout_encode.check(config, mesh)
    self.config, self.mesh, self.references = config, mesh, references
    self.lora = adapter.from_config(config)
    self.module = program.planned_module(config, mesh)
    start, self.step = grpo_task.training(config, self.module, self.lora)
    self.state = program.abstract_state(
      adapter.trained(self.module, self.lora), start,
      adapter.rules(self.lora), mesh,
    )  # fmt: skip
    whole = weights.placed(self.module, mesh)
    self.base = whole if self.lora else None
    self.parameters = program.elements(whole)
    example = program.largest_features(config, self.module, references, mesh)
    self.tokens = program.tokens_of(example)
    self.condition = example["condition"]
    self.how = grpo_task.rollout_config(config)
    self.sample = rollout.program(
      self.how, self.module, grpo_task.policy(self.lora)
    )

  def arguments(self, prompts: int):
    """Of the rollout of so many prompts."""
    condition = _rows(prompts, self.condition, self.mesh)
    pair = self.state.params, self.base
    return pair, condition, condition, program.abstract_key(self.mesh)

  def features(self) -> dict:
    """Of one step, as `Rollouts` makes them."""
    count, prompts = images(self.config), images(self.config) // self.how.group

    def made(*arguments):
      return rollout.features(*self.sample(*arguments))

    with jax.set_mesh(self.mesh):
      rows = jax.eval_shape(made, *self.arguments(prompts))
    rows = {
      name: _rows(prompts if name == rollout.PROBE else count, x, self.mesh)
      for name, x in rows.items()
    }
    if self.config.rl.kl_weight:
      states = rows["states_BWNZ"]
      size = (count, states.shape[1] - 1, *states.shape[2:])
      rows["reference_BWNZ"] = _rows(
        count, jax.ShapeDtypeStruct(size, jnp.float32), self.mesh
      )
    value = _rows(count, jax.ShapeDtypeStruct((count,), jnp.float32), self.mesh)
    section = self.config.rewards
    named = [f"reward_{n}" for n in (*section.use, *section.judges)]
    log = dict.fromkeys((*named, "zero_variance", "failed_rewards"), value)
    rows |= {"advantage_B": value, "weight_B": value, grpo_loss.LOG: log}
    return rows | ({steps.FROZEN: self.base} if self.lora else {})

  @property
  def factors(self) -> int:
    """Elements of the LoRA; 0 without one."""
    return program.elements(self.state.params) if self.lora else 0

  def facts(self) -> dict:
    """Plain values that both plans report."""
    return {
      "parameters": self.parameters,
      "trained_parameters": program.elements(self.state.params),
      "bucket": list(program.largest_bucket(self.config)),
      "references": self.references,
      "tokens": {"prefix": self.tokens.prefix, "target": self.tokens.target},
      "global_batch": images(self.config),
      "prompts": images(self.config) // self.how.group,
      "mesh": dict(self.mesh.shape),
      "remat": self.module.config.remat,
      "kernel": self.module.config.kernel,
    }


def _bytes_per_chip(tree) -> float:
  """Of abstract arrays, as their shardings split them."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def lower_rollout(config, mesh, references: int = 0, platforms=("tpu",)):
  """Lowers the rollout of one of `config.rl.parts`.

  Args:
    config: of a `flow_grpo` stage. `config.init` may be any name: nothing is
      read.
    mesh: over the devices of a topology.
    references: reference images per prompt, of the bucket's size.
    platforms: what to lower for.

  Returns:
    `(lowered, facts)`: facts are plain values about what was lowered.

  Raises:
    InputError: as `rollout_encode.check`.
  """
  run = _Run(config, mesh, references)
  how, parts = run.how, config.rl.parts
  rows = images(config) // parts
  work = rows * (1 + how.guided) * mmdit_flops.sampling_flops(
    run.module.config, run.tokens, how.steps, run.factors
  )  # fmt: skip
  with jax.set_mesh(mesh):
    lowered = run.sample.trace(*run.arguments(rows // how.group)).lower(
      lowering_platforms=platforms
    )
  beside = _bytes_per_chip((run.state.ema, run.state.opt_state))
  return lowered, run.facts() | {
    "accumulate": parts,
    "batch_per_chip": rows / mesh.size,
    # The window is drawn: the two loops of Euler steps around it have a known
    # sum of lengths only.
    "unknown_trips": (how.steps - how.window) / 2,
    "gib_beside": beside / 2**30,
    "analytic_flops_per_step": work,
    "model_flops_per_step": work,
  }


def lower_step(config, mesh, references: int = 0, platforms=("tpu",)):
  """Lowers the update of a rollout; as `lower_rollout`."""
  run = _Run(config, mesh, references)
  count, model = images(config) * run.how.window, run.module.config
  if run.how.hybrid == "full":
    count *= 2  # Both branches are differentiated.
  if run.lora:
    work = mmdit_flops.adapter_step_flops(
      model, run.tokens, count, run.factors
    )  # fmt: skip
  else:
    work = mmdit_flops.step_flops(model, run.tokens, count)
  lowered = program.lower(run.step, run.state, run.features(), mesh, platforms)
  parts = config.optimizer.accumulate * config.rl.updates
  return lowered, run.facts() | {
    "accumulate": parts,
    "batch_per_chip": images(config) / parts / mesh.size,
    "analytic_flops_per_step": work.executed,
    "model_flops_per_step": work.model,
  }
