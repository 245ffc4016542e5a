# SPDX-License-Identifier: Apache-2.0
"""The task of distilling an MMDiT into a few-step student (see `dmd_step`).

Only prompts are needed, and the references of edits: targets are not looked
at but by a GAN head. The student's own noise levels come from the config, so
that training, previews, sampling and export agree on them.
"""

import functools
import itertools
from collections.abc import Callable

from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.flow import backward_simulation, sampler
from qi2_jax.interop import model_folder
from qi2_jax.models import lora, mmdit
from qi2_jax.objectives import dmd
from qi2_jax.training import (
  adapter,
  best,
  cached,
  dmd_gan,
  dmd_state,
  dmd_step,
  dmd_views,
  frozen,
  optimizer,
  prompts,
  steps,
  teachers,
  weights,
)
from qi2_jax.training.task import Task


def settings(config) -> dmd_step.DmdConfig:
  """`config.dmd` as a frozen dataclass.

  Raises:
    InputError: a field without meaning.
  """
  section = config.dmd
  sigmas = tuple(section.sigmas)
  falling = all(a > b for a, b in itertools.pairwise(sigmas))
  if not sigmas or sigmas[0] != 1.0 or sigmas[-1] <= 0.0 or not falling:
    raise InputError(
      f"config.dmd.sigmas={sigmas} must fall from 1 and stay above 0."
    )
  for name, allowed in (
    ("weight", dmd.WEIGHTS), ("sampler", backward_simulation.SAMPLERS),
  ):  # fmt: skip
    if section[name] not in allowed:
      raise InputError(
        f"config.dmd.{name}={section[name]!r} is unknown; use one of "
        f"{list(allowed)}."
      )
  if section.held_out_prompts and section.held_out_samples < 2:
    raise InputError(
      f"config.dmd.held_out_samples={section.held_out_samples} must be at "
      "least 2: distributions are compared."
    )
  if section.ratio < 1:
    raise InputError(
      f"config.dmd.ratio={section.ratio} must be at least 1: the student "
      "cannot be trained without its fake score."
    )
  return dmd_step.DmdConfig(
    sigmas=sigmas, step_weights=step_weights(section, len(sigmas)),
    guidance=section.guidance,
    times=dmd.Times(**section.times.to_dict()),
    fake_times=dmd.Times(**section.fake_times.to_dict()),
    weight=section.weight, decoupled=section.decoupled,
    sampler=section.sampler, ratio=section.ratio,
    teacher_weights_MKC=dmd.teacher_weights(
      section.teacher_weights, len(teacher_paths(config)), len(sigmas),
      len(prompts.CATEGORIES),
    ),
    gan=dmd_gan.from_config(section),
  )  # fmt: skip


def step_weights(section, steps: int) -> tuple[float, ...]:
  """`config.dmd.step_weights`; empty: all steps alike.

  Raises:
    InputError: not one positive number per step.
  """
  weights_K = tuple(section.step_weights) or (1.0,) * steps
  if len(weights_K) != steps or min(weights_K) <= 0.0:
    raise InputError(
      f"config.dmd.step_weights={weights_K} needs one number above 0 for each "
      f"of the {steps} levels in config.dmd.sigmas."
    )
  return weights_K


def teacher_paths(config) -> tuple[str, ...]:
  """The teachers of a run; without any, its start is the only one."""
  return tuple(config.dmd.teachers) or (config.init,)


def check(config, mesh) -> None:
  """Raises InputError for a run that cannot start; reads no model."""
  if not config.init:
    raise InputError(
      "a distillation needs a teacher: pass --config.init, a workdir or a "
      "pipeline folder."
    )
  if config.optimizer.accumulate != 1:
    raise InputError(
      "a distillation step does not accumulate; pass "
      "--config.optimizer.accumulate=1 and a smaller batch."
    )
  groups = config.dmd.ratio + 1
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  sizes = [r.batch_size for r in config.data.resolutions.values()]
  for size in (config.data.batch_size, *sizes):
    if size % (groups * shards):
      raise InputError(
        f"a batch of {size} does not split into {groups} groups "
        f"(config.dmd.ratio + 1) over data x fsdp = {shards} devices; use a "
        f"multiple of {groups * shards} for config.data.batch_size."
      )


