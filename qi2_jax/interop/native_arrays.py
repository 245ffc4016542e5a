# SPDX-License-Identifier: Apache-2.0
"""Orbax arrays of a native model folder, under `variables/`.

Layers are stacked. The arrays are plain zarr in chunks that never span
layers: a sharded restore reads only its own chunks, and an export can read
one layer at a time.
"""

import concurrent.futures
import contextlib
import os

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from qi2_jax.errors import InputError
from qi2_jax.parallel.sharding import path_name

FOLDER = "variables"
# Few enough files for 7 B parameters, small enough that the chunks in flight
# need little memory.
_CHUNK_BYTES = 8 * 2**20


def save(path: str, tree) -> None:
  """Writes `tree` as an Orbax checkpoint.

  Raises:
    InputError: the file system refuses.
  """
  # One process writes alone: Orbax would wait for all of them.
  alone = ocp.options.MultiprocessingOptions(
    primary_host=jax.process_index(),
    active_processes={jax.process_index()},
    barrier_sync_key_prefix="native",
  )
  # OCDBT, the default, keeps all written data in memory until the end.
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False, multiprocessing_options=alone
  )
  # Chunks never span layers, so that one layer can be read alone.
  args = jax.tree_util.tree_map_with_path(
    lambda p, x: ocp.SaveArgs(
      chunk_byte_size=_CHUNK_BYTES,
      shard_axes=(0,) if path_name(p).startswith("blocks/") else (),
    ),
    tree,
  )

  def work():
    writer = ocp.Checkpointer(handler, multiprocessing_options=alone)
    with writer:
      writer.save(path, args=ocp.args.PyTreeSave(tree, save_args=args))

  # Orbax writes in threads that Ctrl-C does not stop, and that would fill
  # the folder again behind a clean-up. The pool's end waits for them.
  with _one_sentence(f"writing {path}"):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      pool.submit(work).result()


@contextlib.contextmanager
def _one_sentence(what: str):
  """Turns the many-line errors of the storage layers into one sentence."""
  try:
    yield
  except Exception as error:  # Orbax wraps storage errors in bare ones.
    cause: BaseException = error
    while cause.__cause__ is not None:
      cause = cause.__cause__
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    raise InputError(
      f"{what} failed ({reason}); check the disk and the folder."
    ) from error


def saved(path: str) -> dict:
  """Shapes and dtypes of a native folder's arrays, as nested dicts."""
  path = os.path.join(path, FOLDER)
  with _one_sentence(f"reading {path}"), ocp.StandardCheckpointer() as reader:
    found = reader.metadata(path).item_metadata
  if found is None:
    raise InputError(f"{path} holds no complete Orbax arrays; import again.")
  return found.tree


def check(path: str, abstract) -> dict:
  """`abstract` with the saved dtypes, once all shapes are equal.

  Raises:
    InputError: the saved arrays are of another model.
  """
  leaves = jax.tree_util.tree_leaves_with_path
  found = {path_name(p): leaf for p, leaf in leaves(saved(path))}
  wanted = {path_name(p): leaf.shape for p, leaf in leaves(abstract)}
  for name in sorted(found.keys() | wanted.keys()):
    shape = tuple(found[name].shape) if name in found else None
    if shape != wanted.get(name):
      raise InputError(
        f"{path} does not fit its config.json: {name} has shape "
        f"{shape or 'nothing'} in variables/ and "
        f"{wanted.get(name, 'nothing')} by the config; import it again."
      )
  return jax.tree_util.tree_map_with_path(
    lambda p, a: jax.ShapeDtypeStruct(a.shape, found[path_name(p)].dtype),
    abstract,
  )


def restore(path: str, abstract):
  """Reads all arrays onto the shardings and dtypes of `abstract`.

  Raises:
    InputError: the files are damaged.
  """
  path = os.path.join(path, FOLDER)
  with _one_sentence(f"reading {path}"), ocp.StandardCheckpointer() as reader:
    return reader.restore(path, abstract)


def open_lazily(path: str, abstract):
  """Tensorstore handles of a native folder's arrays.

  Orbax has no way to read a part of an array that is not a device's shard.
  """

  def one(key_path, _):
    name = ".".join(path_name(key_path).split("/"))
    return ts.open({
      "driver": "zarr",
      "kvstore": {
        "driver": "file", "path": os.path.join(path, FOLDER, name, ""),
      },
    }, open=True, read=True).result()  # fmt: skip

  return jax.tree_util.tree_map_with_path(one, check(path, abstract))
