# SPDX-License-Identifier: Apache-2.0
"""Prompts that teach come more often; the same choice after a restart."""

import json

import numpy as np
import pytest

from qi2_jax.errors import InputError
from qi2_jax.training.prompt_choice import PromptChoice, name_of

NAMES = [f"p{i}" for i in range(8)]


def share(choice, name, count=2, draws=400):
  hits = [
    NAMES.index(name) in choice.choose(NAMES, count, np.random.default_rng(i))
    for i in range(draws)
  ]
  return np.mean(hits)


def test_fresh_prompts_are_drawn_alike_and_once_each():
  choice = PromptChoice(0.1)
  for name in NAMES:
    assert share(choice, name) == pytest.approx(0.25, abs=0.07)
  at = choice.choose(NAMES, 8, np.random.default_rng(0))
  np.testing.assert_array_equal(at, np.arange(8))


def test_solved_and_hopeless_prompts_are_rare_but_not_gone():
  choice = PromptChoice(0.1)
  rewards = np.zeros((1, 8, 4))
  rewards[0, 1] = 1.0  # solved; 0 is hopeless
  rewards[0, 2:, 0] = 1.0
  rewards[0, 3, 2] = np.nan
  choice.learn(NAMES, rewards)
  for name in NAMES[:2]:
    assert 0.0 < share(choice, name) < 0.1
  assert share(choice, "p3") > 0.25
  # A prompt that teaches again comes back.
  rewards[0, 0, 1] = 1.0
  choice.learn(NAMES[:1], rewards[:, :1])
  assert share(choice, "p0") > 0.2


def test_several_rewards_count_on_average_and_units_do_not_matter():
  rewards = np.random.default_rng(0).normal(size=(2, 8, 4))
  one, other = PromptChoice(0.1), PromptChoice(0.1)
  one.learn(NAMES, rewards)
  other.learn(NAMES, rewards * np.asarray([1e3, 1e-3])[:, None, None])
  assert one.record() == other.record()
  span = np.ptp(rewards, axis=2) / np.ptp(rewards, axis=(1, 2))[:, None]
  np.testing.assert_allclose(
    [one.record()[n] for n in NAMES], span.mean(axis=0), atol=1e-4
  )
  nothing = PromptChoice(0.1)
  nothing.learn(NAMES, np.full((1, 8, 4), np.nan))
  assert set(nothing.record().values()) == {0.0}


def test_a_restart_goes_on_with_the_same_choices():
  choice = PromptChoice(0.1)
  choice.learn(NAMES, np.random.default_rng(0).normal(size=(1, 8, 4)))
  again = PromptChoice(0.1, json.loads(json.dumps(choice.record())))
  for i in range(20):
    picks = [
      c.choose(NAMES, 3, np.random.default_rng(i)) for c in (choice, again)
    ]
    np.testing.assert_array_equal(*picks)


def test_names_tell_prompts_and_references_apart():
  image = np.zeros((4, 4, 3), np.uint8)
  names = {
    name_of("a", ()), name_of("b", ()), name_of("a", (image,)),
    name_of("a", (image + np.uint8(1),)),
  }  # fmt: skip
  assert len(names) == 4 and name_of("a", (image,)) in names
  with pytest.raises(InputError, match="prompt_floor"):
    PromptChoice(0.0)
