# SPDX-License-Identifier: Apache-2.0
"""ConfigDicts to models: the one boundary where configs become dataclasses."""

import dataclasses

import jax
import jax.numpy as jnp
from absl import logging

from qi2_jax.conditioning.conditioner import Conditioner
from qi2_jax.conditioning.encoder import built_in
from qi2_jax.errors import InputError
from qi2_jax.flow.generate import SamplingConfig
from qi2_jax.flow.schedules import ShiftConfig
from qi2_jax.interop import encoder_folder, model_folder
from qi2_jax.models import kernels, mmdit, qwen3_vl, vae
from qi2_jax.parallel.sharding import tree_shardings


def preset(presets: dict, name: str, what: str):
  """The preset `name`; raises InputError if there is none."""
  if name not in presets:
    raise InputError(
      f"{what} preset {name!r} is unknown; use one of {sorted(presets)}."
    )
  return presets[name]


def mmdit_config(
  config, z_dim: int, context_dim: int, platform: str | None = None
) -> mmdit.MMDiTConfig:
  """`config.model` over its preset, fitted to VAE, encoder and devices.

  Args:
    config: `config.model`: preset, dtype, remat, kernel and the variant
      fields; a field that is None keeps the preset's value, and the kernel is
      then the fastest of the platform.
    z_dim: latent channels of the VAE.
    context_dim: width of the encoder's states.
    platform: of the devices, None for those of this process.

  Raises:
    InputError: unknown preset or variant value, or a kernel of another
      platform.
  """
  base = preset(mmdit.PRESETS, config.preset, "model")
  fields = {
    name: config[name]
    for name in ("remat", "attention", "condition_time", "modulation", "gate")
    if config[name] is not None
  }
  if config.dtype is not None:
    fields["dtype"] = jnp.dtype(config.dtype)
  made = dataclasses.replace(
    base, latent_channels=z_dim, context_dim=context_dim, **fields
  )
  # Configs of older runs have no kernel.
  return with_kernel(made, config.get("kernel"), platform)


def with_kernel(
  config: mmdit.MMDiTConfig, kernel: str | None = None,
  platform: str | None = None,
) -> mmdit.MMDiTConfig:  # fmt: skip
  """`config` with an attention kernel that runs on its devices.

  Args:
    config: of the model.
    kernel: one of `kernels.KERNELS`; None: the fastest.
    platform: of the devices, None for those of this process.

  Raises:
    InputError: the kernel is unknown or of another platform.
  """
  platform = platform or jax.default_backend()
  best = kernels.best_kernel(platform, config.head_dim, config.dtype)
  if kernel in kernels.KERNELS and kernel not in ("xla", best):
    raise InputError(
      f"config.model.kernel={kernel} does not run here: {platform}, heads of "
      f"{config.head_dim} channels, {jnp.dtype(config.dtype).name}; use "
      f"{' or '.join(sorted({'xla', best}))}."
    )
  return dataclasses.replace(config, kernel=kernel or best)


def new_vae(config) -> vae.VAE:
  """A VAE module to train from `config.vae`: preset, dtype, remat.

  Temporal kernels are left out: there are none to carry from scratch.
  """
  base = preset(vae.PRESETS, config.preset, "vae")
  # Configs of older runs have no remat.
  base = dataclasses.replace(
    base, carry_temporal=False, remat=bool(config.get("remat"))
  )
  if config.dtype is not None:
    base = dataclasses.replace(base, dtype=jnp.dtype(config.dtype))
  return vae.VAE(base)


def frozen_vae(config) -> tuple[vae.VAE, dict]:
  """The VAE of `config.vae.path`, or random weights with a warning.

  Raises:
    InputError: the path holds no VAE.
  """
  if config.path:
    return load_vae(config.path, config.dtype)
  logging.warning(
    "config.vae.path is empty: the VAE has RANDOM weights; images will be "
    "meaningless"
  )
  module = new_vae(config)
  init = jax.jit(lambda key: vae.init_variables(module, key))
  return module, init(jax.random.key(0))


def load_vae(path: str, dtype=None) -> tuple[vae.VAE, dict]:
  """A frozen VAE from a workdir, a VAE folder or a pipeline folder.

  Args:
    path: where it is.
    dtype: compute dtype; None is fp32.

  Raises:
    InputError: the path holds no VAE.
  """
  config, variables = model_folder.load_vae(path)
  if dtype is not None:
    config = dataclasses.replace(config, dtype=jnp.dtype(dtype))
  return vae.VAE(config), variables


def conditioner(
  config, vae_module: vae.VAE, mesh=None
) -> tuple[Conditioner, dict]:  # fmt: skip
  """The conditioner of `config.text` and the encoder's parameters.

  Args:
    config: `config.text`: path of a Qwen3-VL or pipeline folder (empty: the
      built-in encoder of `width` channels), length, dtype.
    vae_module: the VAE that encodes reference images.
    mesh: where the parameters go, by the encoder's rule table; None leaves
      them on the host or one device.

  Raises:
    InputError: the path holds no such model.
  """

  def shardings(abstract):
    return tree_shardings(abstract, qwen3_vl.SHARDING_RULES, mesh)

  if config.path:
    dtype = jnp.dtype(config.dtype or "float32")
    encoder, params = encoder_folder.load(
      config.path, dtype=dtype, shardings=shardings if mesh else None
    )
    logging.info("text encoder: %s", encoder.description)
  else:
    encoder, params = built_in(config.width)
    logging.warning("text encoder: %s", encoder.description)
    if mesh:
      params = jax.device_put(params, shardings(params))
  return Conditioner(encoder, vae_module, config.length), params


def shift_config(config) -> ShiftConfig:
  """`config.flow.shift`'s fields as a frozen dataclass."""
  return ShiftConfig(**config.to_dict())


def sampling_config(config) -> SamplingConfig:
  """`config.sampling` with the run's shift, or a student's own levels."""
  sampling = SamplingConfig(
    steps=config.sampling.steps,
    guidance=config.sampling.guidance,
    batch_size=config.sampling.batch_size,
    shift=shift_config(config.flow.shift),
  )
  if config.objective != "dmd":
    return sampling
  sigmas = tuple(config.dmd.sigmas)
  # Guidance was distilled with the rest.
  return dataclasses.replace(
    sampling, steps=len(sigmas), guidance=1.0, shift=None, sigmas=sigmas
  )
