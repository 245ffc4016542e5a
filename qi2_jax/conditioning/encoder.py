# SPDX-License-Identifier: Apache-2.0
"""The condition encoder (Qwen3-VL with its tokenizer) and prompt tokens.

Without files there is a built-in encoder: a tiny Qwen3-VL with random frozen
weights. It lets the whole stack run on a laptop through the code that the
real encoder runs through; it can tell words apart and knows no language.
Every log and report that uses it says so.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import tokenizers

from qi2_jax.conditioning import templates, vl_layout
from qi2_jax.conditioning import tokenizer as tokenizer_lib
from qi2_jax.errors import InputError
from qi2_jax.models import qwen3_vl
from qi2_jax.parallel.sharding import path_name


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
  """Qwen3-VL, how it reads text and how it reads images.

  Attributes:
    model: the module; its parameters are passed to `states`.
    tokenizer: raw string to ids, special tokens recognised.
    image_mean: per channel, of pixels in [0, 1].
    image_std: per channel.
    description: one line for logs and reports.
  """

  model: qwen3_vl.Qwen3VL
  tokenizer: tokenizers.Tokenizer
  image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
  description: str = ""

  @property
  def width(self) -> int:
    """Channels of the states."""
    return self.model.config.width

  @property
  def cell(self) -> int:
    """Pixels per image slot along each side."""
    return self.model.config.vision.cell

  @property
  def slot_id(self) -> int:
    """Token id of an image slot."""
    return self.model.config.image_token_id

  def tokenize(self, text: str) -> list[int]:
    """Token ids of a raw string; nothing is added to it."""
    return self.tokenizer.encode(text, add_special_tokens=False).ids

  def states(self, params, batch) -> jax.Array:
    """States before the final norm: fp32 `[B, T, C]`, on the device.

    Args:
      params: parameters of `model`.
      batch: stacked arrays of `Conditioner.host`; RGBA references are seen
        over white.
    """
    images = tuple(
      vl_layout.normalise(
        vl_layout.over_white(image), self.image_mean, self.image_std
      )
      for image in batch["references"]
    )
    states = self.model.apply(
      {"params": params}, batch["ids"], batch["ids_valid"],
      batch["positions"], batch["image_index"] if images else None, images,
    )  # fmt: skip
    return states.astype(jnp.float32)


BUILT_IN = "built-in tiny Qwen3-VL (random frozen weights, knows no language)"


def built_in(width: int = 64) -> tuple[TextEncoder, dict]:
  """The encoder that needs no files, and its parameters.

  Args:
    width: channels of the states.
  """
  tokenizer = tokenizer_lib.built_in().backend_tokenizer
  preset = qwen3_vl.PRESETS["tiny"]
  config = dataclasses.replace(
    preset, width=width, vocab_size=tokenizer.get_vocab_size(),
    image_token_id=tokenizer.token_to_id(templates.IMAGE_PAD),
    vision=dataclasses.replace(preset.vision, out_width=width),
  )  # fmt: skip
  model = qwen3_vl.Qwen3VL(config)
  params = jax.jit(lambda key: _fixed(qwen3_vl.init_params(model, key)))(
    jax.random.key(0)
  )
  return TextEncoder(model, tokenizer, description=BUILT_IN), params


def _fixed(params) -> dict:
  """Quiets the residual branches, so that a state is mostly its own token.

  Random attention and MLPs carry no meaning; at full strength they would
  only blur the words. The factor is ours.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: 0.3 * leaf if path_name(path).endswith(
      ("to_out/kernel", "mlp/out/kernel")
    ) else leaf,
    params,
  )  # fmt: skip


def prompt_tokens(
  encoder: TextEncoder, prompt: str, slots: Sequence[int], text_length: int
) -> tuple[list[int], int]:
  """Token ids of a templated prompt, system turn included, slots expanded.

  Args:
    encoder: supplies the tokenizer.
    prompt: the user's text.
    slots: encoder slots of each reference image.
    text_length: most tokens kept after the system turn; a longer prompt
      loses its last words, never the template's closing tokens.

  Returns:
    `(ids, cut)`: token ids, and how many prompt tokens were cut.

  Raises:
    InputError: not even the template and the slots fit into `text_length`.
  """
  ids, image = [], 0
  for token in encoder.tokenize(templates.render(prompt, len(slots))):
    count = 1
    if token == encoder.slot_id:
      count, image = slots[image], image + 1
    ids += [token] * count
  longest = num_system_tokens(encoder) + text_length
  cut = max(0, len(ids) - longest)
  if not cut:
    return ids, 0
  footer = encoder.tokenize(templates.FOOTER)
  kept = longest - len(footer)
  words = len(encoder.tokenize(templates.clean(prompt)))
  if kept < len(ids) - len(footer) - words:
    raise InputError(
      f"text_length={text_length} is too short for the template and "
      f"{sum(slots)} image slots; raise config.text.length."
    )
  return ids[:kept] + footer, cut


@functools.lru_cache
def num_image_tokens(encoder: TextEncoder, slots: tuple[int, ...]) -> int:
  """Tokens that reference images add to a prompt: tags and slots."""
  size = [
    len(encoder.tokenize(templates.render("", n))) for n in (0, len(slots))
  ]
  return size[1] - size[0] - len(slots) + sum(slots)


@functools.lru_cache
def num_system_tokens(encoder: TextEncoder) -> int:
  """Leading tokens whose states are dropped (the system turn)."""
  return len(encoder.tokenize(templates.SYSTEM))
