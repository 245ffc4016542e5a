# SPDX-License-Identifier: Apache-2.0
"""How well an image fits its prompt, by CLIP or SigLIP.

The model sees the first tokens of a prompt only (77 with CLIP, 64 with
SigLIP); what a long prompt says later needs a VLM judge. The prompt of an edit
is an instruction, which describes no image: give the reward no weight there.

Shapes: B images, P width of the common space.
"""

from collections.abc import Sequence

import numpy as np

from qi2_jax.interop import image_text
from qi2_jax.interop.image_text import ImageText
from qi2_jax.rewards.protocol import Image, Prompt, Score

NAME = "clip"


def cosines(
  scorer: ImageText, images: Sequence[Image], prompts: Sequence[Prompt]
) -> np.ndarray:
  """Of every image with its own prompt: `[B]`."""
  # The images of a group share one prompt.
  texts = list(dict.fromkeys(prompt.text for prompt in prompts))
  text_CP = image_text.embed_texts(scorer, texts)
  text_BP = text_CP[[texts.index(prompt.text) for prompt in prompts]]
  return np.sum(image_text.embed_images(scorer, images) * text_BP, axis=1)


def alignment(scorer: ImageText) -> Score:
  """The reward `clip`: the cosine, from -1 to 1."""

  def score(images, prompts, references):
    return {NAME: np.float64(cosines(scorer, images, prompts))}

  return score


def scaled_alignment(scorer: ImageText) -> Score:
  """The reward `clip` as the model's logit.

  Of one model a multiple of the cosine (with SigLIP plus a constant), so it
  only differs where rewards are not divided by their spread.
  """

  def score(images, prompts, references):
    found = cosines(scorer, images, prompts)
    return {NAME: np.float64(image_text.scaled(scorer, found))}

  return score
