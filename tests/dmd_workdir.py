# SPDX-License-Identifier: Apache-2.0
"""A workdir as a distillation leaves it, without the training."""

import json

import jax
import tiny_models

from experiments import dmd
from qi2_jax.interop import model_folder
from qi2_jax.models import mmdit, vae
from qi2_jax.training import build, checkpoints

SIGMAS = (1.0, 0.9, 0.75, 0.5)


def config(**fields):
  """The smoke variant with one update of the fake score per step."""
  out = dmd.get_config("smoke")
  out.data.batch_size, out.dmd.ratio = 4, 1
  out.data.path, out.init = "/nowhere", "/nowhere"
  out.dmd.teacher_steps = 2
  out.dmd.held_out_prompts = ("a red circle", "a blue square")
  out.dmd.held_out_samples = 2
  out.sampling.batch_size = 4
  with out.unlocked():
    out.update_from_flattened_dict(fields)
  return out


def module(run_config) -> mmdit.MMDiT:
  """The MMDiT of a run with the built-in encoder."""
  z_dim = vae.PRESETS[run_config.vae.preset].z_dim
  width = run_config.text.width
  return mmdit.MMDiT(build.mmdit_config(run_config.model, z_dim, width))


def create(path, seed: int = 0, **fields) -> str:
  """Random weights, none of them zero, as the averaged ones of step 1."""
  path.mkdir()
  made = config(**fields)
  (path / "config.json").write_text(json.dumps(made.to_dict()))
  autoencoder = build.new_vae(made.vae)
  variables = vae.init_variables(autoencoder, jax.random.key(seed))
  model_folder.save_vae(str(path / "vae"), autoencoder.config, variables)
  params = tiny_models.mmdit_params(module(made), seed)
  store = checkpoints.CheckpointStore(str(path))
  store.save(1, {"ema": jax.tree.map(jax.numpy.asarray, params)}, {})
  store.close()
  return str(path)
