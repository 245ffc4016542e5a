# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters <-> PEFT folders, diffusers files and our Orbax folders.

Names and scales of what can be read are in `lora_names`. Our own folder is
`config.json` beside the Orbax arrays in `variables`, ready for training.
"""

import collections
import json
import os
import shutil
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from flax import traverse_util

from qi2_jax.errors import InputError
from qi2_jax.interop.lora_names import Module, collect, module_name
from qi2_jax.models.lora import Lora, kernels, split_shape

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# Key of the PEFT config in a diffusers file's header, and our folder's mark.
_METADATA = "lora_adapter_metadata"
_KIND = {"kind": "qi2_jax.lora"}


def is_adapter(path: str) -> bool:
  """Whether `path` is a .safetensors file or a PEFT or diffusers folder."""
  if os.path.isfile(path):
    return path.endswith(".safetensors")
  return any(
    os.path.isfile(os.path.join(path, name))
    for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS)
  )


def is_native(folder: str) -> bool:
  """Whether `folder` was written by `save`."""
  try:
    with open(os.path.join(folder, "config.json")) as file:
      return json.load(file) == _KIND
  except (OSError, ValueError):
    return False


def _weights_file(path: str) -> str:
  if not os.path.isdir(path):
    return path
  for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS):
    if os.path.isfile(os.path.join(path, name)):
      return os.path.join(path, name)
  raise InputError(
    f"{path} holds neither {PEFT_WEIGHTS} nor {DIFFUSERS_WEIGHTS}; pass the "
    "adapter's .safetensors file."
  )


def _read_file(file: str) -> tuple[dict[str, np.ndarray], dict]:
  """Tensors, and the PEFT config from the folder or the file's header."""
  beside = os.path.join(os.path.dirname(file), PEFT_CONFIG)
  config = {}
  try:
    tensors = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, framework="np") as reader:
      header = reader.metadata() or {}
    if os.path.basename(file) == PEFT_WEIGHTS and os.path.isfile(beside):
      with open(beside) as text:
        config = json.load(text)
    elif _METADATA in header:
      # Pipelines prefix the fields with the component's name.
      config = json.loads(header[_METADATA])
      config = {k.removeprefix("transformer."): v for k, v in config.items()}
  except (OSError, safetensors.SafetensorError, ValueError) as error:
    raise InputError(
      f"the adapter {file} cannot be read ({error}); check the path or copy "
      "it again."
    ) from error
  return tensors, config


def _stack(path: str, shape, found: Mapping[int | None, Module]):
  """Factors and scale of a kernel; zero where a layer has none."""
  layer, inputs, outputs = split_shape(path, shape)
  first = next(iter(found.values()))
  rank = max(m.a.shape[0] for m in found.values())
  dtypes = {t.dtype for m in found.values() for t in (m.a, m.b)}
  dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
  count = layer[0] if layer else 1
  a = np.zeros((count, *inputs, rank), dtype)
  b = np.zeros((count, rank, *outputs), dtype)
  scales = np.full(count, first.scale, np.float32)
  for index, m in found.items():
    i, r = index or 0, m.a.shape[0]
    a[i, ..., :r] = m.a.T.reshape(*inputs, r)
    b[i, :r] = m.b.T.reshape(r, *outputs)
    scales[i] = m.scale
  if not layer:
    a, b = a[0], b[0]
  uniform = (scales == scales[0]).all()
  factors = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
  return factors, jnp.asarray(scales[0] if uniform else scales)


