# SPDX-License-Identifier: Apache-2.0
"""The weights that a run starts from, and those that it has made.

A LoRA run's checkpoints hold factors only. `base.json` in its workdir says
where the frozen weights beneath them are; they are not copied. A checksum
notices when they are no longer what the factors were trained on.
"""

import dataclasses
import json
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from qi2_jax.errors import InputError
from qi2_jax.evaluation.store import write_json
from qi2_jax.interop import model_folder
from qi2_jax.models import lora, mmdit, vae
from qi2_jax.parallel import distributed, sharding
from qi2_jax.training import adapter, checkpoints

_BASE_FILE = "base.json"


@dataclasses.dataclass(frozen=True)
class Base:
  """Where the frozen weights of a LoRA run are.

  Attributes:
    path: workdir or pipeline folder.
    step: of the workdir's checkpoint, None for a folder.
    checksum: see `checksum`.
  """

  path: str
  step: int | None
  checksum: int


def initial_params(path: str, abstract, step: int | None = None):
  """EMA weights of a workdir, or the model of a folder.

  Args:
    path: `config.init`. Of a LoRA run come the merged weights.
    abstract: shapes, dtypes and shardings of the parameters.
    step: checkpoint of the workdir; the newest readable one if None.

  Raises:
    InputError: the path holds neither, or another model.
  """
  return initial(path, abstract, step)[0]


def initial(path: str, abstract, step: int | None = None):
  """`(params, step)` as `initial_params`; of a folder the step is None."""
  if "encoder" in abstract and not checkpoints.has_checkpoint(path):
    return _vae_params(path, abstract), None
  if model_folder.is_pipeline_folder(path):
    return _folder_params(path, abstract), None
  source = checkpoints.CheckpointStore(path, read_only=True)
  params, step = run_params(path, source, step, abstract)
  source.close()
  logging.info("starting from the EMA of %s, step %d", path, step)
  return params, step


def _folder_params(path: str, abstract):
  model_folder.check_pipeline_folder(path)
  shapes = model_folder.abstract_mmdit(model_folder.mmdit_config(path))
  checkpoints.check_same_tree(shapes, abstract, path)
  _, params = model_folder.load_mmdit(
    path, dtype=jnp.float32,
    shardings=lambda _: jax.tree.map(lambda a: a.sharding, abstract),
  )  # fmt: skip
  logging.info("starting from the transformer of %s", path)
  return params


def _vae_params(path: str, abstract):
  """The VAE of its own or of a pipeline folder."""
  mesh = jax.tree.leaves(abstract)[0].sharding.mesh
  _, variables = model_folder.load_vae(
    path, dtype=jnp.float32,
    shardings=lambda t: sharding.tree_shardings(t, vae.SHARDING_RULES, mesh),
  )  # fmt: skip
  checkpoints.check_same_tree(variables["params"], abstract, path)
  logging.info("starting from the VAE of %s", path)
  return variables["params"]


def _read(path: str, store, step: int | None, read: Callable):
  """`(read(step), step)`; None stands for the newest readable step."""
  if step is not None:
    return read(step), step
  found = store.newest(read)
  if found is None:
    raise InputError(
      f"{path} holds no finished checkpoint yet; train on first."
    )
  step, value = found
  return value, step


def placed(module: mmdit.MMDiT, mesh):
  """Shapes, dtypes and shardings of an MMDiT's parameters on a mesh."""
  abstract = model_folder.abstract_mmdit(module.config)
  return sharding.on_mesh(abstract, mmdit.SHARDING_RULES, mesh)


def run_params(path: str, store, step: int | None, abstract):
  """EMA weights of a run; of a LoRA run its base with the factors merged.

  Args:
    path: the workdir.
    store: its checkpoints.
    step: which of them; the newest readable one if None.
    abstract: shapes, dtypes and shardings of the whole model.

  Returns:
    `(params, step)`.

  Raises:
    InputError: no checkpoint, a damaged one, another model, or a LoRA's base
      is gone or has changed.
  """
  base = _read_base(path)
  if base is None:
    part = lambda step: store.restore_part(step, "ema", abstract)  # noqa: E731
    return _read(path, store, step, part)
  params = _checked(base, path, abstract)
  factors, step = run_adapter(path, store, step)
  places = jax.tree.map(lambda a: a.sharding, abstract)
  one = jax.tree.leaves(places)[0]
  if isinstance(one, jax.NamedSharding):
    everywhere = jax.NamedSharding(one.mesh, jax.P())
    factors = jax.device_put(jax.device_get(factors), everywhere)
  merge = jax.jit(lora.merge, donate_argnums=0, out_shardings=places)
  return merge(params, factors), step


