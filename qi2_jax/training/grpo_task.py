# SPDX-License-Identifier: Apache-2.0
"""The task of Flow-GRPO: rollout, rewards and update in one process."""

import functools
from collections.abc import Callable, Mapping

import jax
from absl import logging

from qi2_jax.flow import sde
from qi2_jax.models import lora, mmdit
from qi2_jax.objectives import flow_grpo
from qi2_jax.rewards import protocol
from qi2_jax.training import (
  adapter,
  build,
  flow_task,
  frozen,
  grpo_loss,
  optimizer,
  rollout,
  rollout_encode,
  rollout_rewards,
  state,
  steps,
  weights,
)
from qi2_jax.training.task import Task


def rollout_config(config) -> rollout.RolloutConfig:
  """`config.rl` and the shift of the run.

  Raises:
    InputError: a field without meaning.
  """
  section = config.rl
  return rollout.RolloutConfig(
    group=section.group, steps=section.steps, guidance=section.guidance,
    hybrid=section.hybrid, kernel=sde.Kernel(section.kernel, section.level),
    window=section.window, window_low=section.window_low,
    window_high=section.window_high, shared_noise=section.shared_noise,
    shift=build.shift_config(config.flow.shift),
  )  # fmt: skip


def surrogate_config(config) -> flow_grpo.GrpoConfig:
  """`config.rl` as the surrogate's own dataclass."""
  section = config.rl
  return flow_grpo.GrpoConfig(
    clip=section.clip, kl_weight=section.kl_weight, kl=section.kl,
    guard=section.guard,
  )  # fmt: skip


def policy(lora_config: adapter.LoraConfig | None) -> Callable:
  """`(trained, base) -> params` as one argument; without a LoRA base is None.

  The base is an argument of every program: one that closes over it would hold
  it as a constant.
  """
  return lambda pair: adapter.attached(lora_config, pair[1])(pair[0])


def training(
  config, module: mmdit.MMDiT, lora_config: adapter.LoraConfig | None
) -> tuple[Callable, Callable]:  # fmt: skip
  """What a run starts from and its step, as programs without weights.

  Args:
    config: of the run.
    module: the network.
    lora_config: of a policy that is a LoRA.

  Returns:
    `(params -> state, step)`, see `task.Task`.
  """
  how = rollout_config(config)
  loss = grpo_loss.loss(surrogate_config(config), how, module)

  def params_of(trained, features):
    return policy(lora_config)((trained, features.get(steps.FROZEN)))

  def old(trained, features):
    rows, _ = steps.rows_of(features)
    with lora.beside_kernels():
      return grpo_loss.score(how, module, params_of(trained, features), rows)

  if lora_config:
    loss = adapter.lora_loss(loss, lora_config)
  updates = config.rl.updates
  tx = optimizer.create(config.optimizer, config.num_steps * updates)
  step = grpo_loss.make_step(
    loss, tx, config.ema_decay, config.optimizer.accumulate, updates, old
  )
  step = grpo_loss.with_drift(step, module, params_of)
  return functools.partial(state.create, optimizer=tx), step


@functools.partial(jax.jit, static_argnames=("how", "module"))
def _reference_means(params, rows, *, how, module):
  """Means of the trained steps under the reference model `[B, W, N, Z]`."""
  found = grpo_loss.score(how, module, params, rows)
  return grpo_loss.old_fields(found, len(rows["sigmas_BW"]))["old_mean_BWNZ"]


def rollouts(
  config, module: mmdit.MMDiT, lora_config: adapter.LoraConfig | None, base,
  reference,
) -> tuple[Callable, Callable]:  # fmt: skip
  """`run` and `finish` of `rollout_encode.Rollouts`.

  Args:
    config: of the run.
    module: the network.
    lora_config: of a policy that is a LoRA.
    base: its frozen weights, else None.
    reference: parameters of the reference model, or None for no penalty.
  """
  how = rollout_config(config)
  sample = rollout.program(how, module, policy(lora_config))

  def run(train_state, condition, negative, key):
    pair = train_state.params, base
    walk, own = sample(pair, condition, negative, key)
    return walk.x0, rollout.features(walk, own)

  def finish(train_state, rows, key):
    del train_state, key
    if reference is not None:
      means = _reference_means(reference, rows, how=how, module=module)
      rows["reference_BWNZ"] = means
    return rows

  return run, finish


def grpo_task(
  config, workdir: str, mesh, rewards: Mapping[str, protocol.Score]
) -> Task:
  """Flow-GRPO of the MMDiT, or of a LoRA of it, on T2I and edits.

  Args:
    config: of the run.
    workdir: of the run.
    mesh: where everything lives.
    rewards: those that need no model, by name.
  """
  rollout_encode.check(config, mesh)
  lora_config = adapter.from_config(config)
  judge = rollout_rewards.judge(config.rewards, rewards)
  models = frozen.load(config, workdir, mesh)
  start, step = training(config, models.module, lora_config)
  placed = weights.placed(models.module, mesh)
  base = reference = None
  if lora_config:
    base = weights.own_base(config.init, workdir, placed)
  if config.rl.kl_weight:
    reference = base or weights.initial_params(config.init, placed)
  run = rollout_encode.Rollouts(
    config, models, judge,
    *rollouts(config, models.module, lora_config, base, reference), mesh,
  )  # fmt: skip
  logging.info(
    "rollout: %d images of each prompt in %d steps, %d of them trained, "
    "guidance %s", config.rl.group, config.rl.steps, config.rl.window,
    f"{config.rl.guidance} ({config.rl.hybrid})",
  )  # fmt: skip
  extra = {steps.FROZEN: base} if lora_config else {}
  preview = flow_task.flow_preview(models, config)
  return Task(
    adapter.trained(models.module, lora_config), start,
    adapter.rules(lora_config),
    rollout_encode.transform(models.conditioner),
    lambda s, batch: run(s, batch) | extra, step,
    lambda ema, samples: preview(
      adapter.merged(lora_config, base, ema) if lora_config else ema, samples
    ),
    lambda ema, batches: None, record=run.record, restore=run.restore,
    conditioner=models.conditioner,
  )  # fmt: skip