def read(path: str, abstract_mmdit_params) -> Lora:
  """Reads an adapter made by PEFT, diffusers, kohya or ComfyUI trainers.

  Dtypes stay as they are in the file. A layer that the file leaves out gets
  zero factors, and lower ranks are padded with zeros to the largest of their
  kernel: the result acts the same, but what was left out is not remembered
  and is written as zeros.

  Args:
    path: a .safetensors file, or a folder with one under PEFT's or
      diffusers' name.
    abstract_mmdit_params: parameters of the base model, or their shapes.

  Raises:
    InputError: unreadable file, another kind of adapter, or another model;
      the sentence names the first offending tensor.
  """
  file = _weights_file(path)
  tensors, config = _read_file(file)
  shapes = kernels(abstract_mmdit_params)
  found = collections.defaultdict(dict)
  for place, module in collect(file, tensors, config, shapes).items():
    found[place.path][place.layer] = module
  factors, scales = {}, {}
  for name in sorted(found):
    factors[name], scales[name] = _stack(name, shapes[name], found[name])
  return Lora(factors, scales)


def _alpha(scale: np.float32, rank: int) -> float | int:
  """Shortest alpha whose fp32 quotient by `rank` is `scale` again."""
  exact = float(scale) * rank
  for digits in range(1, 18):
    alpha = float(f"{exact:.{digits}g}")
    if np.float32(alpha / rank) == scale:
      break
  return int(alpha) if alpha.is_integer() else alpha


def _modules(lora: Lora):
  """Yields `(short name, name, lora_A, lora_B, scale)` of every linear.

  The short name lacks the layer: in PEFT's `target_modules` and patterns it
  matches all layers at once.
  """
  for path, factors in lora.factors.items():
    a, b = np.asarray(factors["a"]), np.asarray(factors["b"])
    name = module_name(path)
    short = name.rpartition("{layer}.")[2]
    count, rank = (1 if short == name else a.shape[0]), a.shape[-1]
    a, b = a.reshape(count, -1, rank), b.reshape(count, rank, -1)
    scales = np.broadcast_to(np.asarray(lora.scales[path]), (count,))
    for i in range(count):
      # safetensors writes the memory and not the values, so a transposed
      # view would come out scrambled.
      yield (short, name.format(layer=i), np.ascontiguousarray(a[i].T),
             np.ascontiguousarray(b[i].T), scales[i])  # fmt: skip


def _torch_layout(lora: Lora, prefix: str) -> tuple[dict, dict]:
  """Tensors by name, and the PEFT config that goes with them."""
  tensors, ranks, alphas = {}, {}, {}
  for short, name, a, b, scale in _modules(lora):
    tensors[f"{prefix}{name}.lora_A.weight"] = a
    tensors[f"{prefix}{name}.lora_B.weight"] = b
    ranks[short] = a.shape[0]
    alphas[name] = _alpha(scale, a.shape[0])
  rank, alpha = (
    collections.Counter(d.values()).most_common(1)[0][0]
    for d in (ranks, alphas)
  )
  config = {
    "peft_type": "LORA", "task_type": None, "inference_mode": True,
    "base_model_name_or_path": None, "bias": "none", "lora_dropout": 0.0,
    "fan_in_fan_out": False, "use_dora": False, "use_rslora": False,
    "r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks),
    "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
    "alpha_pattern": {m: x for m, x in alphas.items() if x != alpha},
  }  # fmt: skip
  return tensors, config


def _swap_in(path: str, replaceable: bool, make: Callable[[str], None]):
  """Lets `make` write under a temporary name and renames it to `path`."""
  path = os.path.abspath(path)
  if os.path.exists(path) and not replaceable:
    raise InputError(
      f"{path} exists and is no adapter of this kind; choose another name."
    )
  os.makedirs(os.path.dirname(path), exist_ok=True)
  temporary = f"{path}.tmp-{os.getpid()}"
  try:
    make(temporary)
    if os.path.isdir(path):
      shutil.rmtree(path)
    os.replace(temporary, path)
  finally:
    if os.path.isdir(temporary):
      shutil.rmtree(temporary)
    elif os.path.exists(temporary):
      os.remove(temporary)


def _write_diffusers(path: str, lora: Lora) -> None:
  tensors, config = _torch_layout(lora, "transformer.")
  config = {f"transformer.{k}": v for k, v in config.items()}
  header = {"format": "pt", _METADATA: json.dumps(config)}

  def make(temporary: str) -> None:
    safetensors.numpy.save_file(tensors, temporary, header)

  _swap_in(path, os.path.isfile(path), make)


