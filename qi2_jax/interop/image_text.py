# SPDX-License-Identifier: Apache-2.0
"""A CLIP or SigLIP folder as one thing that embeds images and texts.

Batches are padded to one size, so that each tower is compiled once.

Shapes: B images, C texts, S pixels along a prepared image, h, w patches along
an axis, D width, P width of the common space.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qi2_jax.conditioning import tokenizer as built_in
from qi2_jax.errors import InputError
from qi2_jax.interop import clip, image_processor, siglip, text_tokens, vit
from qi2_jax.interop.image_processor import ImageProcessor
from qi2_jax.interop.published import read_json
from qi2_jax.interop.text_tokens import TextTokens
from qi2_jax.models import clip as clip_model
from qi2_jax.models import siglip as siglip_model
from qi2_jax.models.vit import init_params

# In place of a folder: the tiny model of `random_model`.
RANDOM = "random"
_KINDS = {
  clip.KIND: (clip, clip_model.CLIP, clip_model.SHARDING_RULES),
  siglip.KIND: (siglip, siglip_model.SigLIP, siglip_model.SHARDING_RULES),
}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageText:
  """A model with what prepares its inputs.

  Attributes:
    model: CLIP or SigLIP.
    params: its parameters.
    processor: of images.
    tokens: of texts.
  """

  model: clip_model.CLIP | siglip_model.SigLIP
  params: dict
  processor: ImageProcessor
  tokens: TextTokens

  @property
  def width(self) -> int:
    """P."""
    return self.model.config.projection


def sharding_rules(kind: str):
  """The parameter rules of a kind."""
  return _KINDS[kind][2]


def kind_of(path: str) -> str:
  """`clip` or `siglip`.

  Raises:
    InputError: the folder is missing or holds another model.
  """
  if path == RANDOM:
    return siglip.KIND
  kind = read_json(os.path.join(path, "config.json")).get("model_type")
  if kind not in _KINDS:
    raise InputError(
      f"{path} holds a model of type {kind!r}; image-text scores need one of "
      f"{sorted(_KINDS)} (SigLIP 2 of a fixed resolution is {siglip.KIND!r})."
    )
  return kind


def load(
  path: str, *, dtype=jnp.float32, param_dtype=None,
  shardings: Callable | None = None,
) -> ImageText:  # fmt: skip
  """Reads a transformers folder of CLIP or SigLIP.

  Args:
    path: local folder, or `RANDOM`.
    dtype: compute dtype.
    param_dtype: dtype of the parameters; None keeps the file's.
    shardings: `abstract params -> shardings`, or None for one device.

  Raises:
    InputError: files are missing, damaged, of another kind of model, or do
      not fit each other.
  """
  if path == RANDOM:
    return random_model(jax.random.key(0), shardings=shardings)
  kind = kind_of(path)
  # The small files first: they fail before gigabytes are read.
  published = read_json(os.path.join(path, "config.json"))
  names, network, _ = _KINDS[kind]
  config = names.config(published, dtype=dtype)
  processor = image_processor.load(path, kind)
  tokens = text_tokens.load(path, kind, config.length)
  _check_tokens(path, tokens, config)
  found = processor.crop or processor.size
  if found != (config.image_size,) * 2:
    raise InputError(
      f"the image processor of {path} makes images of {found}, the model "
      f"takes {config.image_size} px; download the folder again."
    )
  model = network(config)
  params = vit.read(
    path, vit.abstract_params(model), names.table, param_dtype=param_dtype,
    shardings=shardings,
  )  # fmt: skip
  return ImageText(model, params, processor, tokens)


def _check_tokens(path: str, tokens: TextTokens, config) -> None:
  """Refuses a tokenizer of another model: its texts would be misread."""
  ids = tokens(["a"])[0]
  eos = getattr(config, "eos", None)
  if ids.max() >= config.vocabulary or (eos is not None and eos not in ids):
    raise InputError(
      f"the tokenizer of {path} writes the ids {ids.tolist()[:8]}..., which "
      f"the model (vocabulary {config.vocabulary}, end of text {eos}) cannot "
      "read; download the folder again."
    )


def random_model(
  key: jax.Array, *, shardings: Callable | None = None
) -> ImageText:
  """A tiny SigLIP with random weights, and a loud warning.

  Args:
    key: of the weights.
    shardings: as in `load`.
  """
  logging.warning(
    "IMAGE-TEXT SCORES COME FROM A TINY MODEL WITH RANDOM WEIGHTS. They mean "
    "nothing; pass a CLIP or SigLIP folder for anything but a test."
  )
  config = siglip_model.PRESETS["tiny"]
  model = siglip_model.SigLIP(config)
  places = shardings(vit.abstract_params(model)) if shardings else None
  init = jax.jit(init_params, static_argnums=0, out_shardings=places)
  params = init(model, key)
  side = config.image_size
  half = (0.5, 0.5, 0.5)
  tokens = text_tokens.fixed_length(
    built_in.built_in().backend_tokenizer, config.length, "<|endoftext|>",
    "right", text_tokens.unchanged,
  )  # fmt: skip
  return ImageText(
    model, params, ImageProcessor(half, half, size=(side, side)), tokens
  )


@functools.partial(jax.jit, static_argnames=("model", "method"))
def run(params, x, *, model, method: str) -> jax.Array:
  """One of the model's methods on prepared images or token ids."""
  return model.apply({"params": params}, x, method=method)


def in_batches(
  call: Callable, rows: Sequence, prepare: Callable, size: int
) -> np.ndarray:
  """`call` on batches of prepared rows, the last one padded.

  Args:
    call: stacked rows -> array of as many rows.
    rows: at least one.
    prepare: a list of rows -> stacked rows.
    size: rows of a call.
  """
  out = []
  for start in range(0, len(rows), size):
    part = list(rows[start : start + size])
    part += part[-1:] * (size - len(part))
    out.append(np.asarray(call(prepare(part))))
  return np.concatenate(out)[: len(rows)]


def _prepared(processor: ImageProcessor, images) -> np.ndarray:
  return np.stack([image_processor.prepare(x, processor) for x in images])


def embed_images(
  scorer: ImageText, images: Sequence[np.ndarray], batch_size: int = 32
) -> np.ndarray:
  """uint8 images of any sizes -> fp32 unit vectors `[B, P]`."""
  call = lambda x: run(  # noqa: E731
    scorer.params, x, model=scorer.model, method="embed_images"
  )
  prepare = functools.partial(_prepared, scorer.processor)
  return in_batches(call, images, prepare, batch_size)


def embed_texts(
  scorer: ImageText, texts: Sequence[str], batch_size: int = 32
) -> np.ndarray:
  """Texts -> fp32 unit vectors `[C, P]`."""
  call = lambda x: run(  # noqa: E731
    scorer.params, x, model=scorer.model, method="embed_texts"
  )
  return in_batches(call, texts, scorer.tokens, batch_size)


def scaled(scorer: ImageText, cosine: np.ndarray) -> np.ndarray:
  """Cosines -> the model's logits."""
  return np.asarray(
    run(scorer.params, cosine, model=scorer.model, method="scaled")
  )


def patches(
  scorer: ImageText, images: Sequence[np.ndarray], batch_size: int = 32
) -> np.ndarray:
  """States of the patches of whole images, squeezed square: `[B, h, w, D]`."""
  whole = scorer.processor.whole(scorer.model.config.image_size)
  call = lambda x: run(  # noqa: E731
    scorer.params, x, model=scorer.model, method="patches"
  )
  return in_batches(
    call, images, functools.partial(_prepared, whole), batch_size
  )
