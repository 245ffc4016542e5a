# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints by Orbax.

A training checkpoint is `state` (arrays) beside `meta` (JSON: data position
and fingerprint); it appears under its final name only when complete.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from qi2_jax.errors import InputError
from qi2_jax.parallel import distributed
from qi2_jax.parallel.sharding import path_name

T = TypeVar("T")
# How reading a checkpoint ended; of several processes the largest counts.
_FINE, _DAMAGED, _FAILED = range(3)


class Unreadable(InputError):
  """A checkpoint whose files are damaged."""


class CheckpointStore:
  """Numbered training checkpoints under `<workdir>/checkpoints`.

  Opening it to write removes half-written leftovers of a killed run.
  """

  def __init__(
    self, workdir: str, *, keep: int = 2, keep_every: int = 0,
    read_only: bool = False,
  ):  # fmt: skip
    """Opens (and unless `read_only` creates) the folder.

    Args:
      workdir: the run's folder.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints of its multiples stay for good; 0: none do.
      read_only: nothing is created or removed.

    Raises:
      InputError: nothing to read there, or it cannot be written.
    """
    self._workdir = workdir
    path = os.path.abspath(os.path.join(workdir, "checkpoints"))
    if read_only and not os.path.isdir(path):
      raise InputError(
        f"{workdir} holds no checkpoints; train there first or pass another "
        "workdir."
      )
    self._read_only = read_only
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, keep_period=keep_every or None,
      create=not read_only, read_only=read_only,
      cleanup_tmp_directories=not read_only,
    )  # fmt: skip
    if not read_only:
      _check_writable(path)
    self._manager = ocp.CheckpointManager(
      path, options=options, item_names=("state", "meta")
    )

  def latest(self) -> int | None:
    """Newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state, meta: Mapping) -> None:
    """Starts an asynchronous save of `step` (no-op if it exists).

    Raises:
      InputError: this save, or the one before it, cannot be written.
    """
    if step in self._manager.all_steps():
      return
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))
    )
    with self._writing():
      # Orbax waits ten minutes for a folder that it cannot make.
      _probe(self._manager.directory)
      self._manager.save(step, args=args)

  @contextlib.contextmanager
  def _writing(self):
    """Turns a failed write into a sentence; complete checkpoints stay."""
    try:
      yield
    # Full disks come as OSError from Python, as ValueError from TensorStore.
    except (OSError, ValueError) as error:
      self._manager.reload()
      latest = self.latest()
      saved = "no step has" if latest is None else f"step {latest} has"
      raise InputError(
        f"cannot save a checkpoint under {self._manager.directory} "
        f"({_reason(error)}); free space or make it writable and run the same "
        f"command: {saved} been saved."
      ) from error

  def newest(self, read: Callable[[int], T]) -> tuple[int, T] | None:
    """`(step, read(step))` of the newest step that can be read.

    Every process must call it. A step counts only if all of them could read
    it: a file system may show each host something else, and processes that
    went on from different steps would wait for each other forever.

    Damaged newer ones are moved to `<workdir>/unreadable_checkpoints` (not if
    the store is read-only), so that the run can save those steps again and
    nothing is deleted.

    Args:
      read: of one step, without waiting for other processes.

    Returns:
      None if there are no checkpoints.

    Raises:
      InputError: none can be read, or `read` failed on any process for
        another reason than damage.
    """
    damaged, reason = [], ""
    while (step := self._newest_below(damaged)) >= 0:
      value, error = _outcome(read, step)
      worst = _largest(_grade(error))
      if worst == _FINE:
        if damaged:
          self._report(damaged, reason, step)
        return step, value
      if worst == _FAILED and _grade(error) == _FAILED:
        raise error
      if worst == _FAILED:
        raise InputError(
          f"another process cannot restore checkpoint {step}; see its log."
        )
      del value  # Room for the next one.
      damaged.append(step)
      cause = _reason(error) if error else "by another process"
      reason = reason or cause
    if damaged:
      raise InputError(
        f"no checkpoint under {self._manager.directory} can be read "
        f"({reason}); restore the files, or remove them to start again."
      )
    return None

  def _newest_below(self, tried: list[int]) -> int:
    """The newest step below those `tried` that any process sees, or -1."""
    bound = min(tried, default=float("inf"))
    steps = (s for s in self._manager.all_steps() if s < bound)
    return _largest(max(steps, default=-1))

  def _report(self, damaged: list[int], reason: str, step: int) -> None:
    """Warns that a run goes back to `step`, and makes room for its saves."""
    where = (
      ""
      if self._read_only
      else (f"; the damaged files are in {self._set_aside(damaged)}")
    )
    logging.warning(
      "checkpoint %s cannot be read (%s): going back to step %d%s",
      ", ".join(map(str, damaged)), reason, step, where,
    )  # fmt: skip

  def _set_aside(self, steps: list[int]) -> str:
    """Moves checkpoints out of the way; returns the folder they are in."""
    folder = os.path.join(self._workdir, "unreadable_checkpoints")

    def move():
      for step in steps:
        source = os.path.join(self._manager.directory, str(step))
        if os.path.isdir(source):  # Else only other processes see it.
          os.makedirs(folder, exist_ok=True)
          os.rename(source, tempfile.mkdtemp(prefix=f"{step}_", dir=folder))

    distributed.on_first(move)
    self._manager.reload()
    return folder

  def restore_newest(self, abstract):
    """Restores the newest readable `(state, meta)`; None if there is none.

    Raises:
      InputError: as `newest`.
    """
    found = self.newest(lambda step: self.restore(step, abstract))
    return found and found[1]

  def restore(self, step: int, abstract):
    """Restores `(state, meta)` onto the shardings of `abstract`.

    Raises:
      Unreadable: the files are damaged.
      InputError: the saved arrays are of another model.
    """
    check_same_tree(self._saved(step), abstract, f"checkpoint {step}")
    with self._reading(step):
      state = _read_arrays(self._path(step, "state"), abstract)
      with _alone(ocp.JsonCheckpointHandler) as reader:
        return state, reader.restore(self._path(step, "meta"))

  def restore_part(self, step: int, name: str, abstract):
    """Restores one subtree (e.g. `ema`) without reading the others.

    Raises:
      Unreadable: the files are damaged.
      InputError: the saved arrays are of another model.
    """
    item = {name: abstract}
    saved = {name: self._saved(step).get(name, {})}
    check_same_tree(saved, item, f"checkpoint {step}")
    with self._reading(step):
      return _read_arrays(self._path(step, "state"), item, partial=True)[name]

  def saved_part(self, step: int, name: str) -> dict:
    """Shapes and dtypes of one saved subtree, as nested dicts.

    Raises:
      Unreadable: the files are damaged.
    """
    return self._saved(step).get(name, {})

  def _path(self, step: int, part: str) -> str:
    return os.path.join(str(self._manager.directory), str(step), part)

  @contextlib.contextmanager
  def _reading(self, step: int):
    """Turns damage into a sentence."""
    try:
      yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
      raise  # A sound checkpoint, but not for this model or this memory.
    except Exception as error:  # Orbax raises many kinds, plain ones too.
      raise Unreadable(
        f"checkpoint {step} under {self._manager.directory} cannot be read "
        f"({_reason(error)}); restore its files or use another step."
      ) from error

  def _saved(self, step: int) -> dict:
    """Shapes of the saved arrays, as nested dicts."""
    with self._reading(step), _alone(ocp.PyTreeCheckpointHandler) as reader:
      metadata = reader.metadata(self._path(step, "state")).item_metadata
      if metadata is None:
        raise ValueError("its list of arrays is damaged")
      return metadata.tree

  def close(self) -> None:
    """Waits for saves in flight and releases the folder.

    Raises:
      InputError: a save could not be written.
    """
    with self._writing():
      try:
        self._manager.wait_until_finished()
      finally:
        self._manager.close()


def _probe(folder) -> None:
  """Raises OSError unless a small file can be written to a folder."""
  with tempfile.TemporaryFile(dir=folder) as file:
    file.write(bytes(4096))


def _check_writable(folder: str) -> None:
  """Finds out before any training; Orbax would at the first save."""
  try:
    os.makedirs(folder, exist_ok=True)
    _probe(folder)
  except OSError as error:
    raise InputError(
      f"cannot write checkpoints to {folder} ({error.strerror}); make it "
      "writable or choose another workdir."
    ) from error


def _outcome(read: Callable[[int], T], step: int):
  """`(value, None)` or `(None, error)`."""
  try:
    return read(step), None
  except Exception as error:
    return None, error


def _grade(error: Exception | None) -> int:
  if error is None:
    return _FINE
  return _DAMAGED if isinstance(error, Unreadable) else _FAILED


def _largest(own: int) -> int:
  """The largest of all processes' numbers."""
  if jax.process_count() == 1:
    return own
  return int(multihost_utils.process_allgather(np.int32(own)).max())


def _alone(handler):
  """A reader that waits for no other process: any of them may fail."""
  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}"
  )
  return ocp.Checkpointer(
    handler(multiprocessing_options=options), multiprocessing_options=options
  )


def _read_arrays(path: str, item, partial: bool = False):
  """The arrays of `item` (shapes, dtypes, shardings) in a `state` folder."""
  args = ocp.args.PyTreeRestore(
    item=item,
    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
    partial_restore=partial,
  )
  with _alone(ocp.PyTreeCheckpointHandler) as reader:
    return reader.restore(path, args=args)


def _reason(error: Exception) -> str:
  """The cause of an error in a few words."""
  while error.__cause__ is not None:
    error = error.__cause__
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error).strip()
  # TensorStore: "...: No space left on device [os_error_code='28' ...".
  found = re.search(r"([^:]+?) \[os_error_code", text)
  return found[1].strip() if found else text.partition("\n")[0][:200]


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
