# SPDX-License-Identifier: Apache-2.0
"""DINOv2 from local transformers folders (`Dinov2Model`, with registers too).

The names are those on disk; `state_dict()` of transformers 5 has others.
"""

import os
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.interop import vit
from qi2_jax.interop.mapping import Entry, convolution, linear, vector
from qi2_jax.interop.published import check_value, integers, read_json
from qi2_jax.models import dinov2 as model_lib
from qi2_jax.models.dinov2 import DINOv2, DINOv2Config

_REGISTERS = "dinov2_with_registers"
# Not read: the final norm and the token of masked pre-training.
_UNUSED = r"layernorm\.(weight|bias)|embeddings\.mask_token"
# Published field -> ours; all are required.
_FIELDS = {
  "num_hidden_layers": "num_layers",
  "hidden_size": "width",
  "num_attention_heads": "num_heads",
}
# Values that the module computes; an absent field has the first one.
_SUPPORTED = {
  "quantization_config": (None,),
  "hidden_act": ("gelu",),
  "use_swiglu_ffn": (False,),
  "qkv_bias": (True,),
  "num_channels": (3,),
}


def _square(published: Mapping, name: str, default: int) -> int:
  """A size that may be written as a number or as two equal ones."""
  value = published.get(name, default)
  sides = value if isinstance(value, (list, tuple)) else (value, value)
  if len(set(sides)) != 1 or type(sides[0]) is not int or sides[0] < 1:
    raise InputError(
      f"DINOv2's config.json has {name}={value!r}, but only a positive square "
      "size is supported."
    )
  return sides[0]


def config(published: Mapping, *, dtype=jnp.float32) -> DINOv2Config:
  """Reads a transformers `config.json` of DINOv2.

  Args:
    published: the parsed file.
    dtype: compute dtype, which the file does not decide.

  Raises:
    InputError: another model, a missing field, or a value that is not
      implemented; the sentence names it.
  """
  kind = published.get("model_type")
  if kind not in ("dinov2", _REGISTERS):
    raise InputError(
      f"config.json is of a {kind} model, not of dinov2 or {_REGISTERS}; pass "
      "a folder such as facebook/dinov2-large."
    )
  for name, allowed in _SUPPORTED.items():
    check_value(published, name, allowed)
  for name in _FIELDS:
    if name not in published:
      raise InputError(
        f"DINOv2's config.json has no {name}; use the file that came with "
        "the checkpoint."
      )
  ratio = published.get("mlp_ratio", 4)
  if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
    raise InputError(
      f"DINOv2's config.json has mlp_ratio={ratio!r}, but a number is needed; "
      "use the file that came with the checkpoint."
    )
  patch = _square(published, "patch_size", 14)
  out = integers(published, _FIELDS)
  if kind == _REGISTERS:
    out |= {"num_registers": 4}
    out |= integers(published, {"num_register_tokens": "num_registers"})
  return DINOv2Config(
    **out,
    mlp_width=int(out["width"] * ratio),
    patch_size=patch,
    side=_square(published, "image_size", 224) // patch,
    eps=float(published.get("layer_norm_eps", 1e-6)),
    dtype=dtype,
  )


_LAYER = "encoder.layer.{layer}."
_TABLE = {
  "cls_token": vector("embeddings.cls_token", (1, 1, -1)),
  "pos_embed": Entry(
    "embeddings.position_embeddings",
    lambda a: a[None],
    lambda t, shape: t.reshape(shape),
  ),
  "registers": Entry(
    "embeddings.register_tokens",
    lambda a: a[None],
    lambda t, shape: t.reshape(shape),
  ),
  "patch_embed/kernel": convolution(
    "embeddings.patch_embeddings.projection.weight"
  ),
  "patch_embed/bias": vector("embeddings.patch_embeddings.projection.bias"),
  "blocks/scale1": vector(_LAYER + "layer_scale1.lambda1"),
  "blocks/scale2": vector(_LAYER + "layer_scale2.lambda1"),
}
_MODULES = {
  "norm1": "norm1",
  "norm2": "norm2",
  "to_q": "attention.attention.query",
  "to_k": "attention.attention.key",
  "to_v": "attention.attention.value",
  "to_out": "attention.output.dense",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}


def table(path: str) -> Entry:
  """Entry of a path inside the `params` collection.

  Raises:
    InputError: the path is none of DINOv2's.
  """
  if path in _TABLE:
    return _TABLE[path]
  match = re.fullmatch(r"blocks/(\w+)/(kernel|scale|bias)", path)
  if match is None or match[1] not in _MODULES:
    raise InputError(f"parameter {path} has no counterpart in transformers.")
  name = _LAYER + _MODULES[match[1]]
  if match[2] == "kernel":
    # The heads of `to_out` are the only second input axis.
    return linear(f"{name}.weight", 2 if match[1] == "to_out" else 1)
  return vector(f"{name}.{'bias' if match[2] == 'bias' else 'weight'}")


def ignored(kept: int, total: int) -> str:
  """Regex of tensors that a network of `kept` of `total` blocks leaves out."""
  later = "|".join(str(i) for i in range(kept, total))
  return _UNUSED + (rf"|encoder\.layer\.({later})\..*" if later else "")


def load(
  path: str, *, layer: int | None = None, dtype=jnp.float32, param_dtype=None,
  shardings: Callable | None = None,
) -> tuple[DINOv2, dict]:  # fmt: skip
  """Reads the network up to a block; later blocks are never read.

  Args:
    path: local folder with config.json and model.safetensors.
    layer: last block, counted from 0; None keeps all.
    dtype: compute dtype.
    param_dtype: dtype of the parameters; None keeps the file's.
    shardings: `abstract params -> shardings`, or None for one device.

  Raises:
    InputError: files are missing, damaged or of another kind of model, or
      there is no such block.
  """
  whole = config(read_json(os.path.join(path, "config.json")), dtype=dtype)
  kept = whole if layer is None else model_lib.upto(whole, layer)
  skip = ignored(kept.num_layers, whole.num_layers)
  model = DINOv2(kept)
  params = vit.read(
    path, abstract_params(model), table, ignored=skip,
    param_dtype=param_dtype, shardings=shardings,
  )  # fmt: skip
  return model, params


def random_features(
  key: jax.Array, config: DINOv2Config
) -> tuple[DINOv2, dict]:
  """A stand-in of the same cost with random weights, and a loud warning.

  Args:
    key: of the weights.
    config: what to stand in for, cut with `models.dinov2.upto` if wished.
  """
  logging.warning(
    "DINOv2 RUNS WITH RANDOM FEATURES. Aligning to them teaches nothing about "
    "semantics; pass a model folder for anything but a test."
  )
  model = DINOv2(config)
  return model, jax.jit(lambda k: model_lib.init_params(model, k))(key)


def abstract_params(model: DINOv2):
  """Shapes of the parameters."""
  return jax.eval_shape(lambda: model_lib.init_params(model, jax.random.key(0)))
