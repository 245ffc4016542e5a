# SPDX-License-Identifier: Apache-2.0
"""Component folders in and out: native (Orbax) and published (safetensors).

Both kinds hold a config.json in the published form. Native weights lie in
`variables/` with the layers stacked (see `native_arrays`).
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator

import jax
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.interop import mapping, mmdit, native_arrays, vae
from qi2_jax.interop.published import check_class, read_json, write_json
from qi2_jax.interop.safetensors_io import open_tensors, write_tensors
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig, init_params
from qi2_jax.models.vae import VAE, VAEConfig, init_variables
from qi2_jax.parallel.sharding import path_name

STEM = "diffusion_pytorch_model"
PIPELINE_CLASS = "QwenImage21Pipeline"

Shardings = Callable | None


def is_pipeline_folder(path: str) -> bool:
  """Whether `path` holds all parts of a pipeline."""
  return not _missing(path)


def _missing(path: str) -> list[str]:
  parts = (
    "model_index.json", "transformer/config.json", "vae/config.json",
    "text_encoder/config.json", "scheduler/scheduler_config.json",
  )  # fmt: skip
  out = [p for p in parts if not os.path.isfile(os.path.join(path, p))]
  if not any(
    os.path.isdir(os.path.join(path, name))
    for name in ("processor", "tokenizer")
  ):
    out.append("processor/")
  return out


def check_pipeline_folder(path: str) -> None:
  """Checks that `path` holds all parts of a pipeline of our class.

  Raises:
    InputError: it does not exist, or parts are missing.
  """
  if not os.path.isdir(path):
    raise InputError(f"the model folder {path} does not exist.")
  missing = _missing(path)
  if missing:
    raise InputError(
      f"{path} is no Qwen-Image-2.x pipeline folder: it has no "
      f"{' and no '.join(missing)}; pass a complete download."
    )
  with _naming(os.path.join(path, "model_index.json")) as file:
    check_class(read_json(file), PIPELINE_CLASS)


def component(path: str, name: str) -> str:
  """The component folder `name` of a pipeline folder, or `path` itself."""
  nested = os.path.join(path, name)
  return os.path.abspath(nested if os.path.isdir(nested) else path)


def is_native(path: str) -> bool:
  """Whether a component folder holds Orbax arrays."""
  return os.path.isdir(os.path.join(path, native_arrays.FOLDER))


def load_mmdit(
  path: str, *, dtype=None, shardings: Shardings = None
) -> tuple[MMDiTConfig, dict]:
  """Reads the MMDiT of a component or pipeline folder of either kind.

  Args:
    path: the folder, or its pipeline folder.
    dtype: of the parameters; None keeps the file's.
    shardings: `abstract params -> shardings`, e.g. a `tree_shardings` by
      the model's rules; None puts all on the first local device.

  Returns:
    `(config, params)`.

  Raises:
    InputError: no such model, a variant that is not supported, damaged
      files, or weights that do not fit the config.
  """
  path = component(path, "transformer")
  config = mmdit_config(path)
  abstract = abstract_mmdit(config)
  return config, _load(path, abstract, mmdit.table, dtype, shardings)


def open_mmdit(path: str) -> tuple[MMDiTConfig, dict]:
  """`load_mmdit`, but a native folder's arrays stay on disk.

  The leaves are then tensorstore handles, which `export_mmdit` reads layer
  by layer.
  """
  path = component(path, "transformer")
  if not is_native(path):
    return load_mmdit(path)
  config = mmdit_config(path)
  return config, native_arrays.open_lazily(path, abstract_mmdit(config))


def mmdit_config(path: str) -> MMDiTConfig:
  """The config of the MMDiT in a component or pipeline folder.

  Raises:
    InputError: no such model, or a variant that is not supported.
  """
  path = component(path, "transformer")
  _check_exists(path, "MMDiT", "pass a pipeline folder or its transformer/")
  with _naming(os.path.join(path, "config.json")) as file:
    return mmdit.config(read_json(file))


def abstract_mmdit(config: MMDiTConfig) -> dict:
  """Shapes of the MMDiT's parameters."""
  return jax.eval_shape(lambda: init_params(MMDiT(config), jax.random.key(0)))


