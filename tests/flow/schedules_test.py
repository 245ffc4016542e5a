# SPDX-License-Identifier: Apache-2.0
"""Noise levels against diffusers' scheduler and scipy."""

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats

from qi2_jax.errors import InputError
from qi2_jax.flow import schedules

SHIFT = schedules.ShiftConfig()
# scheduler_config.json of Qwen-Image-2.1.
PUBLISHED = {
  "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": True,
  "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
  "max_image_seq_len": 8192, "shift_terminal": 0.02,
  "time_shift_type": "exponential", "invert_sigmas": False,
  "use_karras_sigmas": False, "use_exponential_sigmas": False,
  "use_beta_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip


@pytest.mark.parametrize("side", [512, 1024, 2048])
@pytest.mark.parametrize("steps", [2, 25, 40])
def test_sampling_levels_equal_diffusers(side, steps):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21

  tokens = (side // 16) ** 2
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**PUBLISHED)
  mu = pipeline_qwenimage21.calculate_shift(tokens, 256, 8192, 0.5, 0.9)
  scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
  ours = schedules.sampling_sigmas(steps, tokens, SHIFT)
  np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6)


def test_sampling_levels_equal_the_published_numbers():
  ours = schedules.sampling_sigmas(40, 64 * 64, SHIFT)
  np.testing.assert_allclose(ours[:3], [1, 0.98696, 0.97359], atol=6e-6)
  np.testing.assert_allclose(ours[-3:], [0.06788, 0.02, 0], atol=6e-6)
  ours = schedules.sampling_sigmas(40, 128 * 128, SHIFT)
  np.testing.assert_allclose(ours[:3], [1, 0.99265, 0.98501], atol=6e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("terminal", [0.0, 0.02])
def test_sampling_levels_fall_from_one_to_zero(steps, terminal):
  config = schedules.ShiftConfig(terminal=terminal)
  if steps == 1 and terminal:
    with pytest.raises(InputError, match="at least 2"):
      schedules.sampling_sigmas(steps, 256, config)
    return
  sigmas = schedules.sampling_sigmas(steps, 256, config)
  assert sigmas.shape == (steps + 1,) and sigmas.dtype == np.float32
  assert sigmas[0] == 1 and sigmas[-1] == 0
  assert (np.diff(sigmas) < 0).all()
  if terminal:
    np.testing.assert_allclose(sigmas[-2], terminal, atol=1e-6)


def test_no_steps_are_refused():
  with pytest.raises(InputError, match="0 sampling steps"):
    schedules.sampling_sigmas(0, 256, schedules.ShiftConfig(terminal=0.0))


def test_mu_is_the_line_through_its_two_points():
  assert schedules.shift_mu(256, SHIFT) == pytest.approx(0.5)
  assert schedules.shift_mu(8192, SHIFT) == pytest.approx(0.9)
  assert schedules.shift_mu(64 * 64, SHIFT) == pytest.approx(0.69355, abs=1e-5)
  assert schedules.shift_mu(128 * 128, SHIFT) == pytest.approx(1.3129, abs=1e-5)


@pytest.mark.parametrize("mu", [-1.0, 0.0, 0.7, 1.3])
def test_shift_adds_mu_to_the_logit(mu):
  sigma = np.linspace(0.01, 0.99, 50)
  moved = schedules.shift(sigma, mu)
  np.testing.assert_allclose(
    scipy.special.logit(moved), scipy.special.logit(sigma) + mu, atol=1e-9
  )
  assert schedules.shift(0.0, mu) == 0.0 and schedules.shift(1.0, mu) == 1.0
  np.testing.assert_allclose(schedules.shift(moved, -mu), sigma, atol=1e-9)


@pytest.mark.parametrize("tokens", [None, 64 * 64])
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.6, 1.4)])
def test_training_levels_have_logit_normal_quantiles(mean, std, tokens):
  draws = schedules.training_sigmas(
    jax.random.key(0), 100_000, tokens or 1, mean=mean, std=std,
    shift_config=SHIFT if tokens else None,
  )  # fmt: skip
  assert draws.shape == (100_000,) and draws.dtype == np.float32
  assert draws.min() > 0 and draws.max() < 1
  mu = schedules.shift_mu(tokens, SHIFT) if tokens else 0.0
  levels = np.array([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])
  normal = scipy.stats.norm(mean + mu, std).ppf(levels)
  np.testing.assert_allclose(
    np.quantile(draws, levels), scipy.special.expit(normal), atol=0.006
  )
