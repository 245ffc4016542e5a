# SPDX-License-Identifier: Apache-2.0
"""From captions and images to `Conditioning`: host half and device half.

The host half runs in loader threads and in the sampler, one sample at a
time, and returns fixed-shape numpy arrays; the device half encodes text and
reference images with the frozen encoder and VAE.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qi2_jax.conditioning import encoder as encoder_lib
from qi2_jax.conditioning import layout as layout_lib
from qi2_jax.conditioning import templates, vl_layout
from qi2_jax.conditioning.images import check_count
from qi2_jax.errors import InputError
from qi2_jax.models import vae_tiling
from qi2_jax.models.condition import Conditioning, Layout
from qi2_jax.models.vae import VAE


@flax.struct.dataclass
class Frozen:
  """Variables of the models that condition and decode, never trained here.

  Attributes:
    vae: weights and latent statistics of the VAE.
    encoder: parameters of the text encoder.
  """

  vae: dict
  encoder: dict


@dataclasses.dataclass(frozen=True)
class Conditioner:
  """Fixes the encoder, the VAE and the text length.

  Attributes:
    encoder: condition encoder.
    vae: the VAE whose latents stand for the reference images.
    text_length: encoder tokens after the system turn for text-only prompts;
      reference images add their own tags and slots. The sampler rounds a
      longer prompt up to a multiple of it.
  """

  encoder: encoder_lib.TextEncoder
  vae: VAE
  text_length: int

  def __post_init__(self):
    """Raises InputError if encoder and VAE cut images differently."""
    if self.encoder.cell != 2 * self.factor:
      raise InputError(
        f"the text encoder sees {self.encoder.cell} px per slot, but the VAE "
        f"needs {2 * self.factor} (2 x 2 latents); choose another pair."
      )

  @property
  def factor(self) -> int:
    """Pixels per latent."""
    return self.vae.config.factor

  def fitting_length(
    self, prompt: str, references: Sequence[np.ndarray]
  ) -> int:  # fmt: skip
    """Smallest multiple of `text_length` that cuts no word of the prompt."""
    slots = self._slots(references)
    ids, _ = encoder_lib.prompt_tokens(
      self.encoder, prompt, slots, layout_lib.MAX_POSITION + sum(slots)
    )
    words = (
      len(ids)
      - encoder_lib.num_system_tokens(self.encoder)
      - encoder_lib.num_image_tokens(self.encoder, slots)
    )
    return self.text_length * max(1, -(-words // self.text_length))

  def prompt_length(self, prompt: str, references: int = 0) -> int:
    """Encoder tokens that `text_length` counts, of a prompt with references."""
    text = templates.render(prompt, references)
    return (
      len(self.encoder.tokenize(text))
      - encoder_lib.num_system_tokens(self.encoder)
      - encoder_lib.num_image_tokens(self.encoder, (1,) * references)
    )

  def host(
    self, prompt: str, references: Sequence[np.ndarray],
    target: tuple[int, int], text_length: int | None = None,
  ) -> dict:  # fmt: skip
    """Arrays of one sample.

    Args:
      prompt: caption or instruction.
      references: uint8 `[h, w, C]` images, sides divisible by 32.
      target: (height, width) of the target in pixels.
      text_length: takes the place of the conditioner's own.

    Returns:
      dict of `ids`, `ids_valid`, `positions` (M-RoPE, `[3, T]`),
      `image_index`, `layout` (the fields of `Layout`) and `references`
      (tuple of uint8).

    Raises:
      InputError: too many references, or a prompt beyond the positions that
        the model knows.
    """
    text_length = text_length or self.text_length
    slots = self._slots(references)
    length = text_length + encoder_lib.num_image_tokens(self.encoder, slots)
    ids, cut = encoder_lib.prompt_tokens(self.encoder, prompt, slots, length)
    if cut:
      logging.log_first_n(
        logging.WARNING,
        "prompts lose their last words: this one has %d tokens too many for "
        "config.text.length=%d: %s",
        3,
        cut,
        text_length,
        prompt,
      )
    system = encoder_lib.num_system_tokens(self.encoder)
    padded = np.zeros(system + length, np.int32)
    padded[: len(ids)] = ids
    grids = self._grids(references)
    is_slot = [token == self.encoder.slot_id for token in ids]
    layout = layout_lib.build_layout(
      is_slot[system:],
      grids,
      (target[0] // self.factor, target[1] // self.factor),
      length,
    )
    positions, image_index = vl_layout.text_positions(
      is_slot, [(h // 2, w // 2) for h, w in grids], len(padded)
    )
    return {
      "ids": padded,
      "ids_valid": np.arange(len(padded)) < len(ids),
      "positions": positions,
      "image_index": image_index,
      "layout": {
        field.name: getattr(layout, field.name)
        for field in dataclasses.fields(layout)
      },
      "references": tuple(references),
    }

  def _grids(self, references) -> list[tuple[int, int]]:
    check_count(len(references))
    return [
      (r.shape[0] // self.factor, r.shape[1] // self.factor) for r in references
    ]

  def _slots(self, references) -> tuple[int, ...]:
    return tuple(layout_lib.num_slots(g) for g in self._grids(references))

  def encode_text(self, params, batch) -> jax.Array:
    """Device half of the text: states without the system turn `[B, T, C]`."""
    states = self.encoder.states(params, batch)
    return states[:, encoder_lib.num_system_tokens(self.encoder) :]

  def encode(self, frozen: Frozen, batch) -> Conditioning:
    """Device half: a batch of `host` dicts to `Conditioning`.

    Args:
      frozen: variables of encoder and VAE.
      batch: stacked `host` arrays.
    """
    text = self.encode_text(frozen.encoder, batch)
    size, channels = text.shape[0], self.vae.config.z_dim
    latents = [
      encode_images(self.vae, frozen.vae, image).reshape(size, -1, channels)
      for image in batch["references"]
    ]
    empty = jnp.zeros((size, 0, channels), jnp.float32)
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
  return vae_tiling.encode(vae, variables, to_unit(image))


def stack(samples: Sequence[dict]) -> dict:
  """Stacks `host` dicts along a new batch axis."""
  return jax.tree.map(lambda *xs: np.stack(xs), *samples)
