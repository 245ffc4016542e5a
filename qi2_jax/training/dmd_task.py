# SPDX-License-Identifier: Apache-2.0
"""The task of distilling an MMDiT into a few-step student (see `dmd_step`).

Only prompts are needed, and the references of edits: targets are not looked
at. The student's own noise levels come from the config, so that training,
previews, sampling and export agree on them.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.flow import backward_simulation, sampler
from qi2_jax.models import lora, mmdit
from qi2_jax.models.condition import Layout
from qi2_jax.objectives import dmd
from qi2_jax.training import (
  adapter,
  best,
  cached,
  dmd_state,
  dmd_step,
  dmd_views,
  frozen,
  optimizer,
  steps,
  teachers,
  weights,
)
from qi2_jax.training.lora_task import on_mesh
from qi2_jax.training.task import Sample, Task

CATEGORIES = ("t2i", "edit")
# What a prompt and its empty prompt have in common.
_SHARED = {"references", "reference_latents", "latents"}


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
      len(CATEGORIES),
    ),
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
    if lora_config is None:
      return trained
    factors = adapter.to_lora(lora_config, trained)
    return lora.attach(parameters[dmd_step.BASE], factors)

  def shape(condition):
    positions = condition.layout.target_positions_BN3
    return *positions.shape[:2], module.config.latent_channels

  return dmd_step.Networks(apply, rollout, student, shape)


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
  start = functools.partial(
    dmd_state.create, abstract_model=abstract_model(module), optimizer=tx,
    fake_optimizer=fake_tx,
  )  # fmt: skip
  return start, step


def abstract_model(module: mmdit.MMDiT):
  """Shapes and dtypes of the parameters."""
  init = functools.partial(mmdit.init_params, module)
  return jax.eval_shape(init, jax.random.key(0))


def trained(
  module: mmdit.MMDiT, lora_config: adapter.LoraConfig | None
) -> Callable:  # fmt: skip
  """`key -> params` of what the student trains."""
  if lora_config is None:
    return functools.partial(mmdit.init_params, module)
  return functools.partial(
    adapter.init_factors, lora_config, abstract_model(module)
  )


def rules(lora_config: adapter.LoraConfig | None):
  """Sharding rules of the state."""
  factors = lora.SHARDING_RULES if lora_config else ()
  return *dmd_state.SHARDING_RULES, *factors, *mmdit.SHARDING_RULES


def dmd_task(config, workdir: str, mesh) -> Task:
  """Distillation of the MMDiT, into itself or into a LoRA."""
  check(config, mesh)
  lora_config = adapter.from_config(config)
  dmd_config = settings(config)
  models = frozen.load(config, workdir, mesh)
  start, step = training(config, models.module, lora_config)
  placed = on_mesh(
    abstract_model(models.module), mmdit.SHARDING_RULES, mesh
  )  # fmt: skip
  parameters, show = {}, lambda ema: ema
  if lora_config:
    base = weights.own_base(config.init, workdir, placed)
    parameters[dmd_step.BASE] = base
    show = functools.partial(_merged, lora_config, base)
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
  encode = encoder(models)
  return Task(
    trained(models.module, lora_config), start, rules(lora_config),
    transform(models.conditioner),
    lambda _, batch: encode(batch) | {steps.FROZEN: parameters}, step,
    lambda ema, samples: views.preview(show(ema), samples),
    lambda ema, batches: None, lambda: cached.signature(models),
    watch=functools.partial(_watch, views, show, workdir),
  )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _merged(lora_config: adapter.LoraConfig, base, factors):
  """The whole student, to sample from."""
  return lora.merge(base, adapter.to_lora(lora_config, factors))


def _watch(views, show: Callable, workdir: str, state) -> None:
  """`Task.watch`: the weights nearest to the teacher are kept."""
  if views.measures:
    value = views.distance(show(state.ema))
    best.keep(workdir, int(state.step), state.ema, value)


def transform(conditioner) -> Callable:
  """`Task.transform`: a prompt, and the empty prompt for guidance."""

  def one(sample: Sample, rng):
    del rng
    if cached.is_cached(sample):
      references = sample["reference_sizes"]
      prompt, empty = (
        cached.host(conditioner, sample, no_caption, False)
        for no_caption in (False, True)
      )
    else:
      references, size = sample["references"], sample["image"].shape[:2]
      prompt, empty = (
        conditioner.host(caption, references, size)
        for caption in (sample["caption"], "")
      )
    # Targets are not looked at; references are those of the prompt.
    prompt.pop("latents", None)
    for name in _SHARED & empty.keys():
      del empty[name]
    category = CATEGORIES.index("edit" if references else "t2i")
    return {"prompt": prompt, "empty": empty, "category": np.int32(category)}

  return one


def encoder(models: frozen.Models) -> Callable:
  """`Task.encode`: conditions of the prompts and of the empty prompts."""
  conditioner = models.conditioner

  @jax.jit
  def encode(parameters, batch):
    prompt, empty = batch["prompt"], batch["empty"]
    empty = empty | {k: v for k, v in prompt.items() if k in _SHARED}
    if "text" in prompt:
      condition, negative = cached.condition(prompt), cached.condition(empty)
    else:
      condition = conditioner.encode(parameters, prompt)
      negative = condition.replace(
        text_BTC=conditioner.encode_text(parameters.encoder, empty),
        layout=Layout(**empty["layout"]),
      )
    return {
      "condition": condition, "negative": negative,
      "category_B": batch["category"],
    }  # fmt: skip

  return lambda batch: encode(models.frozen, batch)
