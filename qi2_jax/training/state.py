# SPDX-License-Identifier: Apache-2.0
"""Train state: parameters, their EMA, optimizer state and the step.

Randomness is not stored: every step folds its number into the root key.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """What a step reads and writes.

  Attributes:
    step: int32 scalar, completed steps.
    params: trained parameters.
    ema: exponential moving average of `params`.
    opt_state: optax state.
  """

  step: jax.Array
  params: dict
  ema: dict
  opt_state: optax.OptState


def create(params, optimizer: optax.GradientTransformation) -> TrainState:
  """A fresh state; the EMA starts at the parameters."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    # Copies: a donated state may not hold one buffer twice.
    ema=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
  )


def ema_update(ema, params, step, decay: float):
  """`decay * ema + (1 - decay) * params`, warmed up by the step count.

  The effective decay is min(decay, (1 + step) / (10 + step)), so early
  averages follow the parameters.
  """
  step = step.astype(jnp.float32)
  rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda e, p: rate * e + (1.0 - rate) * p, ema, params)
