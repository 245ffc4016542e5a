# SPDX-License-Identifier: Apache-2.0
"""The task of Flow-GRPO: rollout, rewards and update in one process.

`encode` makes images with the policy of the state and judges them in threads
while the device makes the next part of the batch; the step is an update like
any other. Randomness follows the step number; weights of rewards and the
spread of prompts travel in the checkpoint's meta: a resumed run goes on
exactly.

Shapes: P prompts, K images of a prompt, B = P K images.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qi2_jax.conditioning.conditioner import to_uint8
from qi2_jax.errors import InputError
from qi2_jax.flow import sde
from qi2_jax.models import lora, mmdit, vae_tiling
from qi2_jax.objectives import flow_grpo
from qi2_jax.parallel import distributed
from qi2_jax.rewards import protocol
from qi2_jax.training import (
  adapter,
  build,
  dmd_task,
  flow_task,
  frozen,
  grpo_loss,
  optimizer,
  prompt_choice,
  rollout,
  rollout_rewards,
  state,
  steps,
  weights,
)
from qi2_jax.training.lora_task import on_mesh
from qi2_jax.training.task import Task

# Keeps the rollout's randomness apart from that of the step.
_STREAM = 0x5D1


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


def check(config, mesh) -> None:
  """Raises InputError for a run that cannot start; reads no model."""
  if not config.init:
    raise InputError(
      "reinforcement learning needs a model: pass --config.init, a workdir or "
      "a pipeline folder."
    )
  section = config.rl
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  sizes = [r.batch_size for r in config.data.resolutions.values()]
  for size in (config.data.batch_size, *sizes):
    used = size // section.candidates
    if size % section.candidates or used % (section.parts * shards):
      raise InputError(
        f"a batch of {size} prompts / config.rl.candidates="
        f"{section.candidates} must split into config.rl.parts="
        f"{section.parts} times {shards} devices; change one of them."
      )
    images = used * section.group
    if images % (section.updates * config.optimizer.accumulate * shards):
      raise InputError(
        f"{images} images of a step do not split into config.rl.updates="
        f"{section.updates} x config.optimizer.accumulate="
        f"{config.optimizer.accumulate} parts over {shards} devices."
      )


def transform(conditioner) -> Callable:
  """`Task.transform`: prompt, empty prompt, and what rewards need."""
  prompts = dmd_task.transform(conditioner)
  return lambda sample, rng: (
    prompts(sample, rng) | (rollout_rewards.host_fields(sample))
  )


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

  def old(trained, features):
    rows, parameters = steps.rows_of(features)
    base = parameters.get(steps.FROZEN)
    params = whole(lora_config, base)(trained)
    return grpo_loss.score(how, module, params, rows)

  if lora_config:
    loss = adapter.lora_loss(loss, lora_config)
  updates = config.rl.updates
  tx = optimizer.create(config.optimizer, config.num_steps * updates)
  step = grpo_loss.make_step(
    loss, tx, config.ema_decay, config.optimizer.accumulate, updates, old
  )
  return functools.partial(state.create, optimizer=tx), step


def whole(lora_config: adapter.LoraConfig | None, base) -> Callable:
  """`trained -> params`: itself, or a base with the factors beside it."""
  if lora_config is None:
    return lambda trained: trained
  return lambda factors: lora.attach(
    base, adapter.to_lora(lora_config, factors)
  )


class Rollouts:
  """`Task.encode`: prompts on the mesh to features of the step."""

  def __init__(
    self, config, models: frozen.Models, judge: rollout_rewards.Judge,
    params_of: Callable, reference, mesh,
  ):  # fmt: skip
    """Compiles nothing yet.

    Args:
      config: of the run.
      models: its frozen models.
      judge: its rewards.
      params_of: `trained -> params` of the policy.
      reference: parameters of the reference model, or None for no penalty.
      mesh: where features lie.
    """
    self._config, self._models, self._mesh = config, models, mesh
    self._judge = judge
    self._reference = reference
    self._how = rollout_config(config)
    self._encode = dmd_task.encoder(models)
    self._run = rollout.program(self._how, models.module, params_of)
    self._key = jax.random.fold_in(jax.random.key(config.seed), _STREAM)
    self._choice = prompt_choice.PromptChoice(config.rl.prompt_floor)

  def record(self) -> dict:
    """`Task.record`."""
    return {
      "rewards": self._judge.record(), "prompts": self._choice.record()
    }  # fmt: skip

  def restore(self, saved: Mapping) -> None:
    """`Task.restore`."""
    self._judge.restore(saved.get("rewards", {}))
    self._choice = prompt_choice.PromptChoice(
      self._config.rl.prompt_floor, saved.get("prompts")
    )

  def __call__(self, train_state, batch) -> dict:
    """Features of one step, see `grpo_loss.loss`."""
    step = int(train_state.step)
    asked = rollout_rewards.Asked.of(
      distributed.to_host(
        {k: batch[k] for k in ("caption", "kind", "image")}
        | {"prompt": {"references": batch["prompt"]["references"]}}
      )
    )
    batch, asked, names = self._chosen(step, batch, asked)
    key = jax.random.fold_in(self._key, step)
    parts, futures = [], []
    count = self._config.rl.parts
    split = jax.tree.map(lambda x: steps.microbatches(x, count), batch)
    size = batch["image"].shape[1:3]
    for i in range(count):
      part = jax.tree.map(lambda x, i=i: x[i], split)
      found = self._encode(part)
      walk, conditions = self._run(
        train_state.params, found["condition"], found["negative"],
        jax.random.fold_in(key, i),
      )  # fmt: skip
      pixels = _decode(
        self._models.frozen.vae, walk.x0, size, vae=self._models.vae
      )
      own = rollout_rewards.Asked(asked.prompts[i::count],
                                  asked.references[i::count])  # fmt: skip
      futures.append(
        self._judge.submit(
          functools.partial(_host_images, pixels), own.repeated(self._how.group)
        )
      )
      parts.append(rollout.features(walk, conditions))
    rows = _joined(parts, self._how.group)
    if self._reference is not None:
      rows["reference_BWNZ"] = _reference_means(
        self._reference, rows, how=self._how, module=self._models.module
      )
    values = self._in_order([future.result() for future in futures])
    return rows | self._judged(values, asked, names)

  def _chosen(self, step: int, batch, asked: rollout_rewards.Asked):
    """The prompts to use, of the candidates that the loader brought."""
    names = [
      prompt_choice.name_of(prompt.text, sources)
      for prompt, sources in zip(asked.prompts, asked.references)
    ]
    count = len(names) // self._config.rl.candidates
    if count == len(names):
      return batch, asked, names
    rng = np.random.default_rng([self._config.seed, _STREAM, step])
    at = self._choice.choose(names, count, rng)
    asked = rollout_rewards.Asked(
      [asked.prompts[i] for i in at], [asked.references[i] for i in at]
    )
    return _take(batch, at), asked, [names[i] for i in at]

  def _in_order(self, values: list[dict]) -> dict[str, np.ndarray]:
    """Values of the parts as those of the batch, prompts in their order."""
    group = self._how.group
    return {
      name: np.stack(
        [part[name].reshape(-1, group) for part in values], axis=1
      ).ravel()
      for name in values[0]
    }

  def _judged(self, values, asked, names) -> dict:
    """Advantages and what to log, on the mesh."""
    group = self._how.group
    kinds = [prompt.kind for prompt in asked.prompts]
    rows, log = self._judge.advantages(values, kinds, group)
    self._choice.learn(
      names, np.stack([v.reshape(-1, group) for v in values.values()])
    )
    place = lambda v: rollout.to_rows(v, self._mesh)  # noqa: E731
    return jax.tree.map(place, rows | {grpo_loss.LOG: log})


@functools.partial(jax.jit, static_argnames=("size", "vae"))
def _decode(variables, x_BNZ, size, *, vae):
  """Latents to images `[B, H, W, C]` in [-1, 1]."""
  factor = vae.config.factor
  grid = size[0] // factor, size[1] // factor
  z_BhwZ = x_BNZ.reshape(x_BNZ.shape[0], *grid, -1)
  return vae_tiling.decode(vae, variables, z_BhwZ)


def _host_images(pixels) -> np.ndarray:
  return to_uint8(distributed.to_host(pixels))


@functools.partial(jax.jit, static_argnums=1)
def _joined(parts: list[dict], group: int) -> dict:
  """Rows of the parts of a batch as those of the batch; undoes the split."""

  def one(*xs):
    # Parts hold every count-th prompt; references may have no elements.
    images, rest = xs[0].shape[0], xs[0].shape[1:]
    xs = [x.reshape(images // group, group, *rest) for x in xs]
    whole = jnp.stack(xs, axis=1)
    return whole.reshape(len(xs) * images, *rest)

  return jax.tree.map(one, *parts)


@jax.jit
def _take(batch, at):
  return jax.tree.map(lambda x: x[at], batch)


@functools.partial(jax.jit, static_argnames=("how", "module"))
def _reference_means(params, rows, *, how, module):
  """Means of the trained steps under the reference model `[B, W, N, Z]`."""
  found = grpo_loss.score(how, module, params, rows)
  return grpo_loss.old_fields(found, len(rows["sigmas_BW"]))["old_mean_BWNZ"]


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
  check(config, mesh)
  lora_config = adapter.from_config(config)
  judge = rollout_rewards.Judge(
    config.rewards, rollout_rewards.scores(config.rewards, rewards)
  )
  models = frozen.load(config, workdir, mesh)
  start, step = training(config, models.module, lora_config)
  placed = on_mesh(
    dmd_task.abstract_model(models.module), mmdit.SHARDING_RULES, mesh
  )
  base = None
  if lora_config:
    base = weights.own_base(config.init, workdir, placed)
  reference = base
  if config.rl.kl_weight and not lora_config:
    reference = weights.initial_params(config.init, placed)
  elif not config.rl.kl_weight:
    reference = None
  run = Rollouts(
    config, models, judge, whole(lora_config, base), reference, mesh
  )
  logging.info(
    "rollout: %d images of each prompt in %d steps, %d of them trained, "
    "guidance %s", config.rl.group, config.rl.steps, config.rl.window,
    f"{config.rl.guidance} ({config.rl.hybrid})",
  )  # fmt: skip
  extra = {steps.FROZEN: base} if lora_config else {}
  preview = flow_task.flow_preview(models, config)
  rules = lora.SHARDING_RULES if lora_config else ()
  return Task(
    dmd_task.trained(models.module, lora_config), start,
    (*rules, *mmdit.SHARDING_RULES), transform(models.conditioner),
    lambda s, batch: run(s, batch) | extra, step,
    lambda ema, samples: preview(
      _merged(lora_config, base, ema) if lora_config else ema, samples
    ),
    lambda ema, batches: None, record=run.record, restore=run.restore,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _merged(lora_config: adapter.LoraConfig, base, factors):
  """The whole policy, to sample from."""
  return lora.merge(base, adapter.to_lora(lora_config, factors))
