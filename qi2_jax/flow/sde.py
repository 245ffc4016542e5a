# SPDX-License-Identifier: Apache-2.0
"""Solver steps with a log-probability, for reinforcement learning.

A stochastic step draws the state at the next noise level from a Gaussian
around a mean that the velocity determines, so that a policy gradient exists
for it. With the convention of `flow.path`, for a step from t to t' < t,

    x0 = x - t v        eps = x + (1 - t) v        d = t - t'

    flow   noise s = a sqrt(t / (1 - t))   (Flow-GRPO, arXiv 2505.05470)
    dance  noise s = a                     (DanceGRPO, arXiv 2505.07818)
           mean = x (1 - s^2 d / (2 t)) - v (1 + s^2 (1 - t) / (2 t)) d
           std  = s sqrt(d)
    cps    std  = t' sin(a pi / 2)         (arXiv 2509.05952)
    ddim   std^2 = a^2 (t^2 - ((1 - t) / (1 - t'))^2 t'^2) t'^2 / t^2
           mean = (1 - t') x0 + sqrt(t'^2 - std^2) eps

The last two differ in std only. `ddim` (ours: DDIM's eta carried over) keeps
the marginals of the ODE as `dance` does, has no singularity, and ends without
noise. `flow` keeps them away from t = 1, where its noise is unbounded. `cps`
does not keep them: it ends less varied than the data (std ratio 0.7 to 0.8 at
a = 0.8).

The step to t' = 0 is the deterministic x0 in every kernel: published samplers
of `flow` and `dance` leave noise in the image there. At a = 0 every kernel is
an Euler step. All arithmetic is fp32, whatever the model computes in.

Shapes: B batch, S steps, W stochastic steps; samples have any shape
`[B, ...]`.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.flow import path, sampler

KERNELS = ("flow", "dance", "cps", "ddim")

# `(x, sigma scalar) -> (v, anything with rows)`: the second part is kept for
# every stochastic step.
Velocity = Callable[[jax.Array, jax.Array], tuple[jax.Array, object]]


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Which noise a step adds.

  Attributes:
    kind: one of `KERNELS`.
    level: a above; 0 is an Euler step.
  """

  kind: str = "flow"
  level: float = 0.7

  def __post_init__(self):
    """Raises InputError for a kernel that does not exist."""
    if self.kind not in KERNELS:
      raise InputError(
        f"sde.kind={self.kind!r} is unknown; use one of {list(KERNELS)}."
      )
    bounded = self.kind in ("cps", "ddim")
    if self.level < 0 or (bounded and self.level > 1):
      raise InputError(
        f"sde.level={self.level} must be {'in [0, 1]' if bounded else '>= 0'} "
        f"for {self.kind}."
      )


def _wide(x) -> jax.Array:
  """At least fp32."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _per_row(sigma, x: jax.Array) -> jax.Array:
  """A level, scalar or `[B]`, shaped to broadcast over x."""
  sigma = _wide(sigma)
  return path.rows(sigma, x) if sigma.ndim else sigma


def noise_scale(kernel: Kernel, t, following):
  """s of `flow` and `dance`: the noise per square root of time.

  At t = 1 `flow` takes the next level in the place of t in 1 - t, as its
  published code does.
  """
  if kernel.kind == "dance":
    return jnp.full_like(t, kernel.level)
  return kernel.level * jnp.sqrt(t / (1.0 - jnp.where(t < 1, t, following)))


def step_std(kernel: Kernel, sigma, following) -> jax.Array:
  """Standard deviation of a step, of the levels' shape; 0 for the last."""
  t, nxt = _wide(sigma), _wide(following)
  if kernel.kind in ("flow", "dance"):
    std = noise_scale(kernel, t, nxt) * jnp.sqrt(t - nxt)
  elif kernel.kind == "cps":
    std = nxt * math.sin(kernel.level * math.pi / 2)
  else:
    kept = (1.0 - t) / jnp.where(nxt < 1, 1.0 - nxt, 1.0) * nxt
    std = kernel.level * jnp.sqrt(jnp.maximum(t**2 - kept**2, 0)) * nxt / t
  return jnp.where(nxt > 0, std, 0.0)


