# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: a checkpoint's own, and a small one built from code.

Both are byte-level BPE of the Qwen2 family, so both cut the templates'
special tokens and spaces alike and no text is out of vocabulary. Only the
Rust backend leaves this file: it is fast and safe in loader threads.

transformers is imported where it is used: it takes a second, more where torch
is installed, and most commands do not need it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import tokenizers

from qi2_jax.conditioning import templates
from qi2_jax.errors import InputError

if TYPE_CHECKING:
  import transformers

# What the built-in vocabulary knows as whole words; ours. Anything else is
# spelt in pieces down to bytes.
_WORDS = (
  "a an the in on at of to with and or is are it this that from into "
  "one two three four five six seven eight nine ten "
  "red green blue yellow purple orange black white gray brown pink "
  "circle circles square squares triangle triangles cross crosses star "
  "letter digit word text number shape image picture photo background "
  "top bottom left right above below center middle next behind front "
  "make remove add move replace change turn put draw paint colour color "
  "small large big tiny old new man woman person people child cat dog bird "
  "house tree car street sky sea water sun night day light dark city face "
  "transparency transparent alpha channel RGBA has <image1> <image "
  "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"
)


def load(folder: str) -> tokenizers.Tokenizer:
  """The tokenizer of a folder with tokenizer files.

  Raises:
    InputError: there is none, or it lacks the templates' special tokens.
  """
  import transformers

  try:
    loaded = transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True
    )
    backend = loaded.backend_tokenizer
  except (OSError, ValueError, AttributeError, KeyError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(
      f"{folder} holds no readable tokenizer ({reason}); it needs "
      "tokenizer.json and tokenizer_config.json."
    ) from error
  missing = [
    token
    for token in templates.SPECIAL_TOKENS
    if backend.token_to_id(token) is None
  ]
  if missing:
    raise InputError(
      f"the tokenizer in {folder} does not know {missing[0]}; it is not of "
      "the Qwen-VL family."
    )
  return backend


def built_in() -> transformers.PreTrainedTokenizerBase:
  """A byte-level BPE with about 700 entries, the same on every machine."""
  import transformers

  sentences = [f"{word} {word}" for word in _WORDS.split()]
  sentences += [templates.SYSTEM, templates.HEADER, templates.FOOTER]
  for token in templates.SPECIAL_TOKENS:
    sentences = [s.replace(token, "") for s in sentences]
  tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
    sentences, vocab_size=2000, min_frequency=1, show_progress=False
  )
  tokenizer.add_special_tokens(
    {"extra_special_tokens": list(templates.SPECIAL_TOKENS)}
  )
  tokenizer.chat_template = templates.CHAT
  return tokenizer


def save(tokenizer: transformers.PreTrainedTokenizerBase, folder: str) -> None:
  """Writes the files that `load` and transformers read."""
  os.makedirs(folder, exist_ok=True)
  tokenizer.save_pretrained(folder)
