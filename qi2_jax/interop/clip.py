# SPDX-License-Identifier: Apache-2.0
"""CLIP from local transformers folders (`CLIPModel`)."""

from collections.abc import Mapping

import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.interop import vit
from qi2_jax.interop.mapping import linear, vector
from qi2_jax.interop.published import integers
from qi2_jax.interop.vit import norm
from qi2_jax.models.clip import CLIPConfig

KIND = "clip"
# What transformers' classes have where a file is silent.
_TEXT = {
  "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048,
  "num_hidden_layers": 12, "num_attention_heads": 8,
  "max_position_embeddings": 77, "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5, "eos_token_id": 49407,
}  # fmt: skip
_VISION = {
  "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
  "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
  "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
# Written before the field was right: the text is then read at its largest id.
_WRONG_EOS = 2


def config(published: Mapping, *, dtype=jnp.float32) -> CLIPConfig:
  """Reads a transformers `config.json` of CLIP.

  Args:
    published: the parsed file.
    dtype: compute dtype, which the file does not decide.

  Raises:
    InputError: another model, or a value that is not implemented; the
      sentence names it.
  """
  if published.get("model_type") != KIND:
    raise InputError(
      f"config.json is of a {published.get('model_type')} model, not of "
      f"{KIND}; pass a folder such as openai/clip-vit-large-patch14."
    )
  text = vit.section(published, "text_config", _TEXT)
  vision = vit.section(published, "vision_config", _VISION)
  projection = {"projection_dim": 512} | dict(published)
  eos = text["eos_token_id"]
  return CLIPConfig(
    vision=vit.stack_config(vision, dtype),
    text=vit.stack_config(text, dtype),
    **integers(projection, {"projection_dim": "projection"}),
    image_size=vision["image_size"],
    patch_size=vision["patch_size"],
    vocabulary=text["vocab_size"],
    length=text["max_position_embeddings"],
    eos=None if eos == _WRONG_EOS else eos,
  )


table = vit.shared_table(
  {
    "logit_scale": vector("logit_scale", ()),
    "image_projection/kernel": linear("visual_projection.weight"),
    "text_projection/kernel": linear("text_projection.weight"),
    "vision/cls_token": vector("vision_model.embeddings.class_embedding"),
  }
  | norm("vision/norm_in", "vision_model.pre_layrnorm")
  | norm("vision/norm_out", "vision_model.post_layernorm")
  | norm("text/norm_out", "text_model.final_layer_norm")
)
