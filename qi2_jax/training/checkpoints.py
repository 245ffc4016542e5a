# SPDX-License-Identifier: Apache-2.0
"""Orbax behind one file: training checkpoints and frozen model folders.

A training checkpoint is `state` (arrays) beside `meta` (JSON: data position
and fingerprint). A model folder is `config.json` beside `variables`. Both
appear under their final name only when complete.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from qi2_jax.errors import InputError
from qi2_jax.models.vae import VAE, VAEConfig, init_variables
from qi2_jax.parallel.sharding import path_name


class CheckpointStore:
  """Numbered training checkpoints under `<workdir>/checkpoints`.

  Opening it to write removes half-written leftovers of a killed run.
  """

  def __init__(self, workdir: str, *, keep: int = 2, read_only: bool = False):
    """Opens (and unless `read_only` creates) the folder."""
    path = os.path.abspath(os.path.join(workdir, "checkpoints"))
    if read_only and not os.path.isdir(path):
      raise InputError(
        f"{workdir} holds no checkpoints; train there first or pass another "
        "workdir."
      )
    self._manager = ocp.CheckpointManager(
      path,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=not read_only, read_only=read_only,
        cleanup_tmp_directories=not read_only,
      ),
      item_names=("state", "meta"),
    )  # fmt: skip

  def latest(self) -> int | None:
    """Newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state, meta: Mapping) -> None:
    """Starts an asynchronous save of `step` (no-op if it exists)."""
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))
      ),
    )

  def restore(self, step: int, abstract):
    """Restores `(state, meta)` onto the shardings of `abstract`.

    Raises:
      InputError: the saved arrays are of another model.
    """
    check_same_tree(self._saved(step), abstract, f"checkpoint {step}")
    out = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract),
        meta=ocp.args.JsonRestore(),
      ),
    )
    return out["state"], out["meta"]

  def restore_part(self, step: int, name: str, abstract):
    """Restores one subtree (e.g. `ema`) without reading the others.

    Raises:
      InputError: the saved arrays are of another model.
    """
    item = {name: abstract}
    saved = {name: self._saved(step).get(name, {})}
    check_same_tree(saved, item, f"checkpoint {step}")
    with ocp.PyTreeCheckpointer() as reader:
      args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
      )
      return reader.restore(self._path(step), args=args)[name]

  def _path(self, step: int) -> str:
    return os.path.join(str(self._manager.directory), str(step), "state")

  def _saved(self, step: int) -> dict:
    """Shapes of the saved arrays, as nested dicts."""
    with ocp.PyTreeCheckpointer() as reader:
      return reader.metadata(self._path(step)).item_metadata.tree

  def close(self) -> None:
    """Waits for saves in flight and releases the folder."""
    self._manager.wait_until_finished()
    self._manager.close()


def _shapes(tree) -> dict[str, tuple]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def check_same_tree(saved, wanted, what: str) -> None:
  """Raises InputError naming the first array that differs."""
  saved, wanted = _shapes(saved), _shapes(wanted)
  for name in sorted(saved.keys() | wanted.keys()):
    if saved.get(name) != wanted.get(name):
      raise InputError(
        f"{what} is of another model: {name} has shape "
        f"{saved.get(name, 'nothing')} there and "
        f"{wanted.get(name, 'nothing')} here; check the model config."
      )


def has_checkpoint(workdir: str) -> bool:
  """Whether a run in `workdir` has saved at least one complete step."""
  path = os.path.join(workdir, "checkpoints")
  return os.path.isdir(path) and any(n.isdigit() for n in os.listdir(path))


def save_vae(path: str, config: VAEConfig, variables) -> None:
  """Writes a self-contained VAE folder, replacing an older one.

  Raises:
    InputError: `path` exists and is something else; it is left alone.
  """
  path = os.path.abspath(path)
  if os.path.exists(path) and not os.path.isdir(f"{path}/variables"):
    raise InputError(
      f"{path} is in the way of the run's own copy of the VAE and is none; "
      "choose another --workdir."
    )
  temporary = f"{path}.tmp-{os.getpid()}"
  shutil.rmtree(temporary, ignore_errors=True)
  os.makedirs(temporary)
  fields = dataclasses.asdict(config)
  fields["dtype"] = np.dtype(config.dtype).name
  with open(os.path.join(temporary, "config.json"), "w") as file:
    json.dump(fields, file, indent=2)
  with ocp.StandardCheckpointer() as writer:
    writer.save(os.path.join(temporary, "variables"), variables)
  shutil.rmtree(path, ignore_errors=True)
  os.replace(temporary, path)


def load_vae(path: str) -> tuple[VAE, dict]:
  """Reads a VAE folder, or the `vae` folder of a workdir.

  Returns:
    `(module, variables)` with the variables in host memory.

  Raises:
    InputError: there is none.
  """
  nested = os.path.join(path, "vae")
  path = os.path.abspath(nested if os.path.isdir(nested) else path)
  config_path = os.path.join(path, "config.json")
  if not os.path.isdir(os.path.join(path, "variables")):
    raise InputError(
      f"{path} holds no VAE; train one with experiments/vae.py and pass its "
      "workdir."
    )
  with open(config_path) as file:
    fields = json.load(file)
  for key, value in fields.items():
    if isinstance(value, list):
      fields[key] = tuple(value)
  fields["dtype"] = jnp.dtype(fields["dtype"])
  vae = VAE(VAEConfig(**fields))
  abstract = abstract_vae(vae)
  with ocp.StandardCheckpointer() as reader:
    variables = reader.restore(os.path.join(path, "variables"), abstract)
  return vae, variables


def abstract_vae(vae: VAE) -> dict:
  """Shapes of the VAE's variables."""
  return jax.eval_shape(lambda: init_variables(vae, jax.random.key(0)))
