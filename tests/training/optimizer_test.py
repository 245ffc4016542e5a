# SPDX-License-Identifier: Apache-2.0
"""Learning rate and Adam against formulas and torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from qi2_jax.errors import InputError
from qi2_jax.training import optimizer

PEAK, WARMUP, STEPS = 3e-4, 20, 120


def written(schedule, step):
  """The rate as the documentation words it."""
  if step < WARMUP:
    return PEAK * step / WARMUP
  done = min(1.0, (step - WARMUP) / (STEPS - WARMUP))
  return (
    PEAK
    * {
      "constant": 1.0,
      "linear": 1 - done,
      "cosine": (1 + math.cos(math.pi * done)) / 2,
    }[schedule]
  )


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
def test_rates_follow_the_formula(schedule):
  rate = optimizer.learning_rate(PEAK, schedule, WARMUP, STEPS)
  for step in (0, 1, 10, 19, 20, 21, 70, 119, 120, 500):
    expected = written(schedule, step)
    assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-11)


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
def test_no_warmup_starts_at_the_peak(schedule):
  rate = optimizer.learning_rate(PEAK, schedule, 0, STEPS)
  assert float(rate(0)) == pytest.approx(PEAK)


def test_a_warmup_longer_than_the_run_never_falls():
  rate = optimizer.learning_rate(PEAK, "cosine", 10, 5)
  rates = [float(rate(step)) for step in range(6)]
  assert rates == sorted(rates)


def test_unknown_schedules_are_named():
  with pytest.raises(InputError, match="'poly' is unknown"):
    optimizer.learning_rate(PEAK, "poly", 0, STEPS)


def config(**changes):
  fields = {
    "learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0,
    "b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 0.5,
  }  # fmt: skip
  return ConfigDict({**fields, **changes})


def gradients(step):
  """Below the clip norm at even steps, far above it at odd ones."""
  rng = np.random.default_rng(step)
  scale = 0.01 if step % 2 == 0 else 10.0
  return {
    name: (scale * rng.normal(size=shape)).astype(np.float32)
    for name, shape in (("w", (4, 6)), ("b", (6,)))
  }


def test_adam_equals_torch():
  torch = pytest.importorskip("torch")
  cfg = config(schedule="linear", warmup_steps=2)
  tx = optimizer.create(cfg, 10)
  params = {"w": jnp.ones((4, 6)), "b": jnp.full((6,), -0.5)}
  moments = tx.init(params)
  theirs = {
    k: torch.nn.Parameter(torch.tensor(np.asarray(v)))
    for k, v in params.items()
  }
  adam = torch.optim.AdamW(
    theirs.values(), lr=cfg.learning_rate, betas=(cfg.b1, cfg.b2), eps=1e-8,
    weight_decay=cfg.weight_decay,
  )  # fmt: skip
  rate = optimizer.learning_rate(cfg.learning_rate, "linear", 2, 10)
  for step in range(5):
    grads = gradients(step)
    updates, moments = tx.update(grads, moments, params)
    params = optax.apply_updates(params, updates)
    for name, value in theirs.items():
      value.grad = torch.tensor(grads[name])
    torch.nn.utils.clip_grad_norm_(theirs.values(), cfg.clip_norm)
    adam.param_groups[0]["lr"] = float(rate(step))
    adam.step()
    for name, value in theirs.items():
      np.testing.assert_allclose(
        params[name], value.detach().numpy(), atol=2e-6, err_msg=f"{step}"
      )
  assert np.abs(np.asarray(params["w"]) - 1).max() > 1e-2


def test_clipping_bounds_the_gradient_that_adam_sees():
  tx = optimizer.create(config(b1=0.0, clip_norm=0.5), 10)
  params = jax.tree.map(jnp.zeros_like, gradients(0))
  _, moments = tx.update(gradients(1), tx.init(params), params)
  seen = moments[1][0].mu
  assert float(optax.global_norm(seen)) == pytest.approx(0.5, rel=1e-5)
