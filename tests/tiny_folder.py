# SPDX-License-Identifier: Apache-2.0
"""A complete tiny Qwen-Image-2.1 pipeline folder, made by the other side.

diffusers and transformers create and save every component with random
weights, in the published layout; only model_index.json and the processor's
settings are written by hand (the processor class needs torchvision).
"""

import json
import re

import diffusers
import torch
import transformers

from qi2_jax.conditioning import templates, tokenizer

Z = 16
SCHEDULER = {
  "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": True,
  "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
  "max_image_seq_len": 8192, "shift_terminal": 0.02,
  "time_shift_type": "exponential",
}  # fmt: skip
TURBO_SCHEDULER = SCHEDULER | {
  "use_dynamic_shifting": False, "shift_terminal": None,
}  # fmt: skip
# Of Qwen-Image-2.1-Turbo's model_index.json.
TURBO_SIGMAS = [
  1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568,
]  # fmt: skip


def randomise(model, seed):
  """Fills every parameter at a scale that keeps activations near one."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      if re.search(r"norm|gamma", name):
        p.copy_(p + 0.2 * noise)
      else:
        fan_in = p[0].numel() if p.ndim > 1 else 25
        p.copy_(noise / fan_in**0.5)
  return model.eval()


def attentive(model):
  """Strengthens attention, so that an image shows what its prompt says."""
  with torch.no_grad():
    for name, p in model.named_parameters():
      if re.search(r"to_v|to_out", name):
        p.mul_(4)
      elif "norm_q" in name:
        p.mul_(2)
  return model


def mmdit(layers=2, context=64):
  """A tiny transformer."""
  return diffusers.QwenImage21Transformer2DModel(
    in_channels=Z, out_channels=Z, num_layers=layers, attention_head_dim=32,
    num_attention_heads=2, context_in_dim=context, axes_dims_rope=(8, 12, 12),
  )  # fmt: skip


def vae():
  """A tiny RGBA VAE of the full structure (factor 16)."""
  generator = torch.Generator().manual_seed(9)
  return diffusers.AutoencoderKLQwenImage21(
    base_dim=8, decoder_base_dim=12, z_dim=Z, dim_mult=[1, 2, 4, 8, 8],
    num_res_blocks=1, is_residual=True, in_channels=4, out_channels=4,
    temperal_downsample=[False, True, True, True],
    latents_mean=torch.randn(Z, generator=generator).tolist(),
    latents_std=(1 + torch.rand(Z, generator=generator)).tolist(),
  )  # fmt: skip


def text_encoder(words):
  """A tiny Qwen3-VL for a tokenizer of the Qwen2 family."""
  ids = {
    f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>")
    for name, token in (
      ("image", "image_pad"), ("vision_start", "vision_start"),
      ("vision_end", "vision_end"),
    )
  }  # fmt: skip
  config = transformers.Qwen3VLConfig(
    text_config={
      "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 96,
      "num_hidden_layers": 5, "num_attention_heads": 4,
      "num_key_value_heads": 2, "head_dim": 32,
      "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6,
        "mrope_section": [6, 5, 5], "mrope_interleaved": True,
      },
    },
    vision_config={
      "depth": 4, "hidden_size": 48, "num_heads": 4, "intermediate_size": 80,
      "patch_size": 16, "out_hidden_size": 64, "num_position_embeddings": 36,
      "deepstack_visual_indexes": [0, 1, 2],
    },
    video_token_id=len(words) - 1, **ids,
  )  # fmt: skip
  return transformers.Qwen3VLForConditionalGeneration(config)


def create(path, *, dtype=torch.float32, turbo=False, max_shard_size="5GB"):
  """Writes the folder; returns its path as text."""
  path.mkdir(parents=True, exist_ok=True)
  words = tokenizer.built_in()
  parts = {
    "transformer": attentive(randomise(mmdit(), 0)),
    "vae": randomise(vae(), 1),
    "text_encoder": randomise(text_encoder(words), 2),
  }
  for name, part in parts.items():
    part.to(dtype).save_pretrained(path / name, max_shard_size=max_shard_size)
  scheduler = TURBO_SCHEDULER if turbo else SCHEDULER
  diffusers.FlowMatchEulerDiscreteScheduler(**scheduler).save_pretrained(
    path / "scheduler"
  )
  words.save_pretrained(path / "processor")
  settings = {
    "processor_class": "Qwen3VLProcessor", "patch_size": 16,
    "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 32 * 32, "longest_edge": 2**24},
  }  # fmt: skip
  for name, kind in (
    ("preprocessor", {"image_processor_type": "Qwen2VLImageProcessorFast"}),
    ("video_preprocessor", {"video_processor_type": "Qwen3VLVideoProcessor"}),
  ):
    _write(path / "processor" / f"{name}_config.json", settings | kind)
  index = {
    "_class_name": "QwenImage21Pipeline",
    "_diffusers_version": diffusers.__version__,
    "processor": ["transformers", "Qwen3VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
    "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage21"],
  }
  if turbo:
    index["sample_sigmas"] = TURBO_SIGMAS
  _write(path / "model_index.json", index)
  assert words.convert_tokens_to_ids(templates.IMAGE_PAD) is not None
  return str(path)


def _write(path, content):
  path.write_text(json.dumps(content, indent=2))
