# SPDX-License-Identifier: Apache-2.0
"""FLOPs of one MMDiT training step, counted from the model's shapes.

Only matrix products are counted, two FLOPs per multiply-add, attention as the
full rectangles that the code computes. Per sample, with S = P + N:

  layer       8 S D^2 + 6 S D F          projections and SwiGLU
  attention   4 D N (P + N) + 4 D P^2    (joint: 4 D (P + N)^2)
  rest        embeddings, modulation and head

A step is one forward and two more for the two gradients of every product
(three forwards: the model FLOPs of an MFU). Rematerialisation adds forwards
that MFU does not credit:

  remat=full  the layers and their attention once more
  remat=dots  the attention once more
  more than CHUNK queries   QK^T once more (half of that attention)

Shapes: P prefix tokens, N target tokens, T encoder tokens, R reference
latents, D width, F mlp width, C encoder width, Z latent channels.
"""

import dataclasses

from qi2_jax.models.attention import CHUNK
from qi2_jax.models.mmdit import MMDiTConfig


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Token counts of one sample.

  Attributes:
    target: N.
    text: T.
    references: R, of all reference images.
    prefix: P.
  """

  target: int
  text: int
  references: int
  prefix: int


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """FLOPs of one step over the whole batch.

  Attributes:
    model: forward and backward without recomputation.
    recompute: what rematerialisation adds.
  """

  model: float
  recompute: float

  @property
  def executed(self) -> float:
    """All that runs."""
    return self.model + self.recompute


def layer_flops(config: MMDiTConfig, tokens: Tokens) -> float:
  """Forward products with parameters of all layers, one sample."""
  d, f = config.width, config.width * config.mlp_ratio
  per_token = 8 * d * d + 6 * d * f
  rows = 2 * 8 * d * d if config.modulation == "per_block" else 0
  total = per_token * (tokens.prefix + tokens.target) + rows
  return float(config.num_layers * total)


def attention_flops(config: MMDiTConfig, tokens: Tokens) -> tuple[float, float]:
  """Forward attention of all layers, one sample: `(target, prefix)`."""
  p, n = tokens.prefix, tokens.target
  keys = p + n if config.attention == "joint" else p
  unit = 4.0 * config.width * config.num_layers
  return unit * n * (p + n), unit * p * keys


def outer_flops(config: MMDiTConfig, tokens: Tokens) -> float:
  """Forward embeddings, modulation and head, one sample."""
  d, z = config.width, config.latent_channels
  image = 2 * (tokens.target + tokens.references) * z * d
  text = 2 * tokens.text * d * (config.context_dim + d)
  time = 2 * (2 * 256 * d + 2 * d * d)
  rows = 2 * 8 * d * d if config.modulation == "shared" else 0
  head = 2 * d * d + 2 * tokens.target * d * z
  return float(image + text + time + rows + head)


def step_flops(config: MMDiTConfig, tokens: Tokens, batch: int) -> StepFlops:
  """FLOPs of one training step on `batch` samples of one shape."""
  layers = layer_flops(config, tokens)
  target, prefix = attention_flops(config, tokens)
  forward = layers + target + prefix + outer_flops(config, tokens)
  recompute = {
    "none": 0.0,
    "full": layers + target + prefix,
    "dots": target + prefix,
  }[config.remat]
  chunked = ((target, tokens.target), (prefix, tokens.prefix))
  recompute += sum(flops / 2 for flops, n in chunked if n > CHUNK)
  return StepFlops(3 * forward * batch, recompute * batch)
