# SPDX-License-Identifier: Apache-2.0
"""DiffusionNFT: its fixed point by quadrature, and what teaches nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from qi2_jax.flow import path
from qi2_jax.objectives import nft

RNG = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def good(x0):
  """r of an image: better the larger it is."""
  return 1.0 / (1.0 + np.exp(-3.0 * x0))


def conditional_means(x_t, t):
  """`(E[u | x_t], E[r u | x_t], E[r | x_t])` for x0 ~ N(0, 1), by sums."""
  x0 = np.linspace(-6, 6, 4001)[:, None]
  weight = scipy.stats.norm.pdf(x0) * scipy.stats.norm.pdf(
    x_t, (1 - t) * x0, t
  )  # fmt: skip
  weight /= weight.sum(axis=0)
  u = (x_t - x0) / t
  return [(weight * f).sum(axis=0) for f in (u, good(x0) * u, good(x0))]


@pytest.mark.parametrize(
  "t, beta, bound",
  [(0.2, 1.0, 0.2), (0.5, 1.0, 0.06), (0.8, 1.0, 0.03), (0.5, 0.5, 0.06)],
)
def test_the_fixed_point_is_the_derived_one(t, beta, bound):
  """One free velocity per bin of x_t, trained on samples."""
  edges = np.linspace(-1.5, 1.5, 13)
  centres = (edges[:-1] + edges[1:]) / 2
  v_old, r_u, r = conditional_means(centres, t)
  expected = v_old + 2 / beta * (r_u - r * v_old)
  x0, eps = RNG.normal(size=(2, 400_000)).astype(np.float32)
  x_t = (1 - t) * x0 + t * eps
  bins = np.digitize(x_t, edges) - 1
  inside = (bins >= 0) & (bins < 12)
  x0, eps, x_t, bins = x0[inside], eps[inside], x_t[inside], bins[inside]
  # The exact old velocity of each sample: a bin's own would blur it.
  slope = (t - (1 - t)) / ((1 - t) ** 2 + t**2)
  arrays = slope * x_t, eps - x0, good(x0)
  old_B, target_B, r_B = (jnp.asarray(a, jnp.float32) for a in arrays)
  count = jnp.asarray(np.bincount(bins, minlength=12), jnp.float32)

  @jax.jit
  def slopes(change):
    def loss(change):
      v = (old_B + change[bins])[:, None]
      each = nft.velocity_loss(
        v, old_B[:, None], target_B[:, None], r_B, beta
      )  # fmt: skip
      return jnp.sum(each)

    return jax.grad(loss)(change) / count

  # Quadratic with curvature 2 beta^2: one Newton step solves it.
  zero = jnp.zeros(12)
  change = -slopes(zero) / (2 * beta**2)
  np.testing.assert_allclose(slopes(change), 0, atol=1e-3)
  truth = expected - v_old
  error = np.linalg.norm(change - truth) / np.linalg.norm(truth)
  assert error <= bound


def test_a_reward_of_one_half_teaches_nothing():
  v, x0, eps = normal(5, 3), normal(5, 3), normal(5, 3)
  t_B = jnp.linspace(0.1, 0.9, 5)
  x_t, target = path.interpolate(x0, eps, t_B), eps - x0
  half = jnp.full(5, 0.5)

  def plain(v_new):
    return nft.velocity_loss(v_new, v, target, half, 1.0).sum()

  def weighted(v_new):
    return nft.data_loss(x_t, x0, t_B, v_new, v, half, 1.0).sum()

  for loss in (plain, weighted):
    assert np.abs(jax.grad(loss)(v)).max() < 1e-6
  # A good image pulls, a bad one pushes, equally far.
  pull, push = (
    jax.grad(
      lambda v_new, r=r: nft.velocity_loss(
        v_new, v, target, jnp.full(5, r), 1.0
      ).sum()
    )(v)
    for r in (1.0, 0.0)
  )
  np.testing.assert_allclose(pull, -push, rtol=1e-5)
  assert np.all(np.sum(-pull * (target - v), axis=1) > 0)


def test_the_old_policy_gets_no_gradient():
  v, v_old, target = normal(2, 3), normal(2, 3), normal(2, 3)
  r_B = jnp.asarray([0.2, 0.9])
  grads = jax.grad(
    lambda old: nft.velocity_loss(v, old, target, r_B, 0.5).sum()
  )(v_old)
  assert not np.any(grads)


def test_both_losses_by_hand():
  x0, eps, v, v_old = (normal(3, 4) for _ in "abcd")
  t_B, r_B = jnp.asarray([0.2, 0.5, 0.9]), jnp.asarray([0.1, 0.6, 1.0])
  x_t = path.interpolate(x0, eps, t_B)
  beta, t, u = 0.5, np.asarray(t_B)[:, None], eps - x0
  plus, minus = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
  square = [np.mean(np.square(b - u), axis=1) for b in (plus, minus)]
  found = nft.velocity_loss(v, v_old, u, r_B, beta)
  np.testing.assert_allclose(
    found, r_B * square[0] + (1 - r_B) * square[1], rtol=1e-5
  )
  gaps = [np.asarray(x_t - t * b - x0) for b in (plus, minus)]
  each = [(g**2).mean(axis=1) / np.abs(g).mean(axis=1) for g in gaps]
  found = nft.data_loss(x_t, x0, t_B, v, v_old, r_B, beta)
  np.testing.assert_allclose(
    found, (r_B * each[0] + (1 - r_B) * each[1]) / beta, rtol=1e-4
  )
  # The divisor has no gradient of its own.
  slope = jax.grad(
    lambda v_new: nft.data_loss(x_t, x0, t_B, v_new, v, r_B * 0 + 1, 1.0).sum()
  )(v)
  gap = x_t - t * v - x0
  size = np.abs(gap).mean(axis=1, keepdims=True)
  np.testing.assert_allclose(slope, -2 * t * gap / 4 / size, rtol=1e-3)
  # An exact estimate does not divide by zero.
  assert np.isfinite(nft.data_loss(x_t, x0, t_B, u, u, r_B, beta)).all()


def test_optimality_and_the_old_policys_decay():
  found = nft.optimality(jnp.asarray([-9.0, -2.5, 0, 1, 9]))
  np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.6, 1])
  decays = [float(nft.old_decay(i)) for i in (0, 100, 500, 10_000)]
  np.testing.assert_allclose(decays, [0, 0.1, 0.5, 0.5], rtol=1e-6)
