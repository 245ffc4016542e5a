# SPDX-License-Identifier: Apache-2.0
"""Whether the text that a prompt asks for can be read in the image.

The reader and the measure arrive as callables: engines are optional, and the
rendered task has a reader of its own font.
"""

import re
import threading
import unicodedata
from collections.abc import Callable

import numpy as np

from qi2_jax.rewards.protocol import Image, Prompt, Score

NAME = "ocr"
# A straight single quote is also an apostrophe: it opens after a space or a
# bracket and closes before whatever is no letter.
_QUOTED = re.compile(
  r'"([^"]+)"|“([^”]+)”|‘([^’]+)’|「([^」]+)」|『([^』]+)』|«([^»]+)»'
  r"|(?<![^\s(\[:,])'((?:[^']|'(?=\w))+)'(?!\w)"
)


def quoted(prompt: str) -> str | None:
  """What stands in quotation marks, in order; None of nothing."""
  parts = [
    next(filter(None, found.groups())) for found in _QUOTED.finditer(prompt)
  ]
  return " ".join(parts) or None


def normalised(text: str) -> str:
  """Compatibility forms and case folded, without white space.

  Readers disagree about spaces and full-width forms; no reward is in that.
  """
  folded = unicodedata.normalize("NFKC", text).casefold()
  return "".join(folded.split())


def text_accuracy(
  read: Callable[[Image], str], wanted: Callable[[str], str | None],
  similarity: Callable[[str, str], float | None],
) -> Score:  # fmt: skip
  """The reward `ocr` in [0, 1]: similarity of wanted and read text.

  Everything that is read counts, so that text beside the wanted one costs
  (Flow-GRPO's formula gives the full reward for any text around it). A
  prompt that asks for no text has 0 for all its images, which teaches
  nothing.

  Args:
    read: the text in an image; "" for none.
    wanted: the text that a prompt asks for, or None.
    similarity: of two texts, 1 for equal ones, as
      `evaluation.image_metrics.text_similarity`.
  """
  # Engines are not built for several threads at a time.
  lock = threading.Lock()

  def one(image: Image, prompt: Prompt) -> float:
    text = normalised(wanted(prompt.text) or "")
    if not text:
      return 0.0
    with lock:
      found = read(image)
    return float(similarity(text, normalised(found)))

  def score(images, prompts, references):
    values = [one(*given) for given in zip(images, prompts)]
    return {NAME: np.asarray(values, np.float64)}

  return score
