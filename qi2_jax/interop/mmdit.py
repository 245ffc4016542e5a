# SPDX-License-Identifier: Apache-2.0
"""MMDiT parameters <-> diffusers `QwenImage21Transformer2DModel`."""

from qi2_jax.errors import InputError
from qi2_jax.interop.mapping import Entry, linear, vector

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
