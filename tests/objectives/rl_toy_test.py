# SPDX-License-Identifier: Apache-2.0
"""Reinforcement on eight Gaussians: reward rises, samples stay samples."""

import jax
import numpy as np
import pytest
import rl_toy as toy

ALL, PAIR = toy.classes(2000, False), toy.classes(2000, True)
RIGHT = [0, 1, 6, 7]


def outcome(params, class_B=ALL, guidance=None):
  return toy.judge(toy.samples(params, class_B, guidance), class_B)


def balance(shares):
  """Smallest over largest share of a right-hand mode."""
  return shares[RIGHT].min() / shares[RIGHT].max()


def test_the_start_is_the_data():
  start = toy.init(jax.random.key(0))
  reward, inside, shares = outcome(start)
  assert reward == pytest.approx(0.5, abs=0.05)
  assert inside > 0.99 and balance(shares) > 0.7


def test_grpo_raises_the_reward():
  reward, inside, _ = outcome(toy.grpo(0))
  assert reward >= 0.95 and inside >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guard", [False, True])
def test_grpo_on_three_seeds(seed, guard):
  reward, inside, _ = outcome(toy.grpo(seed, guard=guard))
  assert reward >= 0.95 and inside >= 0.95


@pytest.mark.slow
def test_a_flipped_sign_does_the_opposite():
  assert outcome(toy.grpo(0, sign=-1.0))[0] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hybrid", ["frozen_uncond", "full", "none"])
def test_every_hybrid_learns(seed, hybrid):
  params = toy.grpo(seed, hybrid=hybrid, guidance=2.0, conditional=True)
  guidance = None if hybrid == "none" else 2.0
  reward, inside, _ = outcome(params, PAIR, guidance)
  assert reward >= 0.9 and inside >= 0.95


@pytest.mark.slow
def test_a_penalty_keeps_the_modes_balanced():
  plain = outcome(toy.grpo(0))
  kept = outcome(toy.grpo(0, kl_weight=0.3, kl="gaussian"))
  assert kept[0] >= 0.9
  assert balance(kept[2]) >= 0.55 and balance(plain[2]) <= 0.45


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_nft_raises_the_reward(seed):
  reward, inside, shares = outcome(toy.nft_train(seed))
  assert reward >= 0.95 and inside >= 0.95
  # Without the term that pushes away it forgets modes.
  alone = outcome(toy.nft_train(seed, negative=False))[2]
  assert np.sum(alone[RIGHT] > 0.02) < np.sum(shares[RIGHT] > 0.02)
