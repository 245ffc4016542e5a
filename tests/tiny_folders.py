# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines, written by diffusers and transformers themselves."""

import json
import os

import numpy as np

MMDIT = {
  "in_channels": 8, "out_channels": 8, "num_layers": 3,
  "attention_head_dim": 32, "num_attention_heads": 2, "context_in_dim": 48,
  "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
STATS = {
  "latents_mean": [0.5126, -0.0631, 1.25, 0.1, -2.1025, 0.0, 3.8363, 0.3],
  "latents_std": [3.2001, 3.4321, 1.0, 0.7, 5.0756, 2.9249, 0.1, 1.5],
}
VAE = {"base_dim": 8, "decoder_base_dim": 12, "z_dim": 8, **STATS}
SCHEDULER = {
  "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9,
  "max_image_seq_len": 8192, "shift_terminal": 0.02,
}  # fmt: skip


def randomise(module, seed=0):
  """Fills every parameter with noise, so that none can hide."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for p in module.parameters():
      p.copy_(torch.randn(p.shape, generator=generator))
  return module.eval()


def transformer(seed=0, **overrides):
  """A tiny QwenImage21Transformer2DModel."""
  import diffusers

  config = {**MMDIT, **overrides}
  return randomise(diffusers.QwenImage21Transformer2DModel(**config), seed)


def vae(seed=1, **overrides):
  """A tiny AutoencoderKLQwenImage21 with temporal layers."""
  import diffusers

  config = {**VAE, **overrides}
  return randomise(diffusers.AutoencoderKLQwenImage21(**config), seed)


def text_encoder(seed=2):
  """A tiny Qwen3VLForConditionalGeneration; its weights are only copied."""
  import transformers

  rope = {"rope_type": "default", "rope_theta": 5e6,
          "mrope_section": [4, 2, 2]}  # fmt: skip
  config = transformers.Qwen3VLConfig(
    text_config={
      "vocab_size": 64, "hidden_size": 48, "intermediate_size": 48,
      "num_hidden_layers": 2, "num_attention_heads": 2,
      "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": rope,
    },
    vision_config={
      "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
      "patch_size": 8, "num_position_embeddings": 36, "out_hidden_size": 48,
      "deepstack_visual_indexes": [0],
    },
  )  # fmt: skip
  return randomise(transformers.Qwen3VLForConditionalGeneration(config), seed)


def write_json(path, fields):
  """Writes a JSON file, with its folder."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, "w") as file:
    json.dump(fields, file)


def pipeline(folder, *, dtype="bfloat16", shard="10GB"):
  """Writes a whole pipeline folder; the VAE stays in fp32, as published."""
  import diffusers
  import torch

  folder = str(folder)
  model = transformer().to(getattr(torch, dtype))
  model.save_pretrained(f"{folder}/transformer", max_shard_size=shard)
  vae().save_pretrained(f"{folder}/vae", max_shard_size=shard)
  diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(
    f"{folder}/scheduler"
  )
  text_encoder().save_pretrained(f"{folder}/text_encoder")
  write_json(f"{folder}/processor/tokenizer.json", {"tiny": True})
  write_json(f"{folder}/processor/nested/more.json", {"tiny": [1]})
  index = {"_class_name": "QwenImage21Pipeline", "sample_sigmas": [1.0, 0.5]}
  write_json(f"{folder}/model_index.json", index)
  return folder


def bits(array):
  """The raw bytes of an array as integers, so that NaNs compare equal."""
  array = np.asarray(array)
  return array.view(f"u{array.dtype.itemsize}")


def torch_bits(tensor):
  """`bits` of a torch tensor of any floating type."""
  import torch

  kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
  return tensor.contiguous().view(kinds[tensor.element_size()]).numpy()
