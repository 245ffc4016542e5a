# SPDX-License-Identifier: Apache-2.0
"""The condition encoder from and to transformers folders.

A folder is a whole pipeline (text_encoder/ and processor/) or a Qwen3-VL
model with its tokenizer beside the weights. Weights go straight into
(sharded) arrays; `lm_head` and the final norm are never read.
"""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qi2_jax.conditioning import templates, tokenizer
from qi2_jax.conditioning.encoder import TextEncoder
from qi2_jax.errors import InputError
from qi2_jax.interop import mapping, qwen3_vl, safetensors_io
from qi2_jax.interop.model_folder import component
from qi2_jax.interop.published import read_json, write_json
from qi2_jax.models import qwen3_vl as model_lib

_STEM = "model"


def load(
  path: str, *, dtype=jnp.float32, param_dtype=None,
  shardings: Callable | None = None,
) -> tuple[TextEncoder, dict]:  # fmt: skip
  """Reads encoder and tokenizer.

  Args:
    path: pipeline folder, or a folder of a Qwen3-VL model.
    dtype: compute dtype.
    param_dtype: dtype of the parameters; None keeps the file's.
    shardings: `abstract params -> shardings`, or None for one device.

  Raises:
    InputError: files are missing, damaged or of another kind of model.
  """
  weights = component(path, "text_encoder")
  published = read_json(os.path.join(weights, "config.json"))
  config = qwen3_vl.config(published, dtype=dtype)
  processor = processor_folder(path, weights)
  backend = tokenizer.load(processor)
  slot = backend.token_to_id(templates.IMAGE_PAD)
  if slot != config.image_token_id:
    raise InputError(
      f"{processor} numbers {templates.IMAGE_PAD} {slot} but {weights} "
      f"expects {config.image_token_id}; they belong to different models."
    )
  model = model_lib.Qwen3VL(config)
  reader = safetensors_io.open_tensors(weights, _STEM)
  abstract = jax.eval_shape(
    lambda: model_lib.init_params(model, jax.random.key(0))
  )
  abstract = mapping.stored_dtypes(
    reader, abstract, qwen3_vl.table, qwen3_vl.IGNORED
  )
  places = shardings(abstract) if shardings else None
  abstract = jax.tree.map(
    lambda a, s=None: jax.ShapeDtypeStruct(
      a.shape, param_dtype or a.dtype, sharding=s
    ),
    *((abstract, places) if shardings else (abstract,)),
  )
  params = mapping.load_tree(
    reader, abstract, qwen3_vl.table, ignored=qwen3_vl.IGNORED
  )
  mean, std = _image_statistics(processor)
  name = os.path.basename(os.path.abspath(path))
  encoder = TextEncoder(model, backend, mean, std, f"Qwen3-VL of {name}")
  return encoder, params


def processor_folder(path: str, weights: str) -> str:
  """The folder among the usual ones that holds a tokenizer."""
  places = [os.path.join(path, n) for n in ("processor", "tokenizer")]
  places.append(weights)
  for place in places:
    if any(
      os.path.isfile(os.path.join(place, name))
      for name in ("tokenizer.json", "vocab.json")
    ):
      return place
  raise InputError(
    f"{path} holds no tokenizer; expected tokenizer.json in processor/, in "
    "tokenizer/ or beside the weights."
  )


def _image_statistics(processor: str) -> tuple[tuple, tuple]:
  """Mean and std of the image processor; the family's 0.5 if unstated."""
  fields: dict = {}
  for name in ("preprocessor_config.json", "processor_config.json"):
    path = os.path.join(processor, name)
    if os.path.isfile(path):
      found = read_json(path)
      fields |= found.get("image_processor", found)
  half = (0.5, 0.5, 0.5)
  return (
    tuple(fields.get("image_mean") or half),
    tuple(fields.get("image_std") or half),
  )


def export(folder: str, encoder: TextEncoder, params) -> None:
  """Writes text_encoder/ and processor/ of the built-in encoder.

  transformers and diffusers read them as they read the published ones.
  """
  weights = os.path.join(folder, "text_encoder")
  processor = os.path.join(folder, "processor")
  built_in = tokenizer.built_in()
  tokenizer.save(built_in, processor)
  settings = _image_settings(encoder)
  # transformers' processor class asks for both, videos or not.
  for name, kind in (
    ("preprocessor", {"image_processor_type": "Qwen2VLImageProcessorFast"}),
    ("video_preprocessor", {"video_processor_type": "Qwen3VLVideoProcessor"}),
  ):
    write_json(os.path.join(processor, f"{name}_config.json"), settings | kind)
  os.makedirs(weights)
  config = encoder.model.config
  ids = {
    f"{name}_token_id": built_in.convert_tokens_to_ids(f"<|{name}|>")
    for name in ("vision_start", "vision_end")
  }
  write_json(
    os.path.join(weights, "config.json"), qwen3_vl.published(config, **ids)
  )
  tensors = mapping.export_tree(params, qwen3_vl.table)
  tensors |= qwen3_vl.extra_tensors(config)
  plan = [(name, t.shape, t.dtype) for name, t in tensors.items()]
  safetensors_io.write_tensors(weights, _STEM, plan, iter(tensors.items()))


def _image_settings(encoder: TextEncoder) -> dict:
  vision = encoder.model.config.vision
  return {
    "processor_class": "Qwen3VLProcessor",
    "image_mean": list(encoder.image_mean),
    "image_std": list(encoder.image_std),
    "patch_size": vision.patch_size,
    "temporal_patch_size": vision.temporal_patch_size,
    "merge_size": vision.merge_size,
    # Bounds of the area in pixels; one slot at least.
    "size": {"shortest_edge": vision.cell**2, "longest_edge": 2**24},
  }
