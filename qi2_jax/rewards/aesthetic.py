# SPDX-License-Identifier: Apache-2.0
"""How much people would like an image, by a head on CLIP embeddings."""

import numpy as np

from qi2_jax.interop import image_text
from qi2_jax.interop.image_text import ImageText
from qi2_jax.models.aesthetic import Head, rate
from qi2_jax.rewards.protocol import Score

NAME = "aesthetic"


def aesthetic(scorer: ImageText, head: Head) -> Score:
  """The reward `aesthetic`; its range is that of the head's ratings.

  Args:
    scorer: the model that the head was trained on.
    head: of `interop.aesthetic.load`.
  """

  def score(images, prompts, references):
    embedding_BP = image_text.embed_images(scorer, images)
    return {NAME: np.asarray(rate(head, embedding_BP), np.float64)}

  return score
