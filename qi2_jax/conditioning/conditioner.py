# SPDX-License-Identifier: Apache-2.0
"""From captions and images to `Conditioning`: host half and device half.

The host half runs in loader threads and in the sampler, one sample at a
time, and returns fixed-shape numpy arrays; the device half encodes text and
reference images with the frozen encoder and VAE.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qi2_jax.conditioning import encoder as encoder_lib
from qi2_jax.conditioning.layout import build_layout, num_slots
from qi2_jax.models.condition import Conditioning, Layout
from qi2_jax.models.vae import VAE


@dataclasses.dataclass(frozen=True)
class Conditioner:
  """Fixes the encoder, the VAE's factor and the text length.

  Attributes:
    encoder: condition encoder (or its stand-in).
    factor: pixels per latent.
    text_length: encoder tokens after the system turn for text-only prompts;
      reference images add their own tags and slots.
  """

  encoder: encoder_lib.TextEncoder
  factor: int
  text_length: int

  def host(
    self, prompt: str, references: Sequence[np.ndarray],
    target: tuple[int, int],
  ) -> dict:  # fmt: skip
    """Arrays of one sample.

    Args:
      prompt: caption or instruction.
      references: uint8 `[h, w, C]` images, sides divisible by 32.
      target: (height, width) of the target in pixels.

    Returns:
      dict of `ids`, `ids_valid`, `layout` (the fields of `Layout`) and
      `references` (tuple of uint8).
    """
    grids = [
      (r.shape[0] // self.factor, r.shape[1] // self.factor) for r in references
    ]
    slots = tuple(num_slots(g) for g in grids)
    length = self.text_length + encoder_lib.num_image_tokens(
      self.encoder, slots
    )
    ids, cut = encoder_lib.prompt_tokens(self.encoder, prompt, slots, length)
    if cut:
      logging.log_first_n(
        logging.WARNING,
        "prompts lose their last words: this one has %d tokens too many for "
        "config.text.length=%d: %s",
        3,
        cut,
        self.text_length,
        prompt,
      )
    system = encoder_lib.num_system_tokens(self.encoder)
    padded = np.zeros(system + length, np.int32)
    padded[: len(ids)] = ids
    layout = build_layout(
      [token == self.encoder.slot_id for token in ids[system:]],
      grids,
      (target[0] // self.factor, target[1] // self.factor),
      length,
    )
    return {
      "ids": padded,
      "ids_valid": np.arange(len(padded)) < len(ids),
      "layout": {
        field.name: getattr(layout, field.name)
        for field in dataclasses.fields(layout)
      },
      "references": tuple(references),
    }

  def encode_text(self, batch) -> jax.Array:
    """Device half of the text: states without the system turn `[B, T, C]`."""
    states = self.encoder.states(batch["ids"], batch["ids_valid"])
    return states[:, encoder_lib.num_system_tokens(self.encoder) :]

  def encode(self, vae: VAE, vae_variables, batch) -> Conditioning:
    """Device half: a batch of `host` dicts to `Conditioning`.

    Args:
      vae: the VAE whose latents stand for the reference images.
      vae_variables: its variables.
      batch: stacked `host` arrays.
    """
    text = self.encode_text(batch)
    size = text.shape[0]
    latents = [
      encode_images(vae, vae_variables, image).reshape(
        size, -1, vae.config.z_dim
      )
      for image in batch["references"]
    ]
    empty = jnp.zeros((size, 0, vae.config.z_dim), jnp.float32)
    return Conditioning(
      text_BTC=text,
      references_BRZ=jnp.concatenate([empty, *latents], axis=1),
      layout=Layout(**batch["layout"]),
    )


def to_unit(image: jax.Array) -> jax.Array:
  """uint8 to fp32 in [-1, 1]."""
  return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: np.ndarray) -> np.ndarray:
  """[-1, 1] to uint8, rounded, on the host."""
  return np.uint8(np.round((np.clip(image, -1, 1) + 1.0) * 127.5))


def encode_images(vae: VAE, variables, image: jax.Array) -> jax.Array:
  """uint8 images `[B, H, W, C]` to normalised latents `[B, h, w, Z]`."""
  return vae.apply(variables, to_unit(image), method="encode")


def stack(samples: Sequence[dict]) -> dict:
  """Stacks `host` dicts along a new batch axis."""
  return jax.tree.map(lambda *xs: np.stack(xs), *samples)