def run_adapter(path: str, store, step: int | None) -> tuple[lora.Lora, int]:
  """The EMA of a LoRA run's factors, on one device; its base is not read.

  Args:
    path: the workdir.
    store: its checkpoints.
    step: which of them; the newest readable one if None.

  Returns:
    `(adapter, step)`.

  Raises:
    InputError: the run trained all parameters, or as `run_params`.
  """
  with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
    config = adapter.from_config(ConfigDict(json.load(file)))
  if config is None:
    raise InputError(
      f"{path} trained all parameters and holds no adapter; give a folder "
      "name as the target."
    )
  place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def factors(step):
    abstract = jax.tree.map(
      lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place),
      store.saved_part(step, "ema"),
    )
    return store.restore_part(step, "ema", abstract)

  found, step = _read(path, store, step, factors)
  return adapter.to_lora(config, found), step


def own_base(init: str, workdir: str, abstract):
  """The frozen weights of a LoRA run; its first start writes `base.json`.

  Args:
    init: `config.init`; a resumed run may find its base in a new place.
    workdir: of the LoRA run.
    abstract: shapes, dtypes and shardings of the base.

  Raises:
    InputError: no base, itself a LoRA run, or not the one that the run
      began with.
  """
  init = os.path.abspath(init)
  old = None
  if checkpoints.has_checkpoint(workdir):
    old = _read_base(workdir)
  if old is None:
    if os.path.isfile(os.path.join(init, _BASE_FILE)):
      raise InputError(
        f"config.init={init} is itself a LoRA run; export it to a folder with "
        "python -m qi2_jax.convert export and start from that."
      )
    params, step = initial(init, abstract)
    new = Base(init, step, checksum(params))
  else:
    new = dataclasses.replace(old, path=init)
    params = _checked(new, workdir, abstract)
  if new != old:
    distributed.on_first(lambda: _write_base(workdir, new))
  return params


def check_base(workdir: str) -> None:
  """Raises InputError if a LoRA run's base is gone; reads no weights."""
  base = _read_base(workdir)
  if base is not None:
    _place(base, workdir)


def _place(base: Base, workdir: str) -> str:
  """The folder that holds the base's weights."""
  where = base.path
  if base.step is not None:
    where = os.path.join(where, "checkpoints", str(base.step))
  if not os.path.isdir(where):
    raise InputError(
      f"the base of the LoRA run {workdir} is gone: {where} does not exist; "
      "put it back, or write its new place into "
      f"{os.path.join(workdir, _BASE_FILE)} (and config.init to train on)."
    )
  return where


def _checked(base: Base, workdir: str, abstract):
  """The base's weights, if they are still what the LoRA was trained on."""
  where = _place(base, workdir)
  params = initial_params(base.path, abstract, base.step)
  if checksum(params) != base.checksum:
    raise InputError(
      f"{where} has other weights than those that the LoRA run {workdir} was "
      "trained on; put the old ones back."
    )
  return params


def checksum(params) -> int:
  """A number that any changed bit of fp32 weights changes.

  Sums of integers are exact, so shardings and reduction orders do not matter;
  a hash would need all weights on the host.
  """

  def total(tree):
    out = jnp.uint32(0)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
      bits = jax.lax.bitcast_convert_type(
        leaf.astype(jnp.float32), jnp.uint32
      )  # fmt: skip
      out += jnp.uint32(2 * i + 1) * jnp.sum(bits, dtype=jnp.uint32)
    return out

  return int(jax.jit(total)(params))


def _read_base(workdir: str) -> Base | None:
  path = os.path.join(workdir, _BASE_FILE)
  if not os.path.isfile(path):
    return None
  try:
    with open(path, encoding="utf-8") as file:
      return Base(**json.load(file))
  except (ValueError, TypeError) as error:
    raise InputError(
      f"{path} cannot be read ({error}); it needs path, step and checksum."
    ) from error


def _write_base(workdir: str, base: Base) -> None:
  path = os.path.join(workdir, _BASE_FILE)
  write_json(path, dataclasses.asdict(base))
