# SPDX-License-Identifier: Apache-2.0
"""Texts to the token ids of CLIP and SigLIP.

Texts are cut to the model's positions and padded to all of them: one compiled
program, and SigLIP reads a text at its last place. The tokenizer is the
folder's tokenizer.json, which needs neither torch nor sentencepiece.
"""

import dataclasses
import os
import re
import string
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers

from qi2_jax.errors import InputError
from qi2_jax.interop.published import read_json

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def unchanged(text: str) -> str:
  """CLIP's tokenizer does all by itself."""
  return text


def canonical(text: str) -> str:
  """Lower case without ASCII punctuation, as SigLIP was trained."""
  return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()


@dataclasses.dataclass(frozen=True, eq=False)
class TextTokens:
  """A tokenizer that pads and cuts.

  Attributes:
    tokenizer: with truncation and padding set.
    clean: what happens to a text before.
  """

  tokenizer: tokenizers.Tokenizer
  clean: Callable[[str], str]

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """int32 `[C, T]`."""
    found = self.tokenizer.encode_batch([self.clean(t) for t in texts])
    return np.asarray([encoding.ids for encoding in found], np.int32)


def fixed_length(
  tokenizer: tokenizers.Tokenizer, length: int, pad: str, side: str,
  clean: Callable[[str], str],
) -> TextTokens:  # fmt: skip
  """Sets truncation and padding.

  Args:
    tokenizer: which is changed.
    length: T.
    pad: the token to fill with.
    side: `right` or `left`, where it goes.
    clean: see `TextTokens`.

  Raises:
    InputError: the tokenizer does not know the token.
  """
  number = tokenizer.token_to_id(pad)
  if number is None:
    raise InputError(
      f"the tokenizer does not know its own padding token {pad!r}; download "
      "the tokenizer files again."
    )
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(
    direction=side, pad_id=number, pad_token=pad, length=length
  )
  return TextTokens(tokenizer, clean)


def _read(folder: str) -> tokenizers.Tokenizer:
  path = os.path.join(folder, "tokenizer.json")
  try:
    if os.path.isfile(path):
      return tokenizers.Tokenizer.from_file(path)
    import transformers

    # CLIP folders of old have vocab.json and merges.txt alone.
    loaded = transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True
    )
    return loaded.backend_tokenizer
  # tokenizers raises a bare Exception for a damaged file.
  except Exception as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(
      f"{folder} holds no readable tokenizer ({reason}); it needs "
      "tokenizer.json and tokenizer_config.json."
    ) from error


def _content(token) -> str:
  """A token of tokenizer_config.json: its text, or a mapping with it."""
  return token if isinstance(token, str) else token["content"]


def load(folder: str, kind: str, length: int) -> TextTokens:
  """The tokenizer of a model folder.

  Args:
    folder: with tokenizer.json and tokenizer_config.json.
    kind: `clip` or `siglip`.
    length: text positions of the model.

  Raises:
    InputError: the files are missing or damaged.
  """
  about = read_json(os.path.join(folder, "tokenizer_config.json"))
  # SigLIP 2 has the tokenizer of Gemma, keeps punctuation, and its class pads
  # on the left where the file does not say otherwise.
  gemma = re.match("Siglip2|Gemma", about.get("tokenizer_class") or "")
  clean = unchanged
  if kind == "siglip":
    clean = str.lower if gemma else canonical
  pad = about.get("pad_token") or (
    "<|endoftext|>" if kind == "clip" else "</s>"
  )
  return fixed_length(
    _read(folder), length, _content(pad),
    about.get("padding_side", "left" if gemma else "right"), clean,
  )  # fmt: skip