def load_vae(
  path: str, *, dtype=None, shardings: Shardings = None
) -> tuple[VAEConfig, dict]:
  """Reads the VAE of a component folder, a pipeline folder or a workdir.

  Args:
    path: the folder, or the folder that holds it as `vae`.
    dtype: of the parameters; None keeps the file's.
    shardings: `abstract params (and carried, merged) -> shardings`.

  Returns:
    `(config, variables)`: `params`, fp32 `latent_stats`, and the temporal
    kernels as `carried` if the folder has them (then `carry_temporal`).

  Raises:
    InputError: as `load_mmdit`.
  """
  path = component(path, "vae")
  config, abstract, stats = _vae_config(path)
  tree = _load(path, abstract, vae.table, dtype, shardings)
  return config, _vae_variables(tree, stats)


def open_vae(path: str) -> tuple[VAEConfig, dict]:
  """`load_vae`, but a native folder's arrays stay on disk."""
  path = component(path, "vae")
  if not is_native(path):
    return load_vae(path)
  config, abstract, stats = _vae_config(path)
  return config, _vae_variables(
    native_arrays.open_lazily(path, abstract), stats
  )


def _vae_variables(tree, stats) -> dict:
  params, carried = vae.split(tree)
  variables = {"params": params, "latent_stats": jax.tree.map(
    jax.numpy.asarray, stats
  )}  # fmt: skip
  return variables | ({"carried": carried} if carried else {})


def _vae_config(path: str) -> tuple[VAEConfig, dict, dict]:
  _check_exists(
    path, "VAE", "train one with experiments/vae.py and pass its workdir, or "
    "pass a pipeline folder",
  )  # fmt: skip
  with _naming(os.path.join(path, "config.json")) as file:
    published = read_json(file)
    config = vae.config(published)
    stats = vae.latent_stats(published)
  names = _names(path)
  carry = any("time_conv" in name for name in names)
  config = dataclasses.replace(config, carry_temporal=carry)
  return config, abstract_vae(config), stats


def abstract_vae(config: VAEConfig) -> dict:
  """Shapes of the VAE's `params` and `carried`, merged into one tree."""
  tree = jax.eval_shape(lambda: init_variables(VAE(config), jax.random.key(0)))
  return vae.merge(tree["params"], tree.get("carried", {}))


def check_weights(path: str) -> int:
  """Checks both models of a pipeline folder without reading their arrays.

  Returns:
    Bytes of all parameters.

  Raises:
    InputError: as `load_mmdit` and `load_vae`.
  """
  total = 0
  folder = component(path, "transformer")
  abstract = abstract_mmdit(mmdit_config(folder))
  stored = [_stored(folder, abstract, mmdit.table)]
  folder = component(path, "vae")
  _, abstract, _ = _vae_config(folder)
  stored.append(_stored(folder, abstract, vae.table))
  for leaf in jax.tree.leaves(stored):
    total += leaf.size * np.dtype(leaf.dtype).itemsize
  return total


def save_mmdit(path: str, config: MMDiTConfig, params) -> None:
  """Writes a native MMDiT folder, replacing an older model folder.

  Raises:
    InputError: `path` exists and is something else (it is left alone), or
      the disk is full.
  """
  with _replacing(path) as temporary:
    write_json(os.path.join(temporary, "config.json"), mmdit.native(config))
    native_arrays.save(os.path.join(temporary, native_arrays.FOLDER), params)


def save_vae(path: str, config: VAEConfig, variables) -> None:
  """Writes a native VAE folder, replacing an older model folder.

  Raises:
    InputError: `path` exists and is something else (it is left alone), or
      the disk is full.
  """
  native = vae.native(config, variables["latent_stats"])
  tree = vae.merge(variables["params"], variables.get("carried", {}))
  with _replacing(path) as temporary:
    write_json(os.path.join(temporary, "config.json"), native)
    native_arrays.save(os.path.join(temporary, native_arrays.FOLDER), tree)


