# SPDX-License-Identifier: Apache-2.0
"""The random draws of one update of a distillation."""

import jax

from qi2_jax.flow import path
from qi2_jax.parallel import sharding

_DRAWS = (
  "stop", "noise", "renoise", "times", "eps", "other_times", "other_eps",
)  # fmt: skip


def draws(key: jax.Array) -> dict[str, jax.Array]:
  """One key for each random draw of an update."""
  return dict(zip(_DRAWS, jax.random.split(key, len(_DRAWS))))


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Noise `[B, N, Z]`, split over devices as batches are."""
  return sharding.constrain(jax.random.normal(key, shape), "batch", None, None)


def noisy(x0: jax.Array, t_B: jax.Array, key: jax.Array):
  """`(x_t, eps)` of equation 5."""
  eps = normal(key, x0.shape)
  return path.interpolate(x0, eps, t_B), eps
