# SPDX-License-Identifier: Apache-2.0
"""MMDiT config and parameters <-> diffusers `QwenImage21Transformer2DModel`.

The published config.json knows one variant. Native folders use the same
fields and add, under `qi2_jax`, what they cannot express.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.interop import published as fields
from qi2_jax.interop.mapping import Entry, linear, vector
from qi2_jax.models.mmdit import MMDiTConfig

CLASS = "QwenImage21Transformer2DModel"
_SIZES = {
  "in_channels": "latent_channels",
  "num_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "attention_head_dim": "head_dim",
  "context_in_dim": "context_dim",
  "mlp_ratio": "mlp_ratio",
  "axes_dims_rope": "rope_axes",
}
_KNOWN = (*_SIZES, "patch_size", "out_channels", "eps", "causal_condition")
# diffusers hard-codes these values of our fields.
_VARIANT = {
  "attention": "block_causal",
  "condition_time": "zero",
  "modulation": "shared",
  "gate": "tanh",
  "rope_theta": 10000.0,
}
_EXTRAS = (*_VARIANT, "remat", "dtype")

_BLOCK = "transformer_blocks.{layer}."
_TABLE = {
  "img_in/kernel": linear("img_in.weight"),
  "txt_in/text_norm": vector("txt_in.text_norm.weight"),
  "txt_in/in_layer/kernel": linear("txt_in.in_layer.weight"),
  "txt_in/out_layer/kernel": linear("txt_in.out_layer.weight"),
  "time_embedder/linear_1/kernel": linear(
    "time_text_embed.timestep_embedder.linear_1.weight"
  ),
  "time_embedder/linear_2/kernel": linear(
    "time_text_embed.timestep_embedder.linear_2.weight"
  ),
  "modulation/kernel": linear("modulation.1.weight"),
  "blocks/attn/to_q/kernel": linear(_BLOCK + "attn.to_q.weight"),
  "blocks/attn/to_k/kernel": linear(_BLOCK + "attn.to_k.weight"),
  "blocks/attn/to_v/kernel": linear(_BLOCK + "attn.to_v.weight"),
  "blocks/attn/to_out/kernel": linear(_BLOCK + "attn.to_out.0.weight", 2),
  "blocks/attn/norm_q/scale": vector(_BLOCK + "attn.norm_q.weight"),
  "blocks/attn/norm_k/scale": vector(_BLOCK + "attn.norm_k.weight"),
  "blocks/mlp/proj/kernel": linear(_BLOCK + "img_mlp.proj.weight"),
  "blocks/mlp/gate/kernel": linear(_BLOCK + "img_mlp.gate_layer.weight"),
  "blocks/mlp/out/kernel": linear(_BLOCK + "img_mlp.out.weight"),
  "norm_out/kernel": linear("norm_out.linear.weight"),
  "proj_out/kernel": linear("proj_out.weight"),
}


def table(path: str) -> Entry:
  """Entry of a path inside the MMDiT's `params` collection.

  Raises:
    InputError: the variant has parameters diffusers has no place for.
  """
  if path not in _TABLE:
    raise InputError(
      f"parameter {path} has no diffusers counterpart; only the variant of "
      "qwen_image_2_1 can be exchanged."
    )
  return _TABLE[path]


def config(published: Mapping) -> MMDiTConfig:
  """Our config of a transformer/config.json.

  The compute dtype is fp32 unless a native folder states another.

  Raises:
    InputError: a field has a value that no code path implements.
  """
  fields.check_class(published, CLASS)
  fields.check_known(published, _KNOWN)
  fields.check_value(published, "patch_size", (1,))
  fields.check_value(published, "causal_condition", (True,))
  sizes = fields.integers(published, _SIZES)
  channels = sizes.get("latent_channels", MMDiTConfig.latent_channels)
  fields.check_value(published, "out_channels", (channels, None))
  if len(sizes.get("rope_axes", (0, 0, 0))) != 3:
    raise InputError(
      f"config.json has axes_dims_rope={published['axes_dims_rope']} but "
      "needs three numbers (frame, row, column)."
    )
  extras = fields.extras(published, _EXTRAS)
  if "dtype" in extras:
    extras["dtype"] = jnp.dtype(extras["dtype"])
  eps = float(published.get("eps", MMDiTConfig.eps))
  return MMDiTConfig(**sizes, eps=eps, **extras)


def published(config: MMDiTConfig) -> dict:
  """A config.json that diffusers loads.

  Raises:
    InputError: diffusers has no class for this variant.
  """
  for name, value in _VARIANT.items():
    if getattr(config, name) != value:
      raise InputError(
        f"a model with {name}={getattr(config, name)!r} cannot be exported: "
        f"diffusers' {CLASS} has only {value!r}."
      )
  return _shape(config)


def native(config: MMDiTConfig) -> dict:
  """The published fields and our own; `config` reads it back."""
  extras = {name: getattr(config, name) for name in _EXTRAS}
  extras["dtype"] = np.dtype(config.dtype).name
  return {**_shape(config), "qi2_jax": extras}


def _shape(config: MMDiTConfig) -> dict:
  values = dataclasses.asdict(config)
  out = {"_class_name": CLASS}
  for theirs, ours in _SIZES.items():
    value = values[ours]
    out[theirs] = list(value) if isinstance(value, tuple) else value
  return {
    **out, "patch_size": 1, "out_channels": config.latent_channels,
    "eps": config.eps, "causal_condition": True,
  }  # fmt: skip
