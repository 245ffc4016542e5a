# SPDX-License-Identifier: Apache-2.0
"""Flow-GRPO: a clipped policy gradient through the steps of a sampler.

Liu et al. 2025 (arXiv 2505.05470); GRPO-Guard is arXiv 2510.22319. A
log-probability is the mean over the elements of a latent, as published; the
clip ranges around 1e-5 belong to that.

Hybrid CFG. The report says that guidance is used in the rollout and that its
unconditional branch takes no part in the optimisation, without a formula.
Ours, `frozen_uncond`: the optimised velocity is u + w (c - u) with u as the
rollout computed it, without gradient. Replaying the rollout's states with the
conditional velocity alone (`replay_cond`) has a ratio of 1 at the start as
well, and yet a wrong gradient, since the states were drawn around another
mean; it is here to show that.

Shapes: B rows, one stochastic step of one image each; samples have any shape
`[B, ...]`.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.flow import sampler, sde

# What the optimised velocity is; `none` uses no guidance in the rollout
# either, `full` differentiates both branches.
HYBRIDS = ("frozen_uncond", "full", "none", "replay_cond")
KLS = ("gaussian", "published")


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
  """The surrogate.

  Attributes:
    clip: c, the ratio is clipped to [1 - c, 1 + c].
    kl_weight: beta of the penalty towards the reference; 0 computes none.
    kl: `gaussian`, the divergence of the two steps, or `published`, that
      times the step's length, to which published betas belong.
    guard: GRPO-Guard's ratio normalisation and equal weight of all steps.
  """

  clip: float = 1e-4
  kl_weight: float = 0.0
  kl: str = "published"
  guard: bool = False

  def __post_init__(self):
    """Raises InputError for settings that mean nothing."""
    if self.kl not in KLS:
      raise InputError(
        f"grpo.kl={self.kl!r} is unknown; use one of {list(KLS)}."
      )
    if not 0 < self.clip < 1 or self.kl_weight < 0:
      raise InputError(
        "grpo needs 0 < clip < 1 and kl_weight >= 0, not "
        f"{self.clip} and {self.kl_weight}."
      )


@flax.struct.dataclass
class Transition:
  """Stochastic steps as the rollout took them.

  Attributes:
    x: states before the step `[B, ...]`.
    drawn: states after it.
    sigma_B: levels of x.
    following_B: levels of `drawn`.
  """

  x: jax.Array
  drawn: jax.Array
  sigma_B: jax.Array
  following_B: jax.Array


@flax.struct.dataclass
class Scored:
  """What a velocity says about transitions.

  Attributes:
    mean: of the Gaussian `[B, ...]`.
    std: broadcasts over it.
    log_prob_B: of the drawn state, mean over the elements.
  """

  mean: jax.Array
  std: jax.Array
  log_prob_B: jax.Array


def check_hybrid(hybrid: str) -> None:
  """Raises InputError for an unknown kind of hybrid guidance."""
  if hybrid not in HYBRIDS:
    raise InputError(
      f"rl.hybrid={hybrid!r} is unknown; use one of {list(HYBRIDS)}."
    )


def rollout_velocity(hybrid: str, conditional, unconditional, guidance):
  """The velocity that images are sampled with."""
  if hybrid == "none":
    return conditional
  return sampler.guide(conditional, unconditional, guidance)


def policy_velocity(
  hybrid: str, conditional, unconditional, cached, guidance
) -> jax.Array:
  """The velocity that is optimised.

  Args:
    hybrid: one of `HYBRIDS`.
    conditional: of the trained parameters.
    unconditional: of the same; needed by `full` alone.
    cached: the rollout's unconditional velocity; for `frozen_uncond` alone.
    guidance: w.
  """
  if hybrid == "frozen_uncond":
    fixed = jax.lax.stop_gradient(cached)
    return sampler.guide(conditional, fixed, guidance)
  if hybrid == "full":
    return sampler.guide(conditional, unconditional, guidance)
  return conditional


def score(kernel: sde.Kernel, v: jax.Array, steps: Transition) -> Scored:
  """The Gaussian of every step under velocity v, and its log-density."""
  mean, std = sde.transition(
    kernel, steps.x, v, steps.sigma_B, steps.following_B
  )
  return Scored(mean, std, sde.log_prob(steps.drawn, mean, std))


def surrogate(log_ratio_B, advantage_B, clip: float) -> jax.Array:
  """`max(-A r, -A clip(r, 1 - c, 1 + c))` with `r = exp(log_ratio)`: `[B]`."""
  ratio = jnp.exp(log_ratio_B)
  clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
  return jnp.maximum(-advantage_B * ratio, -advantage_B * clipped)


def gaussian_kl(mean, reference_mean, std) -> jax.Array:
  """KL of two steps of equal std, mean over the elements: `[B]`; 0 at std 0.

  For `flow` away from t = 1 it is d (1 + a^2 / 2)^2 |v - v_ref|^2 / (2 s^2).
  """
  drawn = std > 0
  gap = (mean - reference_mean) / jnp.where(drawn, std, 1.0)
  return sde.mean_of_rows(jnp.where(drawn, 0.5 * jnp.square(gap), 0.0))


def normalised_log_ratio(new: Scored, old: Scored) -> jax.Array:
  """GRPO-Guard's RatioNorm: a log-ratio without bias and without unit, `[B]`.

  The plain one has the mean -|mean - old mean|^2 / (2 std^2) under the old
  policy, so that clipping hardly ever acts where A > 0. What is left here is
  the mean product of the drawn noise and the shift of the mean.
  """
  bias_B = gaussian_kl(new.mean, old.mean, new.std)
  plain_B = new.log_prob_B - old.log_prob_B
  return (plain_B + bias_B) * jnp.ravel(new.std)


def policy_loss(
  config: GrpoConfig, steps: Transition, new: Scored, old: Scored,
  advantage_B: jax.Array, reference: Scored | None = None,
) -> tuple[jax.Array, dict]:  # fmt: skip
  """The loss of every step and what to log of it.

  Args:
    config: see `GrpoConfig`.
    steps: as the rollout took them.
    new: of the trained velocity.
    old: of the velocity before the first update, by the same function.
    advantage_B: of the images.
    reference: of the reference model; needed if `kl_weight` is not 0.

  Returns:
    `(loss [B], {name: [B]})`.
  """
  plain_B = new.log_prob_B - old.log_prob_B
  log_ratio_B = normalised_log_ratio(new, old) if config.guard else plain_B
  loss_B = surrogate(log_ratio_B, advantage_B, config.clip)
  length_B = steps.sigma_B - steps.following_B
  if config.guard:
    loss_B = loss_B / length_B
  metrics = {
    "clipped": (jnp.abs(jnp.expm1(log_ratio_B)) > config.clip) * 1.0,
    "log_ratio": plain_B,
    "log_ratio_abs": jnp.abs(plain_B),
  }
  if config.kl_weight:
    kl_B = gaussian_kl(new.mean, reference.mean, new.std)
    if config.kl == "published":
      kl_B = kl_B * length_B
    loss_B = loss_B + config.kl_weight * kl_B
    metrics["kl"] = kl_B
  return loss_B, metrics


def relative_drift(unconditional, cached) -> jax.Array:
  """How far the unconditional velocity has moved since the rollout, `[B]`.

  It shares the weights of the conditional one and is not held in place.
  """
  moved = sde.mean_of_rows(jnp.square(unconditional - cached))
  return jnp.sqrt(moved / jnp.maximum(sde.mean_of_rows(cached**2), 1e-12))


def transitions(walk: sde.Walk) -> Transition:
  """The stochastic steps of a walk as rows: image 0's first, then image 1's."""
  flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
  return Transition(
    flat(walk.states[:, :-1]), flat(walk.states[:, 1:]),
    flat(walk.sigmas[:, :-1]), flat(walk.sigmas[:, 1:]),
  )  # fmt: skip
