# SPDX-License-Identifier: Apache-2.0
"""The condition encoder's protocol and its embedded stand-in.

The stand-in needs no files: it splits text into words and gives every word a
fixed random vector. It knows no language. It lets the whole stack run on a
laptop, and every log and report that uses it says so.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from qi2_jax.conditioning import templates
from qi2_jax.errors import InputError


class TextEncoder(Protocol):
  """What the rest of the stack needs from a condition encoder.

  Attributes:
    width: channels of the states.
    slot_id: token id of an image slot.
    description: one line for logs and reports.
  """

  width: int
  slot_id: int
  description: str

  def tokenize(self, text: str) -> list[int]:
    """Token ids of a raw string, special tokens recognised."""
    ...

  def states(self, ids_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """States before the final norm: `[B, T, C]`, on the device."""
    ...


_PIECES = re.compile(
  "|".join(re.escape(t) for t in templates.SPECIAL_TOKENS)
  + r"|<image\d+>|\w+|[^\w ]"
)


@dataclasses.dataclass(frozen=True)
class WordHashEncoder:
  """Random frozen stand-in: one Gaussian vector per word, order-free.

  Ids are 31-bit hashes of the words, and a vector is drawn from its id, so
  there is neither a vocabulary nor a table, and no caption is out of it.
  """

  width: int = 64
  seed: int = 0
  description: str = (
    "word-hash stand-in (random frozen vectors, no language knowledge)"
  )

  @property
  def slot_id(self) -> int:
    """Id of `<|image_pad|>`."""
    return _word_id(templates.IMAGE_PAD)

  def tokenize(self, text: str) -> list[int]:
    """Words, special tokens and punctuation marks, hashed."""
    return [_word_id(piece) for piece in _PIECES.findall(text)]

  def states(self, ids_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """Looks every id up; padding gets zeros."""
    root = jax.random.key(self.seed)

    def vector(word):
      return jax.random.normal(jax.random.fold_in(root, word), (self.width,))

    states = jax.vmap(jax.vmap(vector))(ids_BT)
    return states * valid_BT[:, :, None].astype(jnp.float32)


def _word_id(word: str) -> int:
  return int.from_bytes(hashlib.md5(word.encode()).digest()[:4]) >> 1


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
