# SPDX-License-Identifier: Apache-2.0
"""The task of on-policy distillation: guided teachers into one student.

Every batch has one teacher, that of its task: the first for text to image,
the last for edits. The student walks without guidance and learns the guided
velocity of the teacher at every state of its walk.

Shapes: B images, S steps, N tokens, Z channels; rows of steps have B S
entries, image 0's first.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.flow import sampler
from qi2_jax.models import mmdit
from qi2_jax.objectives import opd
from qi2_jax.training import (
  adapter,
  build,
  flow_task,
  frozen,
  grpo_loss,
  program,
  prompts,
  rollout,
  steps,
  teachers,
  weights,
)
from qi2_jax.training.task import Task

# Keeps the walk's randomness apart from that of the step.
_STREAM = 0x0BD


def loss(module: mmdit.MMDiT) -> steps.Loss:
  """Velocity error at the states of a walk, see `objectives.opd`."""

  def mean(params, rows):
    at = grpo_loss.transitions(rows)
    count = rows["sigmas_BW"].shape[1] - 1
    v = module.apply(
      {"params": params}, at.x, at.sigma_B,
      grpo_loss.per_step(rows["condition"], count),
    )  # fmt: skip
    each = opd.velocity_loss(v, rows["teacher_BWNZ"].reshape(v.shape))
    return jnp.mean(each), {}

  return steps.Loss(lambda rows, key: rows, mean)


@functools.partial(jax.jit, static_argnames="module")
def teacher_velocities(params, rows, negative, guidance, *, module):
  """The teacher's guided velocity at every state `[B, S, N, Z]`.

  Args:
    params: of the teacher.
    rows: `states_BWNZ`, `sigmas_BW` and `condition`.
    negative: condition of the empty prompts, B rows.
    guidance: w.
    module: the network.
  """
  at = grpo_loss.transitions(rows)
  count = rows["sigmas_BW"].shape[1] - 1
  c, u = (
    module.apply(
      {"params": params}, at.x, at.sigma_B, grpo_loss.per_step(cond, count)
    )
    for cond in (rows["condition"], negative)
  )
  v = sampler.guide(c.astype(jnp.float32), u.astype(jnp.float32), guidance)
  return v.reshape(-1, count, *v.shape[1:])


def encoder(config, models: frozen.Models, params: list) -> Callable:
  """`Task.encode`: the student's walk and what its teacher says of it.

  Args:
    config: of the run.
    models: its frozen models.
    params: of the teachers.
  """
  how = rollout.OdeConfig(
    1, config.opd.steps, False, build.shift_config(config.flow.shift)
  )
  walk = rollout.ode_program(how, models.module, lambda trained: trained)
  encode = prompts.encoder(models)
  root = jax.random.fold_in(jax.random.key(config.seed), _STREAM)

  def features(train_state, batch):
    found = encode(batch)
    key = jax.random.fold_in(root, train_state.step)
    walked, _ = walk(train_state.params, found["condition"], key)
    rows = {
      "states_BWNZ": walked.states, "sigmas_BW": walked.sigmas,
      "condition": found["condition"],
    }  # fmt: skip
    edits = len(batch["prompt"]["references"]) > 0
    v = teacher_velocities(
      params[-1 if edits else 0], rows, found["negative"],
      jnp.float32(config.opd.guidance), module=models.module,
    )  # fmt: skip
    return rows | {"teacher_BWNZ": v}

  return features


def check(config) -> None:
  """Raises InputError for a run that cannot start; reads no model."""
  adapter.from_config(config)  # says that a LoRA is not trained here
  if not config.init:
    raise InputError(
      "on-policy distillation needs a student: pass --config.init, a workdir "
      "or a pipeline folder."
    )
  if not 1 <= len(config.opd.teachers) <= 2:
    raise InputError(
      "config.opd.teachers needs one workdir, or two: of text to image and of "
      f"edits; it has {len(config.opd.teachers)}."
    )


def opd_task(config, workdir: str, mesh) -> Task:
  """On-policy distillation of one or two teachers into an MMDiT."""
  check(config)
  models = frozen.load(config, workdir, mesh)
  placed = weights.placed(models.module, mesh)
  params = teachers.load(tuple(config.opd.teachers), workdir, placed)
  start, step = program.gradient_training(config, loss(models.module))
  return Task(
    functools.partial(mmdit.init_params, models.module), start,
    mmdit.SHARDING_RULES, prompts.transform(models.conditioner),
    encoder(config, models, params), step,
    flow_task.flow_preview(models, config), lambda ema, batches: None,
    conditioner=models.conditioner,
  )  # fmt: skip
