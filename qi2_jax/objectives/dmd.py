# SPDX-License-Identifier: Apache-2.0
"""Distribution matching distillation (report section 4.3, equations 4 and 5).

Yin et al. 2024 (arXiv 2311.18828, 2405.14867) in velocities. With the
convention of `flow.path` the score at noise level t is `-eps / t`, so

    s_fake - s_real = (1 - t) / t * (v_real - v_fake)

and two networks that predict velocities are compared without dividing twice.
The report publishes neither p(t) nor a weight; see `experiments/dmd.py`.

Guidance acts on the real score only and follows `flow.sampler.guide`:
`u + w (c - u)`, w = 1 is off. Codes that write `c + w' (c - u)` mean
w = w' + 1.

Shapes: B batch, M teachers, K student steps, C categories of prompts; the
samples x have any shape `[B, ...]`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.flow import path, schedules

# A sample that equals its real estimate everywhere must not divide by zero.
_TINY = 1e-8


@dataclasses.dataclass(frozen=True)
class Times:
  """Distribution p(t) of the noise levels at which scores are compared.

  Attributes:
    kind: `uniform`, `logit_normal` or `shifted` (uniform, then moved towards
      noise as the schedule of a sampler is).
    low: lowest level.
    high: highest level; scores are unbounded at 0 and equal at 1.
    mean: of the logit.
    std: of the logit.
    shift: `shift t / (1 + (shift - 1) t)`, for `shifted`.
  """

  kind: str = "logit_normal"
  low: float = 0.02
  high: float = 0.98
  mean: float = 0.0
  std: float = 1.0
  shift: float = 3.0

  def __post_init__(self):
    """Raises InputError for a distribution that cannot be drawn from."""
    if self.kind not in TIME_KINDS:
      raise InputError(
        f"dmd.times.kind={self.kind!r} is unknown; use one of "
        f"{list(TIME_KINDS)}."
      )
    if not 0.0 < self.low < self.high <= 1.0:
      raise InputError(
        f"dmd.times need 0 < low < high <= 1, not {self.low} and {self.high}."
      )
    if self.std <= 0 or self.shift <= 0:
      raise InputError(
        f"dmd.times need std and shift above 0, not {self.std} and "
        f"{self.shift}."
      )


TIME_KINDS = ("uniform", "logit_normal", "shifted")


def draw_times(key: jax.Array, batch: int, times: Times) -> jax.Array:
  """Noise levels fp32 `[B]` from p(t), between its low and its high."""
  if times.kind == "logit_normal":
    t_B = schedules.logit_normal(key, (batch,), times.mean, times.std)
  else:
    t_B = jax.random.uniform(
      key, (batch,), minval=times.low, maxval=times.high
    )  # fmt: skip
    if times.kind == "shifted":
      t_B = schedules.shift(t_B, math.log(times.shift))
  return jnp.clip(t_B, times.low, times.high)


def score(x: jax.Array, v: jax.Array, t_B: jax.Array) -> jax.Array:
  """Score `-eps / t` of the distribution whose velocity at x is v."""
  return -path.noise_from_velocity(x, v, t_B) / path.rows(t_B, x)


def score_gap(
  v_fake: jax.Array, v_real: jax.Array, t_B: jax.Array
) -> jax.Array:
  """`s_fake - s_real` at one noisy sample: equation 4 without the expectation.

  It is also the weight `score`: no normaliser.
  """
  t = path.rows(t_B, v_fake)
  return (1.0 - t) / t * (v_real - v_fake)


def data_gap(v_fake: jax.Array, v_real: jax.Array, t_B: jax.Array) -> jax.Array:
  """Difference of the clean estimates, fake minus real: `t (v_real - v_fake)`.

  The direction of `score_gap`, times `t^2 / (1 - t)`.
  """
  return path.rows(t_B, v_fake) * (v_real - v_fake)


def distance(x0: jax.Array, estimate: jax.Array) -> jax.Array:
  """Per-example mean of `|x0 - estimate|`: the normaliser of DMD, `[B]`."""
  gap = jnp.abs(x0.astype(jnp.float32) - estimate.astype(jnp.float32))
  return jnp.maximum(jnp.mean(gap, axis=tuple(range(1, gap.ndim))), _TINY)


def _weighted(
  v_fake, v_real, t_B, weight: str, norm_B: jax.Array
) -> jax.Array:  # fmt: skip
  if weight == "score":
    return score_gap(v_fake, v_real, t_B)
  return data_gap(v_fake, v_real, t_B) / path.rows(norm_B, v_fake)


WEIGHTS = ("x0_norm", "score")


def gradient(
  x0: jax.Array, x_t: jax.Array, t_B: jax.Array, v_fake: jax.Array,
  v_real: jax.Array, weight: str = "x0_norm",
) -> jax.Array:  # fmt: skip
  """Gradient of the generator at its samples, fp32 like x0.

  Args:
    x0: clean samples of the student.
    x_t: the same with noise (equation 5).
    t_B: their noise levels.
    v_fake: velocity of the fake score model at x_t.
    v_real: velocity of the teacher at x_t, with guidance.
    weight: `x0_norm`, the difference of clean estimates over the mean
      distance of sample and real estimate, per example (DMD, equation 8); or
      `score`, the difference of scores itself (equation 4).
  """
  norm_B = distance(x0, path.data_from_velocity(x_t, v_real, t_B))
  return _weighted(v_fake, v_real, t_B, weight, norm_B)


def decoupled_gradient(
  x0: jax.Array, matching: tuple, augmentation: tuple, guidance: float,
  weight: str = "x0_norm",
) -> jax.Array:  # fmt: skip
  """Gradient with guidance at a noise level of its own (arXiv 2511.22677).

      [s_fake - s_c] at t_DM  -  (w - 1) [s_c - s_u] at t_CA

  One normaliser serves both terms, that of the guided estimate at t_CA (ours;
  the paper gives none): with one noisy sample for both this is `gradient` at
  `v_u + w (v_c - v_u)`.

  Args:
    x0: clean samples of the student.
    matching: `(t_B, v_fake, v_c)` of distribution matching.
    augmentation: `(x_t, t_B, v_c, v_u)` of guidance.
    guidance: w.
    weight: see `gradient`.
  """
  t_B, v_fake, v_c = matching
  x_ca, t_ca_B, c, u = augmentation
  guided = u + guidance * (c - u)
  norm_B = distance(x0, path.data_from_velocity(x_ca, guided, t_ca_B))
  match = _weighted(v_fake, v_c, t_B, weight, norm_B)
  return match + (guidance - 1.0) * _weighted(u, c, t_ca_B, weight, norm_B)


def generator_loss(x0: jax.Array, gradient: jax.Array) -> jax.Array:
  """A loss whose gradient at x0 is `gradient` over its elements: fp32 `[B]`.

  `1/2 mean (x0 - sg(x0 - gradient))^2`; its value is half the mean square of
  the gradient, not a measure of quality.
  """
  x0 = x0.astype(jnp.float32)
  target = jax.lax.stop_gradient(x0 - gradient)
  error = x0 - target
  return 0.5 * jnp.mean(error * error, axis=tuple(range(1, error.ndim)))


def teacher_weights(weights, teachers: int, steps: int, categories: int):
  """The weights of several teachers, checked: fp32 `[M, K, C]`.

  Qwen-Image-Flash (arXiv 2606.03746) mixes the scores of a base and of a
  specialised teacher by student step and kind of prompt; its numbers are not
  published.

  Args:
    weights: nested sequence; empty means a single teacher.
    teachers: M.
    steps: K, steps of the student.
    categories: C.

  Raises:
    InputError: another shape, or weights that do not sum to one.
  """
  shape = (teachers, steps, categories)
  if not len(weights) and teachers == 1:
    return np.ones(shape, np.float32)
  try:
    array = np.asarray(weights, np.float64)
  except ValueError:
    array = np.empty(0)
  if array.shape != shape:
    raise InputError(
      f"dmd.teacher_weights must have the shape {shape} (teachers, student "
      f"steps, categories) but has {array.shape}."
    )
  if not np.allclose(array.sum(axis=0), 1.0, atol=1e-6):
    raise InputError(
      "dmd.teacher_weights must sum to one over the teachers at every student "
      "step and category."
    )
  return array.astype(np.float32)


def mix(velocities, weights_MB: jax.Array) -> jax.Array:
  """`sum_m weight_m v_m`: of scores, too, since the weights sum to one.

  Args:
    velocities: M arrays `[B, ...]`.
    weights_MB: weight of each teacher for each example.
  """
  return sum(path.rows(w_B, v) * v for w_B, v in zip(weights_MB, velocities))
