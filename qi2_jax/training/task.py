# SPDX-License-Identifier: Apache-2.0
"""What an objective plugs into the one loop."""

import dataclasses
from collections.abc import Callable

from qi2_jax.conditioning.conditioner import Conditioner

Sample = dict


@dataclasses.dataclass(frozen=True)
class Task:
  """The parts of one objective.

  A train state is a flax dataclass with at least `step`, `params` and `ema`,
  the averaged parameters that sampling, evaluation and export read.

  Attributes:
    init: `key -> params`, where `config.init` names none.
    start: `params -> state`; traced, and its arguments are donated.
    rules: sharding rules of every array of the state.
    transform: `(sample, rng) -> dict of arrays`, in loader threads.
    encode: `(state, host batch on the mesh) -> features`: what the step needs
      of frozen models, or of the policy itself.
    step: `(state, features, key) -> (state, metrics)`, pure; the metrics hold
      `loss` and `grad_norm`.
    preview: `(ema, samples) -> {name: uint8 grid}`.
    finish: `(ema, batches) -> None`, after the last step.
    signature: `() -> dict` that describes the frozen models, where cached
      features can stand for pixels (see `cached`); None: pixels are needed.
    conditioner: reads the captions; None: nothing does.
    loss: `(ema, features, key) -> (scalar, metrics)` on held-out data; None:
      the objective has none.
    watch: `(state) -> None`, before every preview: may keep the best weights.
    record: `() -> JSON` of what `encode` has learnt beside the state, for a
      checkpoint's meta.
    restore: takes what `record` returned, before the first step of a resumed
      run.
  """

  init: Callable
  start: Callable
  rules: tuple
  transform: Callable
  encode: Callable
  step: Callable
  preview: Callable
  finish: Callable
  signature: Callable | None = None
  watch: Callable = lambda state: None
  record: Callable = dict
  restore: Callable = lambda saved: None
  loss: Callable | None = None
  conditioner: Conditioner | None = None
