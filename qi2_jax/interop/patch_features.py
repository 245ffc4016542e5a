# SPDX-License-Identifier: Apache-2.0
"""Patch features of whole images from DINOv2, CLIP or SigLIP folders.

Shapes: B images, h, w patches along an axis, D width.
"""

import functools
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from qi2_jax.interop import dinov2, image_processor, image_text
from qi2_jax.interop.image_processor import ImageProcessor
from qi2_jax.interop.published import read_json
from qi2_jax.models import dinov2 as dinov2_model
from qi2_jax.models import layers, vit

# In place of a folder: a tiny DINOv2 with random weights.
RANDOM = "random"


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _unit_patches(params, x, *, model, method: str) -> jax.Array:
  states = model.apply({"params": params}, x, method=method)
  # Without it a few channels that are always large would decide the cosine;
  # the models' own last norm does the same, but is not part of all of them.
  return vit.unit(layers.layer_norm(states, 1e-6))


def load(
  path: str, batch_size: int = 32
) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
  """A function from uint8 images to unit vectors `[B, h, w, D]`.

  Images are squeezed into a square, so that a patch is the same part of
  every image.

  Args:
    path: transformers folder, or `RANDOM`.
    batch_size: images of a call.

  Raises:
    InputError: the folder is missing, damaged or of another model.
  """
  kind = (
    "dinov2"
    if path == RANDOM
    else read_json(os.path.join(path, "config.json")).get("model_type")
  )
  if str(kind).startswith("dinov2"):
    model, params = (
      dinov2.random_features(jax.random.key(0), dinov2_model.PRESETS["tiny"])
      if path == RANDOM
      else dinov2.load(path)
    )
    side = model.config.side * model.config.patch_size
    whole = ImageProcessor(dinov2_model.MEAN, dinov2_model.STD).whole(side)
    method = "__call__"
  else:
    scorer = image_text.load(path)
    model, params, method = scorer.model, scorer.params, "patches"
    whole = scorer.processor.whole(model.config.image_size)

  def features(images):
    return image_text.in_batches(
      lambda x: _unit_patches(params, x, model=model, method=method),
      images,
      lambda part: np.stack([image_processor.prepare(i, whole) for i in part]),
      batch_size,
    )

  return features
