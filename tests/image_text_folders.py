# SPDX-License-Identifier: Apache-2.0
"""Tiny random CLIP and SigLIP folders, made by transformers."""

import json
import re

import tokenizers
import torch
import transformers
from transformers.models.clip import image_processing_pil_clip as clip_images
from transformers.models.siglip import (
  image_processing_pil_siglip as siglip_images,
)

TEXTS = (
  "a red circle",
  "Two BLUE squares, left of a cat's house!",
  "",
  "海边的灯塔 at dusk 12",
  "word " * 40,
)


def add_noise(model, seed: int = 0):
  """Makes every parameter visible in the output; scales stay near theirs."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = 0.2 * torch.randn(p.shape, generator=generator)
      norm = re.search(r"(norm\d?|layrnorm)\.weight|logit", name)
      p.copy_(p + noise if norm else noise)
  return model.eval()


def clip_tokenizer():
  """Byte-level BPE that knows two merges; its end of text is the last id."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  pieces = [*letters, *(c + "</w>" for c in letters), "re", "red</w>"]
  pieces += ["<|startoftext|>", "<|endoftext|>"]
  return transformers.CLIPTokenizer(
    vocab={piece: i for i, piece in enumerate(pieces)},
    merges=[("r", "e"), ("re", "d</w>")],
  )


def clip(
  folder, *, activation="quick_gelu", text_width=32, vision_width=48,
  projection=24, image_size=40, patch=8, eos=None, layers=2,
):  # fmt: skip
  """Writes a CLIP folder; returns `(model, tokenizer, image processor)`."""
  tokenizer = clip_tokenizer()
  last = len(tokenizer) - 1
  config = transformers.CLIPConfig(
    text_config={
      "hidden_size": text_width, "intermediate_size": 56,
      "num_hidden_layers": layers, "num_attention_heads": 4,
      "vocab_size": last + 1, "max_position_embeddings": 21,
      "hidden_act": activation, "eos_token_id": last if eos is None else eos,
      "bos_token_id": last - 1,
    },
    vision_config={
      "hidden_size": vision_width, "intermediate_size": 72,
      "num_hidden_layers": layers + 1, "num_attention_heads": 3,
      "image_size": image_size, "patch_size": patch, "hidden_act": activation,
    },
    projection_dim=projection,
  )  # fmt: skip
  model = add_noise(transformers.CLIPModel(config))
  processor = clip_images.CLIPImageProcessorPil(
    size={"shortest_edge": image_size},
    crop_size={"height": image_size, "width": image_size},
  )
  for part in (model, tokenizer, processor):
    part.save_pretrained(folder)
  return model, tokenizer, processor


def siglip2_tokenizer():
  """Gemma's kind of BPE over letters, with bytes for everything else."""
  special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
  letters = list("abcdefghijklmnopqrstuvwxyz▁,!'")
  pieces = [*special, *letters, *(f"<0x{i:02X}>" for i in range(256)), "re"]
  return transformers.Siglip2Tokenizer(
    vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("r", "e")]
  )


def siglip(folder, *, width=36, text_width=40, image_size=32, patch=6):
  """Writes a SigLIP 2 folder; returns `(model, tokenizer, processor)`."""
  tokenizer = siglip2_tokenizer()
  config = transformers.SiglipConfig(
    text_config={
      "hidden_size": text_width, "intermediate_size": 56,
      "num_hidden_layers": 2, "num_attention_heads": 4,
      "vocab_size": len(tokenizer), "max_position_embeddings": 24,
      "projection_size": width, "bos_token_id": 2, "eos_token_id": 1,
    },
    vision_config={
      "hidden_size": width, "intermediate_size": 72, "num_hidden_layers": 3,
      "num_attention_heads": 3, "image_size": image_size, "patch_size": patch,
    },
  )  # fmt: skip
  model = add_noise(transformers.SiglipModel(config))
  processor = siglip_images.SiglipImageProcessorPil(
    size={"height": image_size, "width": image_size}
  )
  for part in (model, tokenizer, processor):
    part.save_pretrained(folder)
  return model, tokenizer, processor


def edit_json(path, **fields):
  """Changes a file; None removes a field."""
  found = json.loads(path.read_text())
  found |= fields
  kept = {k: v for k, v in found.items() if v is not None}
  path.write_text(json.dumps(kept))
