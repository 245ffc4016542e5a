# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints by Orbax.

A training checkpoint is `state` (arrays) beside `meta` (JSON: data position
and fingerprint); it appears under its final name only when complete.
"""

import os
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp

from qi2_jax.errors import InputError
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