def networks(
  module: mmdit.MMDiT, lora_config: adapter.LoraConfig | None = None
) -> dmd_step.Networks:
  """An MMDiT, whole or as a LoRA on a frozen base, as a student.

  Args:
    module: of student, fake score and teachers alike.
    lora_config: of a student that is a LoRA.
  """

  def apply(params, x_BNZ, sigma_B, condition):
    with lora.beside_kernels():
      return module.apply({"params": params}, x_BNZ, sigma_B, condition)

  def hidden(params, x_BNZ, sigma_B, condition):
    with lora.beside_kernels():
      return module.apply(
        {"params": params}, x_BNZ, sigma_B, condition, method="with_hidden"
      )

  def rollout(params, condition):
    with lora.beside_kernels():
      velocity = sampler.guided_velocity(
        module, {"params": params}, condition, None, 1.0
      )  # fmt: skip

    def one(x, sigma):
      with lora.beside_kernels():
        return velocity(x, sigma)

    return one

  def student(trained, parameters):
    base = parameters.get(dmd_step.BASE)
    return adapter.attached(lora_config, base)(trained)

  def shape(condition):
    positions = condition.layout.target_positions_BN3
    return *positions.shape[:2], module.config.latent_channels

  return dmd_step.Networks(apply, rollout, student, shape, hidden)


def training(
  config, module: mmdit.MMDiT, lora_config: adapter.LoraConfig | None = None
) -> tuple[Callable, Callable]:  # fmt: skip
  """What a run starts from and its step, as programs without weights.

  Args:
    config: of the run.
    module: of student, fake score and teachers alike.
    lora_config: of a student that is a LoRA.

  Returns:
    `(params -> state, step)`, see `task.Task`.
  """
  dmd_config = settings(config)
  tx = optimizer.create(config.optimizer, config.num_steps)
  fake_tx = optimizer.create(
    config.dmd.fake_optimizer, config.num_steps * dmd_config.ratio
  )
  step = dmd_step.make_step(
    dmd_config, networks(module, lora_config), tx, fake_tx, config.ema_decay
  )
  head = functools.partial(dmd_gan.new_head, module.config.width)
  start = functools.partial(
    dmd_state.create,
    abstract_model=model_folder.abstract_mmdit(module.config), optimizer=tx,
    fake_optimizer=fake_tx, new_head=head if dmd_config.gan else None,
  )  # fmt: skip
  return start, step


def rules(lora_config: adapter.LoraConfig | None) -> tuple:
  """Sharding rules of the state."""
  return *dmd_state.SHARDING_RULES, *adapter.rules(lora_config)


def dmd_task(config, workdir: str, mesh) -> Task:
  """Distillation of the MMDiT, into itself or into a LoRA."""
  check(config, mesh)
  lora_config = adapter.from_config(config)
  dmd_config = settings(config)
  models = frozen.load(config, workdir, mesh)
  start, step = training(config, models.module, lora_config)
  placed = weights.placed(models.module, mesh)
  parameters, show = {}, lambda ema: ema
  if lora_config:
    base = weights.own_base(config.init, workdir, placed)
    parameters[dmd_step.BASE] = base
    show = functools.partial(adapter.merged, lora_config, base)
  if lora_config and not config.dmd.teachers:
    parameters[dmd_step.TEACHERS] = [parameters[dmd_step.BASE]]
  else:
    paths = teacher_paths(config)
    parameters[dmd_step.TEACHERS] = teachers.load(paths, workdir, placed)
  logging.info(
    "distilling %d teacher(s) at guidance %g into the levels %s",
    len(parameters[dmd_step.TEACHERS]), dmd_config.guidance,
    dmd_config.sigmas,
  )  # fmt: skip
  views = dmd_views.Views(config, models, parameters[dmd_step.TEACHERS][0])
  transform = prompts.transform(models.conditioner)
  encode = prompts.encoder(models)
  if dmd_config.gan:
    transform = dmd_gan.transform(transform)
    encode = dmd_gan.encoder(models, encode)
  return Task(
    adapter.trained(models.module, lora_config), start, rules(lora_config),
    transform,
    lambda _, batch: encode(batch) | {steps.FROZEN: parameters}, step,
    lambda ema, samples: views.preview(show(ema), samples),
    lambda ema, batches: None, lambda: cached.signature(models),
    watch=functools.partial(_watch, views, show, workdir),
    conditioner=models.conditioner,
  )  # fmt: skip


def _watch(views, show: Callable, workdir: str, state) -> None:
  """`Task.watch`: the weights nearest to the teacher are kept."""
  if views.measures:
    value = views.distance(show(state.ema))
    best.keep(workdir, int(state.step), state.ema, value)
