# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL parameters and config <-> transformers' classes.

The names are those of `Qwen3VLForConditionalGeneration` on disk.
"""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.interop.mapping import Entry, linear, vector
from qi2_jax.models.qwen3_vl import Qwen3VLConfig
from qi2_jax.models.qwen3_vl_vision import ROPE_THETA, VisionConfig

# Tensors on disk that are deliberately not read: the encoder stops before
# the final norm. A full match of the name counts.
IGNORED = r"lm_head\.weight|model\.language_model\.norm\.weight"

# Our config field <-> transformers' (required, integers except eps).
_TEXT = {
  "vocab_size": "vocab_size",
  "width": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "mlp_width": "intermediate_size",
  "eps": "rms_norm_eps",
}
_VISION = {
  "depth": "depth",
  "width": "hidden_size",
  "num_heads": "num_heads",
  "mlp_width": "intermediate_size",
  "patch_size": "patch_size",
  "temporal_patch_size": "temporal_patch_size",
  "merge_size": "spatial_merge_size",
  "out_width": "out_hidden_size",
  "num_positions": "num_position_embeddings",
}
# (section, field) -> values that the modules compute; an absent field has
# the first one in transformers too.
_SUPPORTED = {
  ("", "quantization_config"): (None,),
  ("text_config", "model_type"): ("qwen3_vl_text",),
  ("text_config", "hidden_act"): ("silu",),
  ("text_config", "attention_bias"): (False,),
  # Early checkpoints name the whole model here.
  ("vision_config", "model_type"): ("qwen3_vl_vision", "qwen3_vl"),
  ("vision_config", "hidden_act"): ("gelu_pytorch_tanh",),
  ("vision_config", "in_channels"): (3,),
}


def _unsupported(field: str, value, allowed) -> InputError:
  return InputError(
    f"the encoder's config.json has {field}={value!r}, but only "
    f"{' or '.join(repr(a) for a in allowed)} is implemented; use a "
    "Qwen3-VL checkpoint as published."
  )


def _required(section: Mapping, field: str, where: str):
  value = section.get(field)
  if not isinstance(value, (int, float)) or isinstance(value, bool):
    raise InputError(
      f"the encoder's config.json has {where}{field}={value!r}, but a number "
      "is needed; use the file that came with the checkpoint."
    )
  return value


def _rope(text: Mapping) -> tuple[float, tuple[int, int, int]]:
  """Theta and section from `rope_parameters`, or from the older spelling."""
  name = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
  rope = text.get(name) or {}
  where = f"text_config.{name}."
  kind = rope.get("rope_type", rope.get("type", "default"))
  # Transformers once wrote "mrope" for the default frequencies.
  if kind not in ("default", "mrope"):
    raise _unsupported(f"{where}rope_type", kind, ("default",))
  interleaved = rope.get("mrope_interleaved", True)
  if interleaved is not True:
    raise _unsupported(f"{where}mrope_interleaved", interleaved, (True,))
  section = rope.get("mrope_section")
  if not isinstance(section, (list, tuple)) or len(section) != 3:
    raise InputError(
      f"the encoder's config.json has {where}mrope_section={section!r}, but "
      "three numbers are needed; use the file that came with the checkpoint."
    )
  if "rope_theta" in rope:
    theta = _required(rope, "rope_theta", where)
  else:
    theta = _required(text, "rope_theta", "text_config.")
  return float(theta), tuple(section)


def config(published: Mapping, *, dtype=jnp.float32) -> Qwen3VLConfig:
  """Reads a transformers `config.json` of Qwen3-VL.

  Args:
    published: the parsed file, with `rope_parameters` or the older
      `rope_scaling` and `rope_theta`.
    dtype: compute dtype, which the file does not decide.

  Raises:
    InputError: another model, a missing field, or a value that is not
      implemented; the sentence names it.
  """
  kind = published.get("model_type")
  if kind != "qwen3_vl":
    raise _unsupported("model_type", kind, ("qwen3_vl",))
  sections = {"": published}
  for name in ("text_config", "vision_config"):
    if not isinstance(published.get(name), Mapping):
      raise InputError(
        f"the encoder's config.json has no {name}; use the file that came "
        "with the checkpoint."
      )
    sections[name] = published[name]
  for (section, field), allowed in _SUPPORTED.items():
    value = sections[section].get(field, allowed[0])
    if value not in allowed:
      raise _unsupported(f"{section}.{field}".lstrip("."), value, allowed)
  text, vision = sections["text_config"], sections["vision_config"]
  rope = vision.get("rope_parameters") or {}
  for field, value in (("rope_type", "axial"), ("rope_theta", ROPE_THETA)):
    if rope.get(field, value) != value:
      raise _unsupported(
        f"vision_config.rope_parameters.{field}", rope[field], (value,)
      )
  theta, section = _rope(text)
  return Qwen3VLConfig(
    **{k: _required(text, v, "text_config.") for k, v in _TEXT.items()},
    rope_theta=theta,
    mrope_section=section,
    image_token_id=_required(published, "image_token_id", ""),
    vision=VisionConfig(
      **{k: _required(vision, v, "vision_config.") for k, v in _VISION.items()},
      deepstack_layers=tuple(vision.get("deepstack_visual_indexes") or ()),
      dtype=dtype,
    ),
    dtype=dtype,
  )


def published(
  config: Qwen3VLConfig,
  *,
  vision_start_token_id: int,
  vision_end_token_id: int,
  video_token_id: int | None = None,
) -> dict:
  """A `config.json` that transformers loads, the inverse of `config`.

  Word embeddings are tied, so that a folder without `lm_head` is complete.

  Args:
    config: the encoder.
    vision_start_token_id: id of `<|vision_start|>`.
    vision_end_token_id: id of `<|vision_end|>`.
    video_token_id: id of `<|video_pad|>`, if the tokenizer has one.
  """
  vision = config.vision
  video = {} if video_token_id is None else {"video_token_id": video_token_id}
  return {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": config.image_token_id,
    **video,
    "vision_start_token_id": vision_start_token_id,
    "vision_end_token_id": vision_end_token_id,
    "tie_word_embeddings": True,
    "text_config": {
      "model_type": "qwen3_vl_text",
      **{theirs: getattr(config, ours) for ours, theirs in _TEXT.items()},
      "hidden_act": "silu",
      "attention_bias": False,
      # A statement about training; neither side keeps a table of positions.
      "max_position_embeddings": 262144,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "mrope_section": list(config.mrope_section),
        "mrope_interleaved": True,
      },
    },
    "vision_config": {
      "model_type": "qwen3_vl_vision",
      **{theirs: getattr(vision, ours) for ours, theirs in _VISION.items()},
      "hidden_act": "gelu_pytorch_tanh",
      "in_channels": 3,
      "deepstack_visual_indexes": list(vision.deepstack_layers),
    },
  }


def extra_tensors(config: Qwen3VLConfig) -> dict[str, np.ndarray]:
  """Tensors a transformers folder needs and the encoder does not have.

  The final norm does nothing to the states before it; ones will do.
  """
  ones = np.ones(config.width, np.float32)
  return {"model.language_model.norm.weight": ones}


def _table2d(name: str) -> Entry:
  """An embedding table, the same array on both sides."""
  return Entry(name, lambda a: a, lambda t, shape: t.reshape(shape))


def _patch_kernel(name: str) -> Entry:
  """Kernel `[i, t, p, p, o]` <-> a Conv3d's `[o, i, t, p, p]`."""
  return Entry(
    name,
    lambda a: np.moveaxis(a, -1, 0),
    lambda t, shape: np.moveaxis(t, 0, -1).reshape(shape),
  )


