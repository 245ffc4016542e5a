# SPDX-License-Identifier: Apache-2.0
"""What the folders of CLIP, SigLIP and DINOv2 share: fields, names, reading.

The names are those on disk, which CLIP and SigLIP have in common but for
their heads.
"""

import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.interop import mapping, safetensors_io
from qi2_jax.interop.mapping import Entry, convolution, linear, vector
from qi2_jax.interop.published import check_value, integers
from qi2_jax.models.vit import StackConfig, init_params

_STEM = "model"
# Older files also hold the numbers of the positions.
IGNORED = r"(text|vision)_model\.embeddings\.position_ids"
_STACK = {
  "num_hidden_layers": "num_layers",
  "hidden_size": "width",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_width",
}
# Values that the modules compute; an absent field has the first one.
_SUPPORTED = {"quantization_config": (None,), "num_channels": (3,)}
_TOWERS = {"vision": "vision_model", "text": "text_model"}
_MODULES = {
  "norm1": "layer_norm1",
  "norm2": "layer_norm2",
  "to_q": "self_attn.q_proj",
  "to_k": "self_attn.k_proj",
  "to_v": "self_attn.v_proj",
  "to_out": "self_attn.out_proj",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}


def section(published: Mapping, name: str, defaults: Mapping) -> dict:
  """One tower's fields, as transformers completes them.

  Args:
    published: the whole config.
    name: `text_config` or `vision_config`.
    defaults: the class's own values; files leave out what equals them.

  Raises:
    InputError: a value that is not implemented, or a size that is no positive
      whole number.
  """
  # Old CLIP files repeat a part under another name, and that part, completed
  # by the defaults, wins.
  again = published.get(f"{name}_dict") or {}
  out = dict(defaults) | dict(published.get(name) or {})
  if again:
    out |= dict(defaults) | dict(again)
  for field, allowed in _SUPPORTED.items():
    check_value(out, field, allowed)
  sizes = [field for field in defaults if type(defaults[field]) is int]
  integers(out, {field: field for field in sizes})
  for field in sizes:
    if isinstance(out[field], (list, tuple)):
      raise InputError(
        f"config.json has {name}.{field}={out[field]!r}, but only a single "
        "number is supported there; pass another checkpoint."
      )
  return out


def stack_config(fields: Mapping, dtype: jnp.dtype) -> StackConfig:
  """The blocks of a tower, from its completed fields."""
  return StackConfig(
    **{ours: fields[theirs] for theirs, ours in _STACK.items()},
    activation=fields["hidden_act"], eps=float(fields["layer_norm_eps"]),
    dtype=dtype,
  )  # fmt: skip


def same(name: str) -> Entry:
  """An array that both sides hold alike."""
  return Entry(name, lambda a: a, lambda t, shape: t.reshape(shape))


def shared_table(own: Mapping[str, Entry]) -> Callable[[str], Entry]:
  """The table of a model: Flax path -> `Entry`.

  Args:
    own: entries of what only this model has.
  """
  entries = dict(own)
  for tower, theirs in _TOWERS.items():
    prefix = f"{theirs}.embeddings."
    entries |= {
      f"{tower}/patch_embed/kernel": convolution(
        prefix + "patch_embedding.weight"
      ),
      f"{tower}/pos_embed": same(prefix + "position_embedding.weight"),
      f"{tower}/pos_embed/embedding": same(
        prefix + "position_embedding.weight"
      ),
      f"{tower}/token_embed/embedding": same(prefix + "token_embedding.weight"),
    }

  def table(path: str) -> Entry:
    if path in entries:
      return entries[path]
    match = re.fullmatch(
      r"(vision|text)/blocks/(\w+)/(kernel|scale|bias)", path
    )
    if match is None or match[2] not in _MODULES:
      raise InputError(f"parameter {path} has no counterpart in transformers.")
    tower, module, kind = match.groups()
    name = f"{_TOWERS[tower]}.encoder.layers.{{layer}}.{_MODULES[module]}"
    if kind == "kernel":
      # The heads of `to_out` are the only second input axis.
      return linear(f"{name}.weight", 2 if module == "to_out" else 1)
    return vector(f"{name}.{'bias' if kind == 'bias' else 'weight'}")

  return table


def norm(ours: str, theirs: str) -> dict[str, Entry]:
  """Entries of one LayerNorm."""
  return {
    f"{ours}/scale": vector(f"{theirs}.weight"),
    f"{ours}/bias": vector(f"{theirs}.bias"),
  }


def abstract_params(model):
  """Shapes of the parameters of CLIP or SigLIP."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def read(
  path: str, abstract, table: Callable, *, ignored: str = IGNORED,
  param_dtype=None, shardings: Callable | None = None,
):  # fmt: skip
  """Reads the parameters of a transformers folder.

  Args:
    path: local folder with model.safetensors or its shards.
    abstract: shapes of the parameters.
    table: Flax path -> `Entry`.
    ignored: regex of tensors that are not read.
    param_dtype: dtype of the parameters; None keeps the file's.
    shardings: `abstract params -> shardings`, or None for one device.

  Raises:
    InputError: files are missing, damaged or of another kind of model.
  """
  reader = safetensors_io.open_tensors(path, _STEM)
  abstract = mapping.stored_dtypes(reader, abstract, table, ignored)
  places = shardings(abstract) if shardings else None
  abstract = jax.tree.map(
    lambda a, s=None: jax.ShapeDtypeStruct(
      a.shape, param_dtype or a.dtype, sharding=s
    ),
    *((abstract, places) if shardings else (abstract,)),
  )
  return mapping.load_tree(reader, abstract, table, ignored=ignored)
