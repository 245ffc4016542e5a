# SPDX-License-Identifier: Apache-2.0
"""Euler sampling as one compiled scan, with guidance and prefix cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qi2_jax.models.condition import Conditioning
from qi2_jax.models.mmdit import MMDiT

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def guide(v_positive, v_negative, guidance):
  """Classifier-free guidance `v_neg + g (v_pos - v_neg)`, no rescaling."""
  return v_negative + guidance * (v_positive - v_negative)


def euler_scan(velocity: Velocity, x: jax.Array, sigmas: jax.Array):
  """Integrates `dx = v dsigma` over `sigmas` in fp32 by Euler steps.

  Args:
    velocity: `(x, sigma scalar) -> v`, traced once.
    x: starting noise.
    sigmas: `[S + 1]` decreasing levels ending at 0.
  """

  def step(x, pair):
    sigma, following = pair
    return x + (following - sigma) * velocity(x, sigma), None

  x = x.astype(jnp.float32)
  return jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))[0]


def conditional_velocity(
  model: MMDiT, variables, cond: Conditioning, *, use_cache: bool = True
) -> Velocity:
  """`velocity(x, sigma)` for one condition.

  The prefix cache is computed here, once; variants without one (and
  `use_cache=False`) run the whole sequence at every step.
  """

  def rows(x, sigma):
    return jnp.broadcast_to(sigma, (x.shape[0],))

  if use_cache and model.config.cacheable:
    cache = model.apply(variables, cond, method="prefix_cache")
    return lambda x, sigma: model.apply(
      variables, x, rows(x, sigma), cache, cond.layout, method="decode"
    )
  return lambda x, sigma: model.apply(variables, x, rows(x, sigma), cond)


def guided_velocity(
  model: MMDiT, variables, cond: Conditioning, negative: Conditioning | None,
  guidance, *, use_cache: bool = True,
) -> Velocity:  # fmt: skip
  """`velocity(x, sigma)` with guidance; both branches run as one batch.

  Args:
    model: the network.
    variables: its variables.
    cond: the prompts.
    negative: the negative prompts with the same reference images, or None
      for no guidance.
    guidance: scale; 1 equals no guidance.
    use_cache: reuse the prefix across steps where the variant allows.
  """
  if negative is None:
    return conditional_velocity(model, variables, cond, use_cache=use_cache)
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, negative)
  velocity = conditional_velocity(model, variables, both, use_cache=use_cache)

  def guided(x, sigma):
    positive, other = jnp.split(velocity(jnp.concatenate([x, x]), sigma), 2)
    return guide(positive, other, guidance)

  return guided


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