def export_mmdit(path: str, config: MMDiTConfig, params, *, dtype=None) -> None:
  """Writes a transformer folder that diffusers loads.

  Args:
    path: new folder.
    config: of the model.
    params: jax, numpy or tensorstore arrays, read one layer at a time.
    dtype: of the file; None keeps each array's own.

  Raises:
    InputError: the folder exists, or diffusers cannot express the variant.
  """
  published = mmdit.published(config)
  plan, tensors = mapping.iter_export(params, mmdit.table, dtype=dtype)
  _export(path, published, plan, tensors)


def export_vae(path: str, config: VAEConfig, variables, *, dtype=None) -> None:
  """Writes a vae folder that diffusers loads; see `export_mmdit`.

  A VAE trained here has no temporal kernels. diffusers declares them, so
  zeros are written; images never use them.

  Raises:
    InputError: the folder exists.
  """
  published = vae.published(config, variables["latent_stats"])
  params = variables["params"]
  carried = variables.get("carried") or _zero_temporal(config, params)
  tree = vae.merge(params, carried)
  plan, tensors = mapping.iter_export(tree, vae.table, dtype=dtype)
  _export(path, published, plan, tensors)


def _zero_temporal(config: VAEConfig, params) -> dict:
  config = dataclasses.replace(config, carry_temporal=True)
  _, abstract = vae.split(abstract_vae(config))
  dtype = mapping.numpy_dtype(jax.tree.leaves(params)[0])
  return jax.tree.map(lambda a: np.zeros(a.shape, dtype), abstract)


def _export(path: str, published: dict, plan, tensors) -> None:
  if os.path.exists(path):
    raise InputError(f"{path} exists; choose a new folder for the export.")
  with _replacing(path) as temporary:
    write_json(os.path.join(temporary, "config.json"), published)
    write_tensors(temporary, STEM, plan, tensors)


def _check_exists(path: str, what: str, remedy: str) -> None:
  weights = is_native(path) or any(
    os.path.isfile(os.path.join(path, f"{STEM}.safetensors{tail}"))
    for tail in ("", ".index.json")
  )
  config = os.path.isfile(os.path.join(path, "config.json"))
  if not config and not weights:
    raise InputError(f"{path} holds no {what}; {remedy}.")


@contextlib.contextmanager
def _naming(file: str) -> Iterator[str]:
  """Puts the whole path into the errors about a config file."""
  try:
    yield file
  except InputError as error:
    message = str(error)
    if file not in message:
      message = f"{file}: {message}"
    raise InputError(message) from None


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
  """A temporary folder that becomes `path` when the block succeeds."""
  path = os.path.abspath(path)
  if os.path.exists(path) and not is_native(path):
    raise InputError(
      f"{path} is in the way and is no model folder of this program; choose "
      "another place."
    )
  temporary, old = f"{path}.tmp-{os.getpid()}", f"{path}.old-{os.getpid()}"
  shutil.rmtree(temporary, ignore_errors=True)
  os.makedirs(temporary)
  try:
    yield temporary
    if os.path.exists(path):
      os.replace(path, old)
    os.replace(temporary, path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _names(path: str) -> list[str]:
  if not is_native(path):
    return list(open_tensors(path, STEM).names)
  leaves = jax.tree_util.tree_leaves_with_path(native_arrays.saved(path))
  return [path_name(p) for p, _ in leaves]


def _stored(path: str, abstract, table):
  """`abstract` with the dtypes on disk, once names and shapes fit it."""
  if is_native(path):
    return native_arrays.check(path, abstract)
  return mapping.stored_dtypes(open_tensors(path, STEM), abstract, table)


def _load(path: str, abstract, table, dtype, shardings: Shardings):
  """Arrays of either kind of folder."""
  abstract = _stored(path, abstract, table)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  places = (
    shardings(abstract) if shardings is not None
    else jax.tree.map(lambda _: device, abstract)
  )  # fmt: skip
  abstract = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=s),
    abstract, places,
  )  # fmt: skip
  if is_native(path):
    return native_arrays.restore(path, abstract)
  return mapping.load_tree(open_tensors(path, STEM), abstract, table)
