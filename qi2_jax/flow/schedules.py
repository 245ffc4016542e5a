# SPDX-License-Identifier: Apache-2.0
"""Noise levels for training and sampling, with resolution-dependent shift.

The shift is the published scheduler's (Qwen-Image-2.1 `scheduler_config`):
more latent tokens move the levels towards noise. The training distribution
is not published; logit-normal (Esser et al. 2024) is our choice.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ShiftConfig:
  """Exponential shift, linear in the number of target latent tokens.

  Attributes:
    base_shift: mu at `base_tokens`.
    max_shift: mu at `max_tokens`; the line extrapolates beyond both.
    base_tokens: see `base_shift`.
    max_tokens: see `max_shift`.
    terminal: last non-zero sigma of a sampling schedule; 0 leaves it as is.
  """

  base_shift: float = 0.5
  max_shift: float = 0.9
  base_tokens: int = 256
  max_tokens: int = 8192
  terminal: float = 0.02


def shift_mu(num_tokens: int, config: ShiftConfig) -> float:
  """Log shift `mu` for an image of `num_tokens` latent tokens."""
  slope = (config.max_shift - config.base_shift) / (
    config.max_tokens - config.base_tokens
  )
  return config.base_shift + slope * (num_tokens - config.base_tokens)


def shift(sigma, mu: float):
  """Moves levels towards noise: `e^mu / (e^mu + 1/sigma - 1)`.

  Written without a division by sigma so that 0 maps to 0.
  """
  scale = math.exp(mu)
  return scale * sigma / (scale * sigma + 1.0 - sigma)


def sampling_sigmas(
  num_steps: int, num_tokens: int, config: ShiftConfig | None
) -> np.ndarray:
  """Levels visited by the sampler, float32 `[num_steps + 1]`, 1 down to 0.

  Evenly spaced, then shifted; without a config they stay evenly spaced.

  Raises:
    InputError: num_steps < 1, or 1 with a terminal level (undefined there).
  """
  fewest = 2 if config and config.terminal else 1
  if num_steps < fewest:
    raise InputError(
      f"{num_steps} sampling steps are too few; use at least {fewest}."
    )
  even = np.linspace(1.0, 1.0 / num_steps, num_steps)
  return shifted_sigmas(even, num_tokens, config)


def shifted_sigmas(
  sigmas, num_tokens: int, config: ShiftConfig | None
) -> np.ndarray:
  """Levels as the public scheduler processes them, with the final 0.

  Args:
    sigmas: `[S]` decreasing levels without the final 0, such as the
      `sample_sigmas` of a distilled model.
    num_tokens: latent tokens of the target image.
    config: shift and terminal level; None returns the levels verbatim.
  """
  sigmas = np.asarray(sigmas, np.float64)
  if config is not None:
    sigmas = shift(sigmas, shift_mu(num_tokens, config))
    if config.terminal:
      stretch = (1.0 - config.terminal) / (1.0 - sigmas[-1])
      sigmas = 1.0 - (1.0 - sigmas) * stretch
  return np.append(sigmas, 0.0).astype(np.float32)


def logit_normal(
  key: jax.Array, shape: tuple[int, ...], mean: float, std: float
) -> jax.Array:
  """Training levels: sigmoid of N(mean, std^2)."""
  return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))


def training_sigmas(
  key: jax.Array, batch: int, num_tokens: int, *, mean: float, std: float,
  shift_config: ShiftConfig | None,
) -> jax.Array:  # fmt: skip
  """Logit-normal levels `[B]`, shifted by resolution if a config is given."""
  sigma = logit_normal(key, (batch,), mean, std)
  if shift_config is not None:
    sigma = shift(sigma, shift_mu(num_tokens, shift_config))
  return sigma.astype(jnp.float32)