_LAYER = "model.language_model.layers.{layer}."
_TABLE = {
  "embed_tokens": _table2d("model.language_model.embed_tokens.weight"),
  "layers/input_norm": vector(_LAYER + "input_layernorm.weight"),
  "layers/mlp_norm": vector(_LAYER + "post_attention_layernorm.weight"),
  "layers/to_q/kernel": linear(_LAYER + "self_attn.q_proj.weight"),
  "layers/to_k/kernel": linear(_LAYER + "self_attn.k_proj.weight"),
  "layers/to_v/kernel": linear(_LAYER + "self_attn.v_proj.weight"),
  "layers/to_out/kernel": linear(_LAYER + "self_attn.o_proj.weight", 2),
  "layers/norm_q/scale": vector(_LAYER + "self_attn.q_norm.weight"),
  "layers/norm_k/scale": vector(_LAYER + "self_attn.k_norm.weight"),
  "layers/mlp/gate/kernel": linear(_LAYER + "mlp.gate_proj.weight"),
  "layers/mlp/proj/kernel": linear(_LAYER + "mlp.up_proj.weight"),
  "layers/mlp/out/kernel": linear(_LAYER + "mlp.down_proj.weight"),
  "visual/pos_embed": _table2d("model.visual.pos_embed.weight"),
  "visual/patch_embed/kernel": _patch_kernel(
    "model.visual.patch_embed.proj.weight"
  ),
}
# Modules of the tower with a bias, by their last two names.
_VISION_RENAMES = (
  (r"visual/patch_embed", "model.visual.patch_embed.proj"),
  (r"visual/blocks/(qkv|proj)", r"model.visual.blocks.{layer}.attn.\1"),
  (r"visual/blocks/(fc\d)", r"model.visual.blocks.{layer}.mlp.linear_\1"),
  (r"visual/blocks/(norm\d)", r"model.visual.blocks.{layer}.\1"),
  (r"visual/deepstack/(fc\d)",
   r"model.visual.deepstack_merger_list.{layer}.linear_\1"),
  (r"visual/deepstack/norm", "model.visual.deepstack_merger_list.{layer}.norm"),
  (r"visual/merger/(fc\d)", r"model.visual.merger.linear_\1"),
  (r"visual/merger/norm", "model.visual.merger.norm"),
)  # fmt: skip


def table(path: str) -> Entry:
  """Entry of a path inside the encoder's `params` collection.

  Raises:
    InputError: the path is none of the encoder's.
  """
  if path in _TABLE:
    return _TABLE[path]
  stem, _, leaf = path.rpartition("/")
  for pattern, replacement in _VISION_RENAMES:
    match = re.fullmatch(pattern, stem)
    if match and leaf in ("kernel", "bias", "scale"):
      name = match.expand(replacement)
      if leaf == "kernel":
        # The heads of `proj` are the only second input axis.
        return linear(f"{name}.weight", 2 if name.endswith(".proj") else 1)
      return vector(f"{name}.{'bias' if leaf == 'bias' else 'weight'}")
  raise InputError(f"parameter {path} has no counterpart in transformers.")
