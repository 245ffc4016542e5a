# SPDX-License-Identifier: Apache-2.0
"""Cached features in the place of pixels: same conditions, nothing encoded.

The producer is `python -m qi2_jax.cache`; here is what a task needs to
consume its rows (`data_pipelines/features`).

Shapes: B batch, N target latents, T encoder tokens padded, C their width, R
latents of all references, Z latent channels.
"""

import hashlib

import jax.numpy as jnp
import numpy as np

from qi2_jax.conditioning import encoder as encoder_lib
from qi2_jax.conditioning import templates
from qi2_jax.conditioning.conditioner import Conditioner
from qi2_jax.errors import InputError
from qi2_jax.models.condition import Conditioning, Layout
from qi2_jax.training import frozen, weights

# Any tokenizer or template that differs in practice cuts this another way.
_PROBE = 'A "Größe" of 3.14 €, 写着“你好”的 café\n  and 🎈 it\'s HERE'


def signature(models: frozen.Models) -> dict[str, str | int]:
  """What cached features depend on, as plain JSON.

  Args:
    models: of the run; weights count by a checksum.
  """
  conditioner = models.conditioner
  encoder = conditioner.encoder
  return {
    "vae": _weights(models.frozen.vae, models.vae.config.dtype),
    "text encoder": _weights(
      models.frozen.encoder, encoder.model.config.dtype
    ),
    "prompt template": prompt_template(encoder),
    "text length": conditioner.text_length,
  }  # fmt: skip


def prompt_template(encoder: encoder_lib.TextEncoder) -> str:
  """A name for what turns a prompt and its images into the encoder's input."""
  seen = [
    encoder.tokenize(templates.render(_PROBE, 2)),
    encoder_lib.num_system_tokens(encoder),
    encoder.image_mean,
    encoder.image_std,
  ]
  return hashlib.sha256(repr(seen).encode()).hexdigest()[:12]


def _weights(params, dtype) -> str:
  return f"{weights.checksum(params):08x} in {jnp.dtype(dtype).name}"


def is_cached(sample: dict) -> bool:
  """Whether a loader's sample, or a batch of `host`, has no pixels."""
  return "latents" in sample


def host(
  conditioner: Conditioner, sample: dict, no_caption: bool, no_references: bool
) -> dict:
  """Arrays of one sample, like those of `Conditioner.host`.

  Args:
    conditioner: lays out the tokens.
    sample: of `FeatureDataset.sample`.
    no_caption: the empty caption takes the place of the sample's.
    no_references: white takes the place of the references.

  Returns:
    dict of `latents` [N, Z], `text` [T, C], `reference_latents` [R, Z] and
    `layout`.

  Raises:
    InputError: the states are not those of this caption.
  """
  encoder = conditioner.encoder
  # Only their sizes count; a broadcast scalar takes no memory.
  blanks = [
    np.broadcast_to(np.uint8(0), (*size, 3))
    for size in sample["reference_sizes"]
  ]
  caption = "" if no_caption else sample["caption"]
  made = conditioner.host(
    caption, blanks, sample["size"], sample.get("text_length")
  )
  states, references = sample["condition"](no_caption, no_references)
  system = encoder_lib.num_system_tokens(encoder)
  count = int(made["ids_valid"].sum()) - system
  if states.shape != (count, encoder.width):
    raise InputError(
      f"cached states of {sample['id']!r} have the shape {states.shape}, but "
      f"the caption needs {(count, encoder.width)}; make the cache again."
    )
  text = np.zeros((len(made["ids"]) - system, encoder.width), states.dtype)
  text[:count] = states
  latents = sample["latents"]
  return {
    "latents": latents,
    "text": text,
    "reference_latents": np.concatenate([latents[:0], *references]),
    "layout": made["layout"],
  }


def features(batch: dict) -> dict:
  """Device half: a batch of `host` dicts to the features of `flow_task`.

  Args:
    batch: stacked arrays, in the cache's dtypes.

  Returns:
    `{"latents_BNZ", "condition"}` in fp32.
  """
  latents = jnp.asarray(batch["latents"], jnp.float32)
  return {"latents_BNZ": latents, "condition": condition(batch)}


def condition(batch: dict) -> Conditioning:
  """The condition alone, see `features`."""
  text, references = (
    jnp.asarray(batch[name], jnp.float32)
    for name in ("text", "reference_latents")
  )
  return Conditioning(text, references, Layout(**batch["layout"]))
