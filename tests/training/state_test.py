# SPDX-License-Identifier: Apache-2.0
"""Train state, EMA and what one step does to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qi2_jax.training import state, steps

DECAY = 0.7


def params(value=1.0):
  return {"a": {"kernel": jnp.full((2, 3), value)}, "b": jnp.full((3,), 2.0)}


def quadratic(params, batch, key):
  """A loss with gradient `p - batch`, plus noise that only the key drives."""
  loss = sum(0.5 * jnp.sum((p - batch) ** 2) for p in jax.tree.leaves(params))
  return loss, {"noise": jax.random.normal(key)}


def test_a_fresh_state_shares_no_buffer():
  tx = optax.adam(1e-3)
  start = state.create(params(), tx)
  assert int(start.step) == 0 and start.step.dtype == jnp.int32
  for p, e in zip(jax.tree.leaves(start.params), jax.tree.leaves(start.ema)):
    np.testing.assert_array_equal(p, e)
    assert p.unsafe_buffer_pointer() != e.unsafe_buffer_pointer()
  donated = jax.jit(lambda s: s, donate_argnums=0)(start)
  assert jax.tree.structure(donated) == jax.tree.structure(start)


@pytest.mark.parametrize("step", [0, 1, 5, 13, 14, 1000])
@pytest.mark.parametrize("decay", [0.6, 0.999])
def test_ema_is_the_written_average(step, decay):
  old, new = params(1.0), params(5.0)
  out = state.ema_update(old, new, jnp.asarray(step), decay)
  rate = min(decay, (1 + step) / (10 + step))
  np.testing.assert_allclose(
    out["a"]["kernel"], np.full((2, 3), rate * 1 + (1 - rate) * 5), rtol=1e-6
  )
  np.testing.assert_allclose(out["b"], np.full(3, 2.0), rtol=1e-6)


def test_ema_over_many_steps_forgets_the_start():
  ema = params(100.0)
  for step in range(60):
    ema = state.ema_update(ema, params(1.0), jnp.asarray(step), DECAY)
  np.testing.assert_allclose(ema["a"]["kernel"], np.ones((2, 3)), rtol=1e-5)


def test_a_step_is_gradient_optimizer_and_ema():
  tx = optax.sgd(0.1)
  step = jax.jit(steps.make_step(quadratic, tx, DECAY), donate_argnums=0)
  current = state.create(params(), tx)
  weight, average = 1.0, 1.0
  for i, batch in enumerate([3.0, -1.0, 2.0]):
    expected = 0.5 * (6 * (weight - batch) ** 2) + 0.5 * sum(
      (np.asarray(current.params["b"]) - batch) ** 2
    )
    gradient = np.concatenate(
      [np.full(6, weight - batch), np.asarray(current.params["b"]) - batch]
    )
    current, metrics = step(current, jnp.float32(batch), jax.random.key(0))
    weight -= 0.1 * (weight - batch)
    rate = min(DECAY, (1 + i) / (10 + i))
    average = rate * average + (1 - rate) * weight
    assert int(current.step) == i + 1
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    norm = np.linalg.norm(gradient)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["update_norm"]) == pytest.approx(0.1 * norm, rel=1e-5)
    np.testing.assert_allclose(current.params["a"]["kernel"][0, 0], weight)
    np.testing.assert_allclose(
      current.ema["a"]["kernel"][0, 0], average, rtol=1e-6
    )


def test_randomness_is_a_function_of_the_step_alone():
  tx = optax.sgd(0.1)
  step = jax.jit(steps.make_step(quadratic, tx, DECAY))
  key, batch = jax.random.key(7), jnp.float32(0.0)
  first, second = state.create(params(), tx), None
  noises = []
  for _ in range(3):
    second = first
    first, metrics = step(first, batch, key)
    noises.append(float(metrics["noise"]))
  assert len(set(noises)) == 3
  assert float(step(second, batch, key)[1]["noise"]) == noises[-1]
