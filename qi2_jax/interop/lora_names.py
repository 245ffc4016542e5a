# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a LoRA file belongs to which kernel, and its scale.

Names may begin like PEFT's (`base_model.model.`), diffusers'
(`transformer.`), ComfyUI's (`diffusion_model.`) or kohya's (`lora_unet_`,
underscores for dots), or be bare; the factors are lora_A and lora_B or
lora_down and lora_up.

ComfyUI's files of 2.1 hold the MLP's two inputs as one linear `gate_up`
whose output rows are gate_layer (our `gate`) first and proj (our `proj`)
second; the public loaders of those files agree on that order. An adapter of
it is one lora_A for both and a lora_B that is split.

Torch keeps lora_A as `[rank, in]` and lora_B as `[out, rank]`.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.interop import mmdit as mmdit_table
from qi2_jax.models.lora import split_shape

_PREFIX = re.compile(
  r"(base_model\.model\.|transformer\.|(model\.)?diffusion_model\.)*"
)
_KOHYA = "lora_unet_"
# PEFT's in-memory names carry the adapter's name before `.weight`.
_SUFFIX = re.compile(
  r"\.((?P<factor>lora_A|lora_B|lora_down|lora_up)(\.\w+)?\.weight|alpha)$"
)
_PART = {"lora_A": "a", "lora_down": "a", "lora_B": "b", "lora_up": "b",
         None: "alpha"}  # fmt: skip
_FUSED = {"img_mlp.gate_up": ("img_mlp.gate_layer", "img_mlp.proj")}


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the output rows of one torch linear belong.

  Attributes:
    path: our kernel.
    layer: index of the scanned layer, or None.
    part: which of `parts` equal blocks of rows this kernel takes.
    parts: kernels that share the linear.
  """

  path: str
  layer: int | None
  part: int = 0
  parts: int = 1


@dataclasses.dataclass(frozen=True)
class Module:
  """The tensors of one torch linear.

  Attributes:
    key: name of lora_A in the file, for messages.
    a: `[rank, in]`.
    b: `[out, rank]`.
    scale: what multiplies `b @ a`.
  """

  key: str
  a: np.ndarray
  b: np.ndarray
  scale: float


def module_name(path: str) -> str:
  """Torch name of a kernel's linear; `{layer}` as in the MMDiT's table."""
  return mmdit_table.table(path).name.removesuffix(".weight")


def places(shapes: Mapping[str, tuple]) -> dict[str, tuple[Place, ...]]:
  """Every torch linear that an adapter may name, and where it goes.

  Args:
    shapes: kernel path -> shape.
  """
  out = {}
  for path, shape in shapes.items():
    layer, _, _ = split_shape(path, shape)
    for i in range(layer[0]) if layer else (None,):
      out[module_name(path).format(layer=i)] = (Place(path, i),)
  for name in list(out):
    for fused, parts in _FUSED.items():
      if name.endswith(parts[0]):
        stem = name.removesuffix(parts[0])
        out[stem + fused] = tuple(
          dataclasses.replace(out[stem + part][0], part=i, parts=len(parts))
          for i, part in enumerate(parts)
        )
  return out


def _group(file: str, tensors: Mapping, known: Mapping) -> dict[str, dict]:
  """Groups tensors as module -> part (`a`, `b`, `alpha`) -> (key, tensor)."""
  flat = {name.replace(".", "_"): name for name in known}
  out = collections.defaultdict(dict)
  for key in sorted(tensors):
    suffix = _SUFFIX.search(key)
    if not suffix:
      raise InputError(
        f"{file}: {key} is not a plain LoRA weight (DoRA, LoKr, biases and "
        "whole layers cannot be read); convert it to LoRA or merge it first."
      )
    stem = key[: suffix.start()]
    module = stem[_PREFIX.match(stem).end() :]
    if module.startswith(_KOHYA):
      module = flat.get(module.removeprefix(_KOHYA), module)
    if module not in known:
      raise InputError(
        f"{file}: {key} is for a layer {module} that this model lacks; this "
        "adapter is for another model."
      )
    part = _PART[suffix["factor"]]
    if part in out[module]:
      raise InputError(
        f"{file}: {key} and {out[module][part][0]} are the same weight; "
        "save one adapter per file."
      )
    out[module][part] = (key, tensors[key])
  return out


def _check(file: str, module: str, parts: Mapping, shape, place: Place):
  """Raises InputError unless both factors are there and fit `place`."""
  if not {"a", "b"} <= parts.keys():
    key = next(iter(parts.values()))[0]
    raise InputError(
      f"{file}: {key} has no partner, {module} needs both lora_A and "
      "lora_B; export the adapter again."
    )
  _, inputs, outputs = split_shape(place.path, shape)
  rank = len(parts["a"][1]) if parts["a"][1].ndim else 0
  expected = {
    "a": (rank, int(np.prod(inputs))),
    "b": (int(np.prod(outputs)) * place.parts, rank),
  }
  for part, wanted in expected.items():
    key, tensor = parts[part]
    if tensor.shape != wanted or not rank:
      raise InputError(
        f"{file}: {key} has shape {tensor.shape} but this model needs "
        f"{wanted}; this adapter is for another model."
      )
  if "alpha" in parts and parts["alpha"][1].size != 1:
    raise InputError(
      f"{file}: {parts['alpha'][0]} has shape {parts['alpha'][1].shape} but "
      "must be one number; export the adapter again."
    )


def _configured(config: Mapping, kind: str, default: str, module: str):
  """A module's rank or alpha by PEFT's rules: the first pattern wins."""
  for pattern, value in (config.get(f"{kind}_pattern") or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return value
  return config.get(default)


def _scale(file: str, module: str, parts: Mapping, config: Mapping) -> float:
  """alpha / rank: by the alpha tensor, else the config, else 1."""
  rank = parts["a"][1].shape[0]
  if "alpha" in parts:
    return float(parts["alpha"][1].astype(np.float64).ravel()[0]) / rank
  stated = _configured(config, "rank", "r", module)
  if stated not in (None, rank):
    raise InputError(
      f"{file}: {parts['a'][0]} has rank {rank} but the adapter's config "
      f"says {stated}; the two do not belong together."
    )
  alpha = _configured(config, "alpha", "lora_alpha", module)
  if alpha is None:
    return 1.0
  return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def collect(
  file: str, tensors: Mapping, config: Mapping, shapes: Mapping
) -> dict[Place, Module]:
  """Sorts the tensors of a file by kernel and layer.

  Args:
    file: for messages.
    tensors: name -> numpy array, as in the file.
    config: PEFT's LoraConfig fields; empty if none came with the file.
    shapes: kernel path -> shape of the base model.

  Raises:
    InputError: another kind of adapter or another model; the sentence names
      the first offending tensor.
  """
  if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
    raise InputError(
      f"the config of {file} says peft_type={config.get('peft_type')}, "
      f"use_dora={config.get('use_dora')}; only plain LoRA can be read."
    )
  known, out = places(shapes), {}
  for module, parts in _group(file, tensors, known).items():
    for place in known[module]:
      _check(file, module, parts, shapes[place.path], place)
      (key, a), (_, b) = parts["a"], parts["b"]
      place_only = Place(place.path, place.layer)
      if place_only in out:
        raise InputError(
          f"{file}: {key} and {out[place_only].key} change the same layer, "
          "fused and unfused; save one adapter per file."
        )
      rows = np.split(b, place.parts)[place.part]
      scale = _scale(file, module, parts, config)
      out[place_only] = Module(key, a, rows, scale)
  if not out:
    raise InputError(f"{file} holds no LoRA weights; pass another file.")
  return out
