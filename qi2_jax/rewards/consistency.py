# SPDX-License-Identifier: Apache-2.0
"""Whether an edit left the rest alone, by patch features.

Unlike PSNR (`rules.background`), features forgive a shifted shade or a
repainted texture and notice another face or another object.

Shapes: B images, H, W pixels, h, w patches along an axis, D width.
"""

from collections.abc import Callable, Sequence

import numpy as np

from qi2_jax.rewards.protocol import Image, Prompt, Score
from qi2_jax.rewards.rules import edited_region

NAME = "consistency"
# uint8 images -> unit vectors of the patches of whole images `[B, h, w, D]`.
Features = Callable[[Sequence[Image]], np.ndarray]


def kept_patches(edited_HW: np.ndarray, h: int, w: int) -> np.ndarray:
  """Patches without any edited pixel, of an image squeezed to h x w.

  Returns:
    bool `[h, w]`.
  """
  total = np.pad(np.cumsum(np.cumsum(edited_HW, 0), 1), ((1, 0), (1, 0)))
  (y0, y1), (x0, x1) = (
    (np.arange(n) * side // n, -(-np.arange(1, n + 1) * side // n))
    for n, side in zip((h, w), edited_HW.shape)
  )
  rows = total[y1] - total[y0]
  return rows[:, x1] - rows[:, x0] == 0


def consistency(features: Features) -> Score:
  """The reward `consistency`: mean cosine of kept patches to the source's.

  An image without a source, or an edit of everything, has 0 like all others
  of its prompt, which teaches nothing. Without a known result there is no
  region to keep, and the reward fails (NaN).

  Args:
    features: see `Features`.
  """

  def one(image_hwD, source_hwD, prompt: Prompt, source: Image) -> float:
    edited = edited_region(source, prompt.target)
    kept = kept_patches(edited, *image_hwD.shape[:2])
    cosine = np.sum(image_hwD * source_hwD, axis=-1)
    return float(cosine[kept].mean()) if kept.any() else 0.0

  def usable(prompt: Prompt, sources) -> bool:
    target = prompt.target
    return target is not None and target.shape == sources[0].shape

  def score(images, prompts, references):
    values = np.zeros(len(images))
    edits = [i for i, sources in enumerate(references) if sources]
    values[edits] = np.nan
    good = [i for i in edits if usable(prompts[i], references[i])]
    if good:
      # The images of a group share one source.
      sources = {id(references[i][0]): references[i][0] for i in good}
      found = dict(zip(sources, features(list(sources.values()))))
      for i, own in zip(good, features([images[i] for i in good])):
        source = references[i][0]
        values[i] = one(own, found[id(source)], prompts[i], source)
    return {NAME: values}

  return score
