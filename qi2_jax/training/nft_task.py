# SPDX-License-Identifier: Apache-2.0
"""The task of DiffusionNFT: images of the old policy, judged, noised, learnt.

The old policy is the averaged parameters of the run: the same that are
sampled and exported, with `ema_decay` as the published decay's limit. It makes
the images without guidance.

Shapes: P prompts, K images of a prompt, B = P K images, T noise levels of
each, N tokens, Z channels; rows of levels have B T entries, image 0's first.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.flow import path, schedules
from qi2_jax.models import lora, mmdit
from qi2_jax.objectives import nft
from qi2_jax.parallel import sharding
from qi2_jax.rewards import protocol
from qi2_jax.training import (
  adapter,
  build,
  flow_task,
  frozen,
  grpo_loss,
  program,
  rollout,
  rollout_encode,
  rollout_rewards,
  steps,
)
from qi2_jax.training.task import Task


def ode_config(config) -> rollout.OdeConfig:
  """`config.rl` and the shift of the run."""
  section = config.rl
  return rollout.OdeConfig(
    section.group, section.steps, section.shared_noise,
    build.shift_config(config.flow.shift),
  )  # fmt: skip


def _flat(x):
  """Rows of images with T entries to rows of levels."""
  return x.reshape(-1, *x.shape[2:])


def velocities(module: mmdit.MMDiT, params, rows: dict) -> jax.Array:
  """Velocity at every noised image `[B T, N, Z]`."""
  t_BT = rows["times_BT"]
  x_t = path.interpolate(
    jnp.repeat(rows["x0_BNZ"], t_BT.shape[1], axis=0),
    _flat(rows["noise_BTNZ"]), _flat(t_BT),
  )  # fmt: skip
  condition = grpo_loss.per_step(rows["condition"], t_BT.shape[1])
  with lora.beside_kernels():
    return module.apply({"params": params}, x_t, _flat(t_BT), condition)


def loss(module: mmdit.MMDiT, beta: float, clip: float) -> steps.Loss:
  """The loss of judged images of the old policy.

  Args:
    module: the network.
    beta: see `nft.velocity_loss`.
    clip: of the advantages, see `nft.optimality`.
  """

  def mean(params, rows):
    v = velocities(module, params, rows).astype(jnp.float32)
    count = rows["times_BT"].shape[1]
    t_B, noise = _flat(rows["times_BT"]), _flat(rows["noise_BTNZ"])
    x0, advantage, weight = (
      jnp.repeat(rows[name], count, axis=0)
      for name in ("x0_BNZ", "advantage_B", "weight_B")
    )
    r_B = nft.optimality(advantage, clip)
    x_t = path.interpolate(x0, noise, t_B)
    old = _flat(rows["old_BTNZ"])
    each = nft.data_loss(x_t, x0, t_B, v, old, r_B, beta)
    gap = nft.mean_of_rows(jnp.square(v - old))
    metrics = {k: jnp.mean(x) for k, x in rows[grpo_loss.LOG].items()}
    return jnp.mean(weight * each), metrics | {"old_gap": jnp.mean(gap)}

  return steps.Loss(lambda rows, key: rows, mean)


def rollouts(
  config, module: mmdit.MMDiT
) -> tuple[Callable, Callable]:  # fmt: skip
  """`run` and `finish` of `rollout_encode.Rollouts`."""
  how = ode_config(config)
  sample = rollout.ode_program(how, module, lambda old: old)
  levels = config.rl.levels

  def run(train_state, condition, negative, key):
    del negative
    walk, own = sample(train_state.ema, condition, key)
    return walk.x0, {"x0_BNZ": walk.x0, "condition": own}

  @jax.jit
  def noised(old, rows, key):
    batch, tokens, channels = rows["x0_BNZ"].shape
    grid = jnp.asarray(
      schedules.sampling_sigmas(how.steps, tokens, how.shift)[:-1]
    )
    keys = jax.random.split(key)
    which = jax.random.randint(keys[0], (batch, levels), 0, how.steps)
    noise = jax.random.normal(keys[1], (batch, levels, tokens, channels))
    noise = sharding.constrain(noise, "batch", None, None, None)
    rows = rows | {"times_BT": grid[which], "noise_BTNZ": noise}
    v = velocities(module, old, rows).astype(jnp.float32)
    return rows | {"old_BTNZ": v.reshape(noise.shape)}

  def finish(train_state, rows, key):
    return noised(train_state.ema, rows, key)

  return run, finish


def check(config, mesh) -> None:
  """Raises InputError for a run that cannot start; reads no model."""
  rollout_encode.check(config, mesh)
  adapter.from_config(config)  # says that a LoRA is not trained here
  if config.rl.updates != 1:
    raise InputError(
      f"config.rl.updates={config.rl.updates}: DiffusionNFT has one update "
      "per rollout; set it to 1."
    )
  if config.rl.beta <= 0 or config.rl.levels < 1:
    raise InputError(
      "config.rl needs beta > 0 and levels >= 1, not "
      f"{config.rl.beta} and {config.rl.levels}."
    )


def nft_task(
  config, workdir: str, mesh, rewards: Mapping[str, protocol.Score]
) -> Task:
  """DiffusionNFT of the MMDiT on T2I and edits.

  Args:
    config: of the run.
    workdir: of the run.
    mesh: where everything lives.
    rewards: those that need no model, by name.
  """
  check(config, mesh)
  judge = rollout_rewards.judge(config.rewards, rewards)
  models = frozen.load(config, workdir, mesh)
  start, step = program.gradient_training(
    config, loss(models.module, config.rl.beta, config.rewards.clip)
  )
  encode = rollout_encode.Rollouts(
    config, models, judge, *rollouts(config, models.module), mesh
  )
  return Task(
    functools.partial(mmdit.init_params, models.module), start,
    mmdit.SHARDING_RULES, rollout_encode.transform(models.conditioner),
    encode, step, flow_task.flow_preview(models, config),
    lambda ema, batches: None, record=encode.record, restore=encode.restore,
    conditioner=models.conditioner,
  )  # fmt: skip
