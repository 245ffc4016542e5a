# SPDX-License-Identifier: Apache-2.0
"""Prompts with their empty prompts: what stages without targets learn from.

Distillation and reinforcement need a prompt, the references of edits, and the
same without the prompt for guidance; the image of a sample only gives a size.
"""

from collections.abc import Callable

import jax
import numpy as np

from qi2_jax.models.condition import Layout
from qi2_jax.training import cached, frozen
from qi2_jax.training.task import Sample

CATEGORIES = ("t2i", "edit")
# What a prompt and its empty prompt have in common.
_SHARED = {"references", "reference_latents", "latents"}


def transform(conditioner) -> Callable:
  """`Task.transform`: a prompt, and the empty prompt for guidance."""

  def one(sample: Sample, rng):
    del rng
    if cached.is_cached(sample):
      references = sample["reference_sizes"]
      prompt, empty = (
        cached.host(conditioner, sample, no_caption, False)
        for no_caption in (False, True)
      )
    else:
      references, size = sample["references"], sample["image"].shape[:2]
      prompt, empty = (
        conditioner.host(caption, references, size, sample.get("text_length"))
        for caption in (sample["caption"], "")
      )
    # Targets are not looked at; references are those of the prompt.
    prompt.pop("latents", None)
    for name in _SHARED & empty.keys():
      del empty[name]
    category = CATEGORIES.index("edit" if references else "t2i")
    return {"prompt": prompt, "empty": empty, "category": np.int32(category)}

  return one


def encoder(models: frozen.Models) -> Callable:
  """`Task.encode`: conditions of the prompts and of the empty prompts."""
  conditioner = models.conditioner

  @jax.jit
  def encode(parameters, batch):
    prompt, empty = batch["prompt"], batch["empty"]
    empty = empty | {k: v for k, v in prompt.items() if k in _SHARED}
    if "text" in prompt:
      condition, negative = cached.condition(prompt), cached.condition(empty)
    else:
      condition = conditioner.encode(parameters, prompt)
      negative = condition.replace(
        text_BTC=conditioner.encode_text(parameters.encoder, empty),
        layout=Layout(**empty["layout"]),
      )
    return {
      "condition": condition, "negative": negative,
      "category_B": batch["category"],
    }  # fmt: skip

  return lambda batch: encode(models.frozen, batch)