def _write_peft(path: str, lora: Lora) -> None:
  tensors, config = _torch_layout(lora, "base_model.model.")

  def make(temporary: str) -> None:
    os.mkdir(temporary)
    weights = os.path.join(temporary, PEFT_WEIGHTS)
    safetensors.numpy.save_file(tensors, weights, {"format": "pt"})
    with open(os.path.join(temporary, PEFT_CONFIG), "w") as file:
      json.dump(config, file, indent=2)

  replaceable = os.path.isfile(os.path.join(path, PEFT_WEIGHTS))
  _swap_in(path, replaceable, make)


def write(path: str, lora: Lora) -> None:
  """Writes an adapter for diffusers or PEFT, replacing an older one.

  Args:
    path: `*.safetensors` for the file that diffusers' `load_lora_weights`
      takes, with ranks and alphas in its header; any other name becomes a
      PEFT folder. It appears only when complete.
    lora: the adapter; dtypes are kept.

  Raises:
    InputError: `path` is something else, or the model variant has no
      counterpart in diffusers.
  """
  if path.endswith(".safetensors"):
    _write_diffusers(path, lora)
  else:
    _write_peft(path, lora)


def _nested(lora: Lora) -> dict:
  """Plain nested dicts: no slash in a key may reach the file system."""
  return {
    "factors": traverse_util.unflatten_dict(lora.factors, sep="/"),
    "scales": traverse_util.unflatten_dict(lora.scales, sep="/"),
  }


def save(folder: str, lora: Lora) -> None:
  """Writes our own folder, replacing an older adapter; whole or not at all.

  Raises:
    InputError: `folder` exists and is something else; it is left alone.
  """

  def make(temporary: str) -> None:
    os.mkdir(temporary)
    with open(os.path.join(temporary, "config.json"), "w") as file:
      json.dump(_KIND, file)
    with ocp.StandardCheckpointer() as writer:
      writer.save(os.path.join(temporary, "variables"), _nested(lora))

  _swap_in(folder, is_native(folder), make)


def load(folder: str) -> Lora:
  """Reads what `save` wrote, onto the default device.

  Raises:
    InputError: `folder` holds no adapter of ours.
  """
  folder = os.path.abspath(folder)
  if not is_native(folder):
    raise InputError(
      f"{folder} is no adapter folder of qi2_jax; import the adapter with "
      "python -m qi2_jax.convert import."
    )
  variables = os.path.join(folder, "variables")
  with ocp.PyTreeCheckpointer() as reader:
    saved = reader.metadata(variables).item_metadata.tree
  abstract = jax.tree.map(
    lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), saved
  )
  with ocp.StandardCheckpointer() as reader:
    tree = reader.restore(variables, abstract)
  flat = traverse_util.flatten_dict(tree["factors"], sep="/")
  paths = sorted({name.rpartition("/")[0] for name in flat})
  return Lora(
    {p: {"a": flat[f"{p}/a"], "b": flat[f"{p}/b"]} for p in paths},
    traverse_util.flatten_dict(tree["scales"], sep="/"),
  )


def load_any(path: str, abstract_mmdit_params) -> Lora:
  """`load` of a folder of ours, `read` of anything else.

  Raises:
    InputError: as those.
  """
  if is_native(path):
    return load(path)
  return read(path, abstract_mmdit_params)


def split_weight(text: str) -> tuple[str, float]:
  """`PATH:WEIGHT` as its parts; without a weight it is 1.

  Raises:
    InputError: what follows the last colon is no number.
  """
  path, colon, weight = text.rpartition(":")
  if not colon or os.path.exists(text):
    return text, 1.0
  try:
    return path, float(weight)
  except ValueError as error:
    raise InputError(
      f"adapter {text}: {weight!r} is no number; use PATH or PATH:WEIGHT."
    ) from error
