# SPDX-License-Identifier: Apache-2.0
"""LoRA as something to train: `config.lora`, the trained tree, the loss.

Only the factors are trained, in fp32. In the loss they stay apart from the
frozen base, so a step holds neither merged weights nor their gradient.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import traverse_util

from qi2_jax.errors import InputError
from qi2_jax.interop import model_folder
from qi2_jax.models import lora, mmdit
from qi2_jax.training import steps

# Those that train an MMDiT.
OBJECTIVES = ("flow_matching", "dmd", "flow_grpo")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What to adapt.

  Attributes:
    rank: r of every factor.
    alpha: the change is scaled by alpha / rank.
    targets: regexes of whole kernel paths.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]


def from_config(config) -> LoraConfig | None:
  """`config.lora`, or None for a run that trains all parameters.

  Args:
    config: of a whole run; one of an older release has no `lora`.

  Raises:
    InputError: no base is named, or the run trains no MMDiT.
  """
  section = config.get("lora")
  if not section or not section.rank:
    return None
  if config.objective not in OBJECTIVES:
    raise InputError(
      f"config.lora adapts the MMDiT, but this run trains a "
      f"{config.objective}; set config.lora.rank=0."
    )
  if not config.init:
    raise InputError(
      "a LoRA needs a base: pass --config.init, a workdir or a pipeline folder."
    )
  targets = tuple(section.targets) or lora.DEFAULT_TARGETS
  return LoraConfig(section.rank, section.alpha, targets)


def init_factors(config: LoraConfig, abstract_params, key: jax.Array) -> dict:
  """Fresh factors as nested dicts: what is trained.

  Args:
    config: which, and of what rank.
    abstract_params: MMDiT parameters, or their shapes.
    key: random key.

  Raises:
    InputError: as `lora.init`.
  """
  fresh = lora.init(
    abstract_params, config.targets, config.rank, config.alpha, key
  )
  # Nested, for a slash in a key would reach the checkpoint's file system.
  return traverse_util.unflatten_dict(fresh.factors, sep="/")


def to_lora(config: LoraConfig, factors: dict) -> lora.Lora:
  """The adapter that the nested `factors` are."""
  flat = traverse_util.flatten_dict(factors, sep="/")
  paths = sorted({name.rpartition("/")[0] for name in flat})
  scale = np.float32(config.alpha / config.rank)
  return lora.Lora(
    {p: {"a": flat[f"{p}/a"], "b": flat[f"{p}/b"]} for p in paths},
    dict.fromkeys(paths, scale),
  )


def trained(
  module: mmdit.MMDiT, config: LoraConfig | None
) -> Callable:  # fmt: skip
  """`key -> params` of what a run trains.

  Args:
    module: the MMDiT.
    config: of a run that trains a LoRA of it.
  """
  if config is None:
    return functools.partial(mmdit.init_params, module)
  abstract = model_folder.abstract_mmdit(module.config)
  return functools.partial(init_factors, config, abstract)


def rules(config: LoraConfig | None) -> tuple:
  """Sharding rules of what a run trains and of the MMDiT."""
  return (*(lora.SHARDING_RULES if config else ()), *mmdit.SHARDING_RULES)


def attached(config: LoraConfig | None, base) -> Callable:
  """`trained -> params` of the MMDiT, for `lora.beside_kernels`.

  Args:
    config: of a run that trains a LoRA.
    base: its frozen weights.
  """
  if config is None:
    return lambda params: params
  return lambda factors: lora.attach(base, to_lora(config, factors))


@functools.partial(jax.jit, static_argnums=0)
def merged(config: LoraConfig, base, factors):
  """The whole model, to sample from."""
  return lora.merge(base, to_lora(config, factors))


def lora_loss(loss: steps.Loss, config: LoraConfig) -> steps.Loss:
  """`loss` as a function of the factors; features hold the base as FROZEN."""

  def mean(factors, batch):
    rows, frozen = steps.rows_of(batch)
    params = attached(config, frozen[steps.FROZEN])(factors)
    with lora.beside_kernels():
      return loss.mean(params, rows)

  return dataclasses.replace(loss, mean=mean)
