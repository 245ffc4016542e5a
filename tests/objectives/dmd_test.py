# SPDX-License-Identifier: Apache-2.0
"""Distribution matching: scores, weights, guidance and a fixed point."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from qi2_jax.errors import InputError
from qi2_jax.flow import path, sampler, schedules
from qi2_jax.objectives import dmd

RNG = np.random.default_rng(0)
B, N, Z = 5, 3, 4


def normal(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def times(low=0.05, high=0.95, count=B):
  return jnp.asarray(np.linspace(low, high, count), jnp.float32)


def gaussian_velocity(x, t_B, mean, std):
  """E[eps - x0 | x_t] for data N(mean, std^2)."""
  t = path.rows(t_B, x)
  var = (1 - t) ** 2 * std**2 + t**2
  return -mean + (t - (1 - t) * std**2) / var * (x - (1 - t) * mean)


def gaussian_score(x, t_B, mean, std):
  """Of the noisy marginal, from its density."""
  t = path.rows(t_B, x)
  return -(x - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)


def test_velocities_become_the_scores_of_gaussians():
  with jax.enable_x64(True):
    x = jnp.asarray(RNG.normal(size=(B, N, Z)))
    t_B = jnp.linspace(0.02, 0.98, B)
    fake, real = (0.3, 0.9), (1.5, 0.5)
    v_fake, v_real = (gaussian_velocity(x, t_B, *g) for g in (fake, real))
    s_fake, s_real = (gaussian_score(x, t_B, *g) for g in (fake, real))
    for v, s in ((v_fake, s_fake), (v_real, s_real)):
      np.testing.assert_allclose(dmd.score(x, v, t_B), s, rtol=1e-9)
    np.testing.assert_allclose(
      dmd.score_gap(v_fake, v_real, t_B), s_fake - s_real, rtol=1e-6
    )
    # The other two ways to write it.
    x0 = [path.data_from_velocity(x, v, t_B) for v in (v_fake, v_real)]
    t = path.rows(t_B, x)
    np.testing.assert_allclose(
      dmd.score_gap(v_fake, v_real, t_B),
      (1 - t) / t**2 * (x0[0] - x0[1]), rtol=1e-6,
    )  # fmt: skip
    np.testing.assert_allclose(
      dmd.data_gap(v_fake, v_real, t_B), x0[0] - x0[1], rtol=1e-6
    )


def test_each_sample_has_its_own_normaliser():
  x0, x_t, fake, real = (normal(B, N, Z) for _ in range(4))
  x0 = x0 * jnp.asarray([1.0, 10, 100, 0.1, 1])[:, None, None]
  t_B = times()
  out = np.asarray(dmd.gradient(x0, x_t, t_B, fake, real))
  for i in range(B):
    t = float(t_B[i])
    estimate = x_t[i] - t * real[i]
    expected = t * (real[i] - fake[i]) / np.abs(x0[i] - estimate).mean()
    np.testing.assert_allclose(out[i], expected, rtol=1e-5)
  plain = dmd.gradient(x0, x_t, t_B, fake, real, "score")
  np.testing.assert_allclose(plain, dmd.score_gap(fake, real, t_B))
  # A sample at its own estimate does not divide by zero.
  same = path.data_from_velocity(x_t, real, t_B)
  assert np.isfinite(dmd.gradient(same, x_t, t_B, real, real)).all()


@pytest.mark.parametrize("weight", dmd.WEIGHTS)
@pytest.mark.parametrize("guidance", [1.5, 4.0])
def test_decoupled_is_coupled_where_the_times_coincide(weight, guidance):
  with jax.enable_x64(True):
    x0, x_t, fake, c, u = (jnp.asarray(normal(B, N, Z), float) for _ in "01234")
    t_B = jnp.linspace(0.05, 0.95, B)
    real = sampler.guide(c, u, guidance)
    coupled = dmd.gradient(x0, x_t, t_B, fake, real, weight)
    decoupled = dmd.decoupled_gradient(
      x0, (t_B, fake, c), (x_t, t_B, c, u), guidance, weight
    )
    # The normaliser is kept in fp32.
    np.testing.assert_allclose(decoupled, coupled, rtol=1e-6)
    # And not otherwise.
    other = dmd.decoupled_gradient(
      x0, (t_B, fake, c), (x_t, 0.5 * t_B, c, u), guidance, weight
    )
  assert np.abs(other - coupled).max() > 1e-2


def test_the_two_conventions_of_guidance_differ_by_one():
  c, u = normal(B, N, Z), normal(B, N, Z)
  np.testing.assert_allclose(
    c + 3.5 * (c - u), sampler.guide(c, u, 4.5), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_array_equal(sampler.guide(c, u, 0.0), u)


def test_the_loss_has_the_gradient_it_was_given():
  x0, g = normal(B, N, Z), normal(B, N, Z)
  found = jax.grad(lambda x: dmd.generator_loss(x, g).sum())(x0)
  np.testing.assert_allclose(N * Z * found, g, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    dmd.generator_loss(x0, g), 0.5 * np.mean(np.square(g), axis=(1, 2)),
    rtol=1e-5,
  )  # fmt: skip


@pytest.mark.parametrize("kind", dmd.TIME_KINDS)
def test_times_have_their_distribution(kind):
  config = dmd.Times(kind, 0.1, 0.9, mean=0.4, std=0.7, shift=3.0)
  t = np.asarray(dmd.draw_times(jax.random.key(0), 20_000, config), np.float64)
  assert t.min() >= 0.1 - 1e-7 and t.max() <= 0.9 + 1e-7
  inside = np.linspace(0.15, 0.85, 8)
  expected = {
    "uniform": (inside - 0.1) / 0.8,
    "logit_normal": scipy.stats.norm.cdf(
      (np.log(inside / (1 - inside)) - 0.4) / 0.7
    ),
    # Inverse of the shift, then uniform.
    "shifted": (inside / (3 - 2 * inside) - 0.1) / 0.8,
  }[kind]
  found = (t[:, None] <= inside).mean(axis=0)
  # Four standard deviations.
  np.testing.assert_allclose(found, np.clip(expected, 0, 1), atol=0.015)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"kind": "beta"}, "dmd.times.kind='beta' is unknown"),
    ({"low": 0.0}, "need 0 < low < high <= 1"),
    ({"low": 0.9, "high": 0.5}, "need 0 < low < high <= 1"),
    ({"high": 1.5}, "need 0 < low < high <= 1"),
    ({"std": 0.0}, "std and shift above 0"),
  ],
)
def test_impossible_times_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    dmd.Times(**fields)


def test_teachers_are_mixed_by_step_and_category():
  table = [[[0.75, 0.5], [0.0, 1.0]], [[0.25, 0.5], [1.0, 0.0]]]
  weights_MKC = dmd.teacher_weights(table, 2, 2, 2)
  np.testing.assert_allclose(weights_MKC.sum(axis=0), 1.0)
  category_B = np.asarray([0, 1, 1, 0, 1])
  first, second = normal(B, N, Z), normal(B, N, Z)
  weights_MB = jnp.asarray(weights_MKC[:, 0][:, category_B])
  out = dmd.mix([first, second], weights_MB)
  np.testing.assert_allclose(out[0], 0.75 * first[0] + 0.25 * second[0],
                             rtol=1e-5, atol=1e-6)  # fmt: skip
  np.testing.assert_allclose(out[1], 0.5 * (first[1] + second[1]),
                             rtol=1e-5, atol=1e-6)  # fmt: skip
  # Velocities mix as scores do.
  t_B, x = times(), normal(B, N, Z)
  scores = dmd.mix(
    [dmd.score(x, first, t_B), dmd.score(x, second, t_B)], weights_MB
  )
  np.testing.assert_allclose(
    dmd.score(x, out, t_B), scores, rtol=1e-4, atol=1e-4
  )
  np.testing.assert_array_equal(dmd.teacher_weights((), 1, 4, 2), 1.0)


@pytest.mark.parametrize(
  "table, message",
  [
    ((), r"shape \(2, 1, 2\)"),
    ([[[1.0, 1.0]]], r"shape \(2, 1, 2\)"),
    ([[[1.0, 1.0]], [[1.0]]], r"shape \(2, 1, 2\)"),
    ([[[0.6, 0.5]], [[0.5, 0.5]]], "must sum to one"),
  ],
)
def test_impossible_teacher_weights_are_refused(table, message):
  with pytest.raises(InputError, match=message):
    dmd.teacher_weights(table, 2, 1, 2)


@pytest.mark.parametrize("weight", dmd.WEIGHTS)
def test_an_affine_student_reaches_the_data(weight):
  """With exact scores the fixed point is exact: there the gradient is zero."""
  data = (1.5, 0.5)
  config = dmd.Times("logit_normal", 0.02, 0.98)
  tx = optax.adam(optax.cosine_decay_schedule(0.05, 800))

  def loss(p, key):
    k1, k2, k3 = jax.random.split(key, 3)
    x0 = p["mean"] + p["std"] * jax.random.normal(k1, (256, 1))
    sample = jax.lax.stop_gradient(x0)
    t_B = dmd.draw_times(k2, 256, config)
    x_t = path.interpolate(sample, jax.random.normal(k3, (256, 1)), t_B)
    fake = gaussian_velocity(x_t, t_B, p["mean"], p["std"])
    real = gaussian_velocity(x_t, t_B, *data)
    g = dmd.gradient(sample, x_t, t_B, fake, real, weight)
    return dmd.generator_loss(x0, jax.lax.stop_gradient(g)).mean()

  def step(carry, key):
    p, state = carry
    updates, state = tx.update(jax.grad(loss)(p, key), state, p)
    return (optax.apply_updates(p, updates), state), None

  @functools.partial(jax.jit, static_argnums=1)
  def run(p, count):
    keys = jax.random.split(jax.random.key(1), count)
    return jax.lax.scan(step, (p, tx.init(p)), keys)[0][0]

  p = run({"mean": jnp.zeros(()), "std": jnp.ones(())}, 800)
  assert float(p["mean"]) == pytest.approx(data[0], abs=1e-3)
  assert float(p["std"]) == pytest.approx(data[1], abs=1e-3)


def test_shifted_times_are_the_schedules_shift():
  config = dmd.Times("shifted", 0.1, 0.9, shift=2.0)
  uniform = dmd.Times("uniform", 0.1, 0.9)
  key = jax.random.key(3)
  expected = schedules.shift(dmd.draw_times(key, 64, uniform), np.log(2.0))
  np.testing.assert_allclose(
    dmd.draw_times(key, 64, config), np.clip(expected, 0.1, 0.9), rtol=1e-6
  )
