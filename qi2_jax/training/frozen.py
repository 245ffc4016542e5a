# SPDX-License-Identifier: Apache-2.0
"""The models around an MMDiT in training: read, placed, never trained."""

import dataclasses

import jax
from absl import logging

from qi2_jax.conditioning.conditioner import Conditioner, Frozen
from qi2_jax.interop import model_folder
from qi2_jax.models import mmdit, vae
from qi2_jax.parallel import distributed
from qi2_jax.training import build, checkpoints


@dataclasses.dataclass(frozen=True)
class Models:
  """What every task of the MMDiT shares.

  Attributes:
    module: the MMDiT; its parameters are the task's.
    conditioner: prompts and references to conditions.
    vae: the module.
    frozen: parameters of VAE and text encoder, on the mesh.
  """

  module: mmdit.MMDiT
  conditioner: Conditioner
  vae: vae.VAE
  frozen: Frozen


def load(config, workdir: str, mesh) -> Models:
  """Reads the models that a run's config names.

  Args:
    config: of the run.
    workdir: receives a copy of the VAE.
    mesh: where the parameters go.

  Raises:
    InputError: a path holds no such model.
  """
  return assemble(config, *own_vae(config, workdir), mesh)


def assemble(config, vae_module: vae.VAE, variables, mesh) -> Models:
  """`load` around a VAE that has been read; writes nothing."""
  conditioner, encoder_params = build.conditioner(config.text, vae_module, mesh)
  frozen = Frozen(
    vae=jax.device_put(
      # A restored VAE lies on devices; they may be another process's.
      distributed.to_host(variables),
      jax.NamedSharding(mesh, jax.P()),
    ),
    encoder=encoder_params,
  )
  model = build.mmdit_config(
    config.model, vae_module.config.z_dim, conditioner.encoder.width,
    mesh.devices.flat[0].platform,
  )  # fmt: skip
  logging.info("attention kernel: %s, remat: %s", model.kernel, model.remat)
  return Models(mmdit.MMDiT(model), conditioner, vae_module, frozen)


def own_vae(config, workdir: str):
  """The run's VAE. The workdir keeps a copy from its first start.

  A workdir can thus be sampled from anywhere, and a resumed run keeps its
  latents even if `config.vae.path` was trained on.
  """
  if checkpoints.has_checkpoint(workdir):
    return build.load_vae(workdir, config.vae.dtype)
  module, variables = build.frozen_vae(config.vae)
  whole = distributed.to_host(variables)
  distributed.on_first(
    lambda: model_folder.save_vae(f"{workdir}/vae", module.config, whole)
  )
  return module, variables
