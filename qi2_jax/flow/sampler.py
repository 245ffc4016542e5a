# SPDX-License-Identifier: Apache-2.0
"""Euler sampling as one compiled loop, with guidance and prefix cache."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from qi2_jax.models.condition import Conditioning, Layout
from qi2_jax.models.mmdit import MMDiT, PrefixCache

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def guide(v_positive, v_negative, guidance):
  """Classifier-free guidance `v_neg + g (v_pos - v_neg)`, no rescaling."""
  return v_negative + guidance * (v_positive - v_negative)


def euler_step(velocity: Velocity, x, sigma, following):
  """One step of `dx = v dsigma` from `sigma` to `following`."""
  return x + (following - sigma) * velocity(x, sigma)


def euler_scan(velocity: Velocity, x: jax.Array, sigmas: jax.Array):
  """Integrates `dx = v dsigma` over `sigmas` in fp32 by Euler steps.

  Args:
    velocity: `(x, sigma scalar) -> v`, traced once.
    x: starting noise.
    sigmas: `[S + 1]` decreasing levels ending at 0.
  """

  def step(x, pair):
    return euler_step(velocity, x, *pair), None

  x = x.astype(jnp.float32)
  return jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))[0]


def euler_some(velocity: Velocity, x: jax.Array, sigmas: jax.Array, count):
  """The first `count` steps of `euler_scan`; `count` may be traced.

  One program thus serves any number of sampling steps, and a host loop over
  a few calls can show its progress.
  """

  def step(i, x):
    return euler_step(velocity, x, sigmas[i], sigmas[i + 1])

  return jax.lax.fori_loop(0, count, step, x.astype(jnp.float32))


def rounded_time(sigma):
  """The time that the public bf16 pipeline passes to its model.

  It divides 1000 sigma by 1000 in bfloat16, which moves large times by up to
  two thousandths; only bf16 parity needs it.
  """
  time = (1000.0 * sigma).astype(jnp.bfloat16) / jnp.bfloat16(1000)
  return time.astype(jnp.float32)


@flax.struct.dataclass
class Prepared:
  """What the velocity of one batch needs at every noise level.

  With guidance the rows are doubled: prompts first, negative prompts second.

  Attributes:
    layout: token layout.
    cache: keys and values of the prefix, if the variant has them.
    cond: the whole condition, if it has not.
  """

  layout: Layout
  cache: PrefixCache | None
  cond: Conditioning | None


def prepare(
  model: MMDiT, variables, cond: Conditioning,
  negative: Conditioning | None = None, *, use_cache: bool = True,
) -> Prepared:  # fmt: skip
  """Joins the branches of guidance and runs the prefix once.

  Args:
    model: the network.
    variables: its variables.
    cond: the prompts.
    negative: the negative prompts with the same reference images, or None
      for no guidance.
    use_cache: reuse the prefix across steps where the variant allows.
  """
  if negative is not None:
    cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, negative)
  if use_cache and model.config.cacheable:
    cache = model.apply(variables, cond, method="prefix_cache")
    return Prepared(cond.layout, cache, None)
  return Prepared(cond.layout, None, cond)


def prepared_velocity(
  model: MMDiT, variables, prepared: Prepared, guidance=None, *,
  round_time: bool = False,
) -> Velocity:  # fmt: skip
  """`velocity(x, sigma)`; both branches of guidance run as one batch.

  Args:
    model: the network.
    variables: its variables.
    prepared: of `prepare`.
    guidance: scale if `prepared` has negative rows, else None.
    round_time: see `rounded_time`.
  """

  def predict(x, sigma):
    time = rounded_time(sigma) if round_time else sigma
    rows = jnp.broadcast_to(time, (x.shape[0],))
    if prepared.cache is None:
      return model.apply(variables, x, rows, prepared.cond)
    return model.apply(
      variables, x, rows, prepared.cache, prepared.layout, method="decode"
    )

  if guidance is None:
    return predict

  def guided(x, sigma):
    positive, other = jnp.split(predict(jnp.concatenate([x, x]), sigma), 2)
    return guide(positive, other, guidance)

  return guided


def guided_velocity(
  model: MMDiT, variables, cond: Conditioning, negative: Conditioning | None,
  guidance, *, use_cache: bool = True,
) -> Velocity:  # fmt: skip
  """`prepare` and `prepared_velocity` in one; see there."""
  prepared = prepare(model, variables, cond, negative, use_cache=use_cache)
  scale = None if negative is None else guidance
  return prepared_velocity(model, variables, prepared, scale)


def sample(
  model: MMDiT, variables, noise_BNZ, sigmas, cond: Conditioning,
  negative: Conditioning | None = None, guidance=1.0, *,
  use_cache: bool = True,
):  # fmt: skip
  """Noise to normalised latents `[B, N, Z]`.

  Args:
    model: the network.
    variables: its variables.
    noise_BNZ: starting noise.
    sigmas: `[S + 1]` from `schedules.sampling_sigmas`.
    cond: conditioning of the prompts.
    negative: conditioning of the negative prompts, or None.
    guidance: guidance scale.
    use_cache: see `guided_velocity`.
  """
  velocity = guided_velocity(
    model, variables, cond, negative, guidance, use_cache=use_cache
  )
  return euler_scan(velocity, noise_BNZ, sigmas)
