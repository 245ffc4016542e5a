# SPDX-License-Identifier: Apache-2.0
"""FLOPs of one MMDiT training step, counted from the model's shapes.

Only matrix products are counted, two FLOPs per multiply-add, attention as the
full rectangles that the code computes. Per sample, with S = P + N:

  layer       8 S D^2 + 6 S D F          projections and SwiGLU
  attention   4 D N (P + N) + 4 D P^2    (joint: 4 D (P + N)^2)
  rest        embeddings, modulation and head

A step is one forward and two more for the two gradients of every product
(three forwards: the model FLOPs of an MFU). What runs beyond that, in
forwards of the layers or of the attention, MFU does not credit:

                       layers   attention: xla     splash   cudnn
  without remat           0        0 (1/2)           3/2      1/2
  remat=dots              0        1 (3/2)           5/2      3/2
  remat=attention         1        1/2               3/2      3/2
  remat=full              1        1 (3/2)           5/2      3/2

In brackets: for more than CHUNK queries, whose scores are computed again
inside. Flash kernels compute scores again in each pass of the gradient.

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


def _recompute(config: MMDiTConfig, queries: int) -> float:
  """Forwards of one stream's attention beyond the three of a step."""
  if config.kernel == "xla":
    again = {"none": 0.0, "attention": 0.5}.get(config.remat, 1.0)
    inside = queries > CHUNK and config.remat != "attention"
    return again + 0.5 * inside
  # What `remat=attention` keeps of cuDNN's pass is its output alone.
  kept = ("none", "attention") if config.kernel == "splash" else ("none",)
  passes = {"splash": 1.5, "cudnn": 0.5}[config.kernel]
  return passes + (config.remat not in kept)


def step_flops(config: MMDiTConfig, tokens: Tokens, batch: int) -> StepFlops:
  """FLOPs of one training step on `batch` samples of one shape."""
  layers = layer_flops(config, tokens)
  target, prefix = attention_flops(config, tokens)
  forward = layers + target + prefix + outer_flops(config, tokens)
  recompute = layers * (config.remat in ("full", "attention"))
  recompute += target * _recompute(config, tokens.target)
  # A prefix with images runs on xla, whatever the kernel.
  of_prefix = config
  if tokens.references and config.attention == "block_causal":
    of_prefix = dataclasses.replace(config, kernel="xla")
  recompute += prefix * _recompute(of_prefix, tokens.prefix)
  return StepFlops(3 * forward * batch, recompute * batch)


def adapter_step_flops(
  config: MMDiTConfig, tokens: Tokens, batch: int, factors: int
) -> StepFlops:
  """FLOPs of one training step of a LoRA in all blocks.

  A frozen product has a forward and the gradient of its input, but none of
  its weight.

  Args:
    config: of the base.
    tokens: of one sample.
    batch: samples.
    factors: elements of the LoRA; every token meets all of them.
  """
  whole = step_flops(config, tokens, batch)
  frozen = layer_flops(config, tokens) + outer_flops(config, tokens)
  low = 2.0 * factors * (tokens.prefix + tokens.target)
  again = low * (config.remat in ("full", "attention"))
  return StepFlops(
    whole.model + (3 * low - frozen) * batch, whole.recompute + again * batch
  )


def sampling_flops(
  config: MMDiTConfig, tokens: Tokens, steps: int, factors: int = 0
) -> float:
  """FLOPs of one sample that is walked in `steps` with a prefix cache.

  Args:
    config: of the network.
    tokens: of one sample.
    steps: evaluations; with guidance two samples have them.
    factors: elements of a LoRA that is not merged.
  """
  prefix = dataclasses.replace(tokens, target=0)
  target = dataclasses.replace(tokens, prefix=0, text=0, references=0)
  of_target, of_prefix = attention_flops(config, tokens)
  once, each = (
    layer_flops(config, part) + outer_flops(config, part)
    + 2.0 * factors * (part.prefix + part.target)
    for part in (prefix, target)
  )  # fmt: skip
  return once + of_prefix + steps * (each + of_target)