def transition(
  kernel: Kernel, x: jax.Array, v: jax.Array, sigma, following
) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation of the next state.

  Args:
    kernel: which noise.
    x: states `[B, ...]` at `sigma`.
    v: velocities there.
    sigma: level of x, scalar or `[B]`, above 0.
    following: lower level, of the same shape.

  Returns:
    `(mean [B, ...], std)`, std shaped to broadcast over the mean.
  """
  x, v = _wide(x), _wide(v)
  t, nxt = _per_row(sigma, x), _per_row(following, x)
  std = step_std(kernel, t, nxt)
  if kernel.kind in ("flow", "dance"):
    d = t - nxt
    s2 = jnp.square(noise_scale(kernel, t, nxt)) / (2.0 * t)
    mean = x * (1.0 - s2 * d) - v * (1.0 + s2 * (1.0 - t)) * d
    return jnp.where(nxt > 0, mean, x - t * v), std
  x0, eps = x - t * v, x + (1.0 - t) * v
  kept = jnp.sqrt(jnp.maximum(nxt**2 - std**2, 0))
  return (1.0 - nxt) * x0 + kept * eps, std


def mean_of_rows(x: jax.Array) -> jax.Array:
  """Mean over all axes but the first."""
  return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def element_log_prob(x, mean, std) -> jax.Array:
  """Log-density of every element, `[B, ...]`; 0 where nothing is drawn."""
  x, mean, std = _wide(x), _wide(mean), _wide(std)
  drawn = std > 0
  std = jnp.where(drawn, std, 1.0)
  score = (x - mean) / std
  density = -0.5 * score**2 - jnp.log(std) - 0.5 * math.log(2 * math.pi)
  return jnp.where(drawn, density, 0.0)


def log_prob(x, mean, std) -> jax.Array:
  """Log-density per example, its mean over the elements: `[B]`.

  Published clip ranges (1e-4 to 1e-6) belong to the mean, not to the sum.
  """
  return mean_of_rows(element_log_prob(x, mean, std))


def joint_log_prob(x, mean, std) -> jax.Array:
  """Log-density per example, summed over the elements: `[B]`."""
  each = element_log_prob(x, mean, std)
  return jnp.sum(each, axis=tuple(range(1, each.ndim)))


def check_window(low: int, high: int, size: int, steps: int) -> None:
  """Raises InputError unless a window of `size` fits between low and high.

  Args:
    low: first step that may be stochastic.
    high: first step that may not; the last step of all never is.
    size: number of stochastic steps.
    steps: S.
  """
  if not (low >= 0 and 1 <= size <= high - low and high < steps):
    raise InputError(
      f"a window of {size} stochastic steps does not fit between the steps "
      f"{low} and {high} of {steps} (the last is deterministic); change "
      "rollout.window, window_low or window_high."
    )


def draw_window(key: jax.Array, low: int, high: int, size: int) -> jax.Array:
  """First step of a random window between `low` and `high`, int32 scalar."""
  return jax.random.randint(key, (), low, high - size + 1)


@flax.struct.dataclass
class Walk:
  """A walk from noise to data with its stochastic steps.

  Attributes:
    x0: clean samples `[B, ...]`.
    states: `[B, W + 1, ...]`, before the first stochastic step and after
      each.
    sigmas: their levels `[B, W + 1]`.
    log_probs: of the stochastic steps, `[B, W]`, see `log_prob`.
    extras: what the velocity returned beside v, `[B, W, ...]`.
  """

  x0: jax.Array
  states: jax.Array
  sigmas: jax.Array
  log_probs: jax.Array
  extras: object


def walk(
  velocity: Velocity, noise: jax.Array, sigmas: jax.Array, kernel: Kernel,
  start, size: int, key: jax.Array,
) -> Walk:  # fmt: skip
  """Euler steps, `size` stochastic steps from step `start` on, Euler steps.

  One program serves every window of one size (Flow-GRPO-Fast, MixGRPO).

  Args:
    velocity: see `Velocity`.
    noise: starting noise `[B, ...]`.
    sigmas: `[S + 1]` decreasing levels ending at 0.
    kernel: of the stochastic steps.
    start: first of them; may be traced.
    size: W; `start + W <= S - 1`.
    key: of the noise of the steps.
  """
  sigmas = jnp.asarray(sigmas, jnp.float32)

  def euler(i, x):
    plain = lambda x, sigma: velocity(x, sigma)[0].astype(x.dtype)  # noqa: E731
    return sampler.euler_step(plain, x, sigmas[i], sigmas[i + 1])

  def draw(x, i):
    v, extra = velocity(x, sigmas[i])
    mean, std = transition(kernel, x, v, sigmas[i], sigmas[i + 1])
    fresh = jax.random.normal(jax.random.fold_in(key, i), x.shape)
    following = mean + std * fresh
    return following, (following, log_prob(following, mean, std), extra)

  first = jax.lax.fori_loop(0, start, euler, noise.astype(jnp.float32))
  at = start + jnp.arange(size)
  x, (states, log_probs, extras) = jax.lax.scan(draw, first, at)
  states = jnp.concatenate([first[None], states])
  after = start + size
  # From 0, as `parallel.hlo` takes it that loops begin.
  x0 = jax.lax.fori_loop(
    0, len(sigmas) - 1 - after, lambda i, x: euler(after + i, x), x
  )
  levels = jax.lax.dynamic_slice_in_dim(sigmas, start, size + 1)
  by_row = lambda a: jnp.moveaxis(a, 0, 1)  # noqa: E731
  return Walk(
    x0, by_row(states), jnp.broadcast_to(levels, (len(x), size + 1)),
    by_row(log_probs), jax.tree.map(by_row, extras),
  )  # fmt: skip
