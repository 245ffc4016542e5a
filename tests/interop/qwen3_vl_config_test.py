# SPDX-License-Identifier: Apache-2.0
"""Which config.json of a Qwen3-VL the encoder accepts."""

import copy
import functools

import jax.numpy as jnp
import pytest

from qi2_jax.errors import InputError
from qi2_jax.interop import qwen3_vl as interop
from qi2_jax.models.qwen3_vl import PRESETS

IDS = {"vision_start_token_id": 8, "vision_end_token_id": 9}


@pytest.fixture
def published():
  return copy.deepcopy(interop.published(PRESETS["tiny"], **IDS))


@pytest.mark.parametrize("name", PRESETS)
def test_config_inverts_published(name):
  preset = PRESETS[name]
  published = interop.published(preset, **IDS)
  assert published["vision_end_token_id"] == 9
  assert "video_token_id" not in published
  assert interop.config(published, dtype=preset.dtype) == preset
  assert interop.config(published).vision.dtype == jnp.float32


OLD_ROPE = {
  "rope_theta": 5000000,
  "rope_scaling": {
    "rope_type": "default", "mrope_section": [6, 5, 5],
    "mrope_interleaved": True,
  },
}  # fmt: skip


def test_both_spellings_of_rope_are_read(published):
  del published["text_config"]["rope_parameters"]
  published["text_config"] |= copy.deepcopy(OLD_ROPE)
  published["vision_config"]["model_type"] = "qwen3_vl"
  assert interop.config(published) == PRESETS["tiny"]


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("model_type", "qwen2_5_vl", "model_type='qwen2_5_vl'"),
    ("quantization_config", {"bits": 4}, "quantization_config"),
    ("image_token_id", None, "image_token_id=None"),
    ("text_config", None, "no text_config"),
    ("text_config.hidden_act", "gelu", "text_config.hidden_act='gelu'"),
    ("text_config.attention_bias", True, "attention_bias=True"),
    ("text_config.model_type", "qwen3", "text_config.model_type"),
    ("text_config.head_dim", None, "text_config.head_dim=None"),
    ("text_config.num_key_value_heads", 3, "num_kv_heads 3"),
    ("text_config.hidden_size", 32, "must equal the width 32"),
    ("text_config.rope_parameters.rope_type", "yarn", "rope_type='yarn'"),
    ("text_config.rope_parameters.mrope_interleaved", False, "interleaved"),
    ("text_config.rope_parameters.mrope_section", None, "mrope_section=None"),
    ("text_config.rope_parameters.mrope_section", [4, 4, 4], "must sum"),
    ("vision_config.hidden_act", "quick_gelu", "vision_config.hidden_act"),
    ("vision_config.in_channels", 4, "in_channels=4"),
    ("vision_config.patch_size", [8, 8], "patch_size"),
    ("vision_config.hidden_size", 50, "two-axis"),
    ("vision_config.num_position_embeddings", 35, "square"),
    ("vision_config.deepstack_visual_indexes", [2, 0], "increasing"),
    ("vision_config.rope_parameters", {"rope_theta": 5.0}, "rope_theta=5.0"),
    ("vision_config.rope_parameters", {"rope_type": "ntk"}, "rope_type='ntk'"),
  ],
)
def test_unsupported_configs_are_named(field, value, message, published):
  *sections, name = field.split(".")
  place = functools.reduce(dict.__getitem__, sections, published)
  place[name] = value
  with pytest.raises(InputError, match=message):
    interop.config(published)


def test_foreign_parameters_are_named():
  for path in ("visual/blocks/fc1/gamma", "layers/mlp/up/kernel"):
    with pytest.raises(InputError, match=path):
      interop.table(path)
