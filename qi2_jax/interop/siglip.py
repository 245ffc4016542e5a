# SPDX-License-Identifier: Apache-2.0
"""SigLIP, and SigLIP 2 of a fixed resolution, from transformers folders.

Both are `SiglipModel` on disk. `Siglip2Model` (NaFlex, any aspect ratio) is
another network and is refused.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.interop import vit
from qi2_jax.interop.mapping import linear, vector
from qi2_jax.interop.published import check_value
from qi2_jax.interop.vit import norm
from qi2_jax.models.siglip import SigLIPConfig

KIND = "siglip"
# What transformers' classes have where a file is silent.
_TEXT = {
  "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072,
  "num_hidden_layers": 12, "num_attention_heads": 12,
  "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
}  # fmt: skip
_VISION = {
  "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
  "num_attention_heads": 12, "image_size": 224, "patch_size": 16,
  "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip


def config(published: Mapping, *, dtype=jnp.float32) -> SigLIPConfig:
  """Reads a transformers `config.json` of SigLIP.

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
      f"{KIND}; pass a folder such as google/siglip-so400m-patch14-384 or "
      "google/siglip2-so400m-patch14-384."
    )
  text = vit.section(published, "text_config", _TEXT)
  vision = vit.section(published, "vision_config", _VISION)
  check_value(vision, "vision_use_head", (True,))
  return SigLIPConfig(
    vision=vit.stack_config(vision, dtype),
    text=vit.stack_config(text, dtype),
    projection=text.get("projection_size") or text["hidden_size"],
    image_size=vision["image_size"],
    patch_size=vision["patch_size"],
    vocabulary=text["vocab_size"],
    length=text["max_position_embeddings"],
  )


_HEAD = "vision_model.head."
table = vit.shared_table(
  {
    "logit_scale": vector("logit_scale", (1,)),
    "logit_bias": vector("logit_bias", (1,)),
    "vision/patch_embed/bias": vector(
      "vision_model.embeddings.patch_embedding.bias"
    ),
    "vision/pool/probe": vector(_HEAD + "probe", (1, 1, -1)),
    "vision/pool/qkv": linear(_HEAD + "attention.in_proj_weight"),
    "vision/pool/qkv_bias": vector(_HEAD + "attention.in_proj_bias"),
    "vision/pool/to_out/kernel": linear(_HEAD + "attention.out_proj.weight", 2),
    "vision/pool/to_out/bias": vector(_HEAD + "attention.out_proj.bias"),
    "vision/pool/fc1/kernel": linear(_HEAD + "mlp.fc1.weight"),
    "vision/pool/fc1/bias": vector(_HEAD + "mlp.fc1.bias"),
    "vision/pool/fc2/kernel": linear(_HEAD + "mlp.fc2.weight"),
    "vision/pool/fc2/bias": vector(_HEAD + "mlp.fc2.bias"),
    "text/head/kernel": linear("text_model.head.weight"),
    "text/head/bias": vector("text_model.head.bias"),
  }
  | norm("vision/pool/norm", _HEAD + "layernorm")
  | norm("vision/norm_out", "vision_model.post_layernorm")
  | norm("text/norm_out", "text_model.final_layer_norm")
)
