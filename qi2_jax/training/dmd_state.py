# SPDX-License-Identifier: Apache-2.0
"""Train state of distillation: a student and the score of its samples."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from qi2_jax.training import dmd_gan

BINS = 5


@flax.struct.dataclass
class DmdState:
  """What a step reads and writes.

  Attributes:
    step: int32 scalar, completed steps; one update of the student each.
    params: of the student: all of them, or the factors of a LoRA.
    ema: exponential moving average of `params`.
    opt_state: optax state of the student.
    fake: the fake score model as its fp32 difference from the first teacher,
      at which it starts. Gradients and Adam's updates of the difference are
      those of the parameters, and a fresh state needs no weights. With a
      GAN head `{SCORE, HEAD}` of `dmd_gan`.
    fake_opt_state: optax state of `fake`.
    gap_2T: running sums of squared velocity gaps and of their counts, by
      noise level; see `record_gap`.
  """

  step: jax.Array
  params: dict
  ema: dict
  opt_state: optax.OptState
  fake: dict
  fake_opt_state: optax.OptState
  gap_2T: jax.Array


# Beside the rules of the parameters.
SHARDING_RULES = ((r"gap_2T", ()), *dmd_gan.SHARDING_RULES)


def create(
  params, abstract_model, optimizer: optax.GradientTransformation,
  fake_optimizer: optax.GradientTransformation,
  new_head: Callable[[], dict] | None = None,
) -> DmdState:  # fmt: skip
  """A fresh state.

  Args:
    params: of the student.
    abstract_model: shapes of the fake score's parameters.
    optimizer: of the student.
    fake_optimizer: of the fake score.
    new_head: makes a GAN head, where there is one.
  """
  fake = jax.tree.map(
    lambda a: jnp.zeros(a.shape, jnp.float32), abstract_model
  )  # fmt: skip
  if new_head:
    fake = {dmd_gan.SCORE: fake, dmd_gan.HEAD: new_head()}
  return DmdState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    # Copies: a donated state may not hold one buffer twice.
    ema=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    fake=fake,
    fake_opt_state=fake_optimizer.init(fake),
    gap_2T=jnp.zeros((2, BINS)),
  )


def record_gap(gap_2T: jax.Array, t_B: jax.Array, square_B: jax.Array):
  """Running mean of squared fake-real gaps in equal bins of the noise level.

  One batch leaves bins empty, so each keeps a decaying sum and count.

  Args:
    gap_2T: sums and counts so far.
    t_B: noise levels of this batch.
    square_B: mean squared difference of fake and real velocity.

  Returns:
    `(gap_2T, root mean square of each bin [T])`; 0 where nothing came yet.
  """
  bins = gap_2T.shape[1]
  which_B = jnp.clip(jnp.floor(t_B * bins).astype(jnp.int32), 0, bins - 1)
  hit_BT = jax.nn.one_hot(which_B, bins)
  new_2T = jnp.stack([square_B @ hit_BT, jnp.sum(hit_BT, axis=0)])
  gap_2T = 0.95 * gap_2T + new_2T
  return gap_2T, jnp.sqrt(gap_2T[0] / jnp.maximum(gap_2T[1], 1e-6))
