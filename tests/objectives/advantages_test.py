# SPDX-License-Identifier: Apache-2.0
"""Advantages by hand; missing rewards; groups that teach nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.objectives import advantages as adv

REWARDS = np.asarray(
  [
    [[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 1.0]],
    [[0.1, 0.3, 0.1, 0.3], [0.2, 0.4, 0.6, 0.8], [7.0, 7.0, 7.0, 7.0]],
  ]
)
ALL = np.ones((3, 4), bool)
ONE = np.ones((2, 3))


def test_one_reward_by_hand():
  # Group 0: mean 3, deviations -2 -1 0 3, std sqrt(14 / 4).
  # Group 2: mean 1/4, std sqrt(3) / 4.
  out, kept = adv.advantages(REWARDS[:1], ONE[:1], ALL)
  root = 3**0.5
  expected = [
    np.asarray([-2, -1, 0, 3]) / 3.5**0.5, np.zeros(4),
    np.asarray([-1, -1, -1, 3]) / root,
  ]  # fmt: skip
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(kept, [True, False, True])


def test_batch_scale_uses_the_std_of_all_images():
  out, kept = adv.advantages(REWARDS[:1], ONE[:1], ALL, scale="batch")
  centred = REWARDS[0] - REWARDS[0].mean(axis=1, keepdims=True)
  np.testing.assert_allclose(
    out, centred / REWARDS[0].std(), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(kept, [True, False, True])


@pytest.mark.parametrize("scale", adv.SCALES)
def test_several_rewards_are_weighted_after_their_own_scaling(scale):
  weights = np.asarray([[1.0, 1.0, 0.5], [2.0, 3.0, 1.0]])
  out, kept = adv.advantages(REWARDS, weights, ALL, scale=scale)
  spread = REWARDS.std(axis=2, keepdims=True)
  centred = REWARDS - REWARDS.mean(axis=2, keepdims=True)
  if scale == "batch":
    spread = np.where(spread > 0, REWARDS.std(axis=(1, 2), keepdims=True), 0)
  z = np.divide(
    centred, spread, out=np.zeros_like(centred),
    where=np.broadcast_to(spread > 1e-9, centred.shape),
  )  # fmt: skip
  np.testing.assert_allclose(
    out, (weights[:, :, None] * z).sum(axis=0), rtol=1e-4, atol=1e-5
  )
  assert kept.all()
  # The unit of a reward does not matter.
  units = np.asarray([100.0, 1e-3])[:, None, None]
  other, _ = adv.advantages(REWARDS * units, weights, ALL, scale=scale)
  np.testing.assert_allclose(other, out, rtol=1e-4, atol=1e-5)


def test_missing_rewards_count_for_nothing():
  valid = ALL.copy()
  valid[0, 3] = valid[1, 0] = False
  holes = np.where(valid, REWARDS[:1], np.nan)
  out, kept = adv.advantages(holes, ONE[:1], valid)
  root = (2 / 3) ** 0.5
  np.testing.assert_allclose(out[0], [-1 / root, 0, 1 / root, 0], atol=1e-6)
  assert np.isfinite(out).all() and not np.any(out[1])
  np.testing.assert_array_equal(kept, [True, False, True])
  alone = np.zeros((3, 4), bool)
  alone[:, 0] = True
  out, kept = adv.advantages(REWARDS[:1], ONE[:1], alone)
  assert not np.any(out) and not kept.any()


def test_weights_of_rows_have_mean_one_over_what_counts():
  valid = ALL.copy()
  valid[0, 3] = False
  kept = np.asarray([True, False, True])
  weights = adv.row_weights(kept, valid)
  np.testing.assert_allclose(np.mean(weights), 1.0, rtol=1e-6)
  np.testing.assert_array_equal(weights > 0, valid & kept[:, None])
  assert len(np.unique(np.asarray(weights))) == 2
  nothing = adv.row_weights(np.zeros(3, bool), valid)
  assert not np.any(nothing)


def test_rounding_is_no_variance():
  noise = np.random.default_rng(0).normal(size=(1, 1, 4)) * 1e-8
  out, kept = adv.advantages(
    np.float32(0.7) + noise, np.ones((1, 1)), np.ones((1, 4), bool)
  )
  assert not np.any(out) and not kept.any()


def test_outliers_are_clipped():
  rewards = np.zeros((1, 1, 101))
  rewards[..., 0] = 1.0
  valid = np.ones((1, 101), bool)
  out, _ = adv.advantages(rewards, np.ones((1, 1)), valid)
  assert float(out.max()) == 5.0
  out, _ = adv.advantages(rewards, np.ones((1, 1)), valid, clip=20.0)
  np.testing.assert_allclose(out.max(), 10.0, rtol=1e-4)


def test_groups_may_lie_on_any_devices():
  mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  rewards = np.random.default_rng(1).normal(size=(2, 2, 8)).astype(np.float32)
  valid = np.ones((2, 8), bool)
  whole, _ = adv.advantages(rewards, np.ones((2, 2)), valid)
  # Members of one group on eight devices.
  split = jax.NamedSharding(mesh, jax.P(None, None, "d"))
  placed = jax.device_put(jnp.asarray(rewards), split)
  out, _ = jax.jit(adv.advantages)(placed, jnp.ones((2, 2)), valid)
  np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-6)
