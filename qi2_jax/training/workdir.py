# SPDX-License-Identifier: Apache-2.0
"""The workdir of an MMDiT read back: config, models and EMA weights."""

import dataclasses
import json
import os

import jax
from ml_collections import ConfigDict

from qi2_jax.conditioning.conditioner import Conditioner, Frozen
from qi2_jax.errors import InputError
from qi2_jax.models import lora, mmdit
from qi2_jax.training import adapter, build, checkpoints, weights


@dataclasses.dataclass(frozen=True)
class Workdir:
  """What a finished (or running) training left.

  Attributes:
    config: the run's config.
    model: the MMDiT.
    params: its EMA parameters at `step`; a LoRA run's are merged.
    conditioner: encoder and VAE modules.
    frozen: their variables.
    step: training step of the weights.
  """

  config: ConfigDict
  model: mmdit.MMDiT
  params: dict
  conditioner: Conditioner
  frozen: Frozen
  step: int


def is_workdir(path: str) -> bool:
  """Whether a folder looks like a training workdir of any objective."""
  config = os.path.join(path, "config.json")
  if not os.path.isfile(config):
    return False
  with open(config, encoding="utf-8") as file:
    return "objective" in json.load(file)


def load(path: str, dtype: str | None = None) -> Workdir:
  """Reads the newest readable checkpoint of a workdir of an MMDiT.

  Args:
    path: the workdir.
    dtype: compute dtype of the models; None keeps the run's.

  Raises:
    InputError: the run has another objective or no checkpoint yet, or it
      trained a LoRA whose base is gone.
  """
  config = _config(path)
  if dtype is not None:
    for part in (config.model, config.vae, config.text):
      part.dtype = dtype
  store = _open(path)
  weights.check_base(path)
  vae, vae_variables = build.load_vae(path, config.vae.dtype)
  conditioner, encoder_params = build.conditioner(config.text, vae)
  width = conditioner.encoder.width
  model = mmdit.MMDiT(build.mmdit_config(config.model, vae.config.z_dim, width))
  abstract = jax.eval_shape(lambda: mmdit.init_params(model, jax.random.key(0)))
  params, step = weights.run_params(path, store, None, _on_one_device(abstract))
  store.close()
  frozen = Frozen(vae_variables, encoder_params)
  return Workdir(config, model, params, conditioner, frozen, step)


def load_adapter(path: str) -> lora.Lora:
  """The newest EMA factors of a LoRA workdir; its base is not read.

  Raises:
    InputError: the run trained no LoRA, or has no checkpoint yet.
  """
  _config(path)
  store = _open(path)
  adapter, _ = weights.run_adapter(path, store, None)
  store.close()
  return adapter


def _config(path: str) -> ConfigDict:
  with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
    config = ConfigDict(json.load(file))
  if config.objective not in adapter.OBJECTIVES:
    raise InputError(
      f"{path} trained a {config.objective}, which makes no images from "
      "prompts; pass a pretrain, sft or dmd workdir."
    )
  return config


def _open(path: str) -> checkpoints.CheckpointStore:
  store = checkpoints.CheckpointStore(path, read_only=True)
  if store.latest() is None:  # Before any model is built.
    raise InputError(
      f"{path} holds no finished checkpoint yet; train on first."
    )
  return store


def _on_one_device(abstract):
  """Shapes with a concrete sharding, so that a pod's checkpoint loads here."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
    abstract,
  )
