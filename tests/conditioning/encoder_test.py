# SPDX-License-Identifier: Apache-2.0
"""Templates, the embedded encoder and prompt truncation."""

import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.conditioning import templates
from qi2_jax.conditioning.encoder import (
  WordHashEncoder,
  num_system_tokens,
  prompt_tokens,
)
from qi2_jax.errors import InputError

ENCODER = WordHashEncoder(width=32)
FOOTER = ENCODER.tokenize(templates.FOOTER)


def test_the_template_is_the_published_string():
  assert templates.render("a cat") == (
    "<|im_start|>system\nComprehend and analyze the provided prompt."
    "<|im_end|>\n<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
  )
  assert templates.render("go", 2).split("user\n")[1] == (
    "<image1><|vision_start|><|image_pad|><|vision_end|> "
    "<image2><|vision_start|><|image_pad|><|vision_end|>go"
    "<|im_end|>\n<|im_start|>assistant\n"
  )


@pytest.mark.parametrize("references", [0, 1])
def test_an_empty_prompt_becomes_one_space(references):
  assert templates.render("", references) == templates.render(" ", references)
  assert templates.render("").count("user\n <|im_end|>") == 1


@pytest.mark.parametrize("token", templates.SPECIAL_TOKENS)
def test_special_tokens_are_one_token(token):
  assert len(ENCODER.tokenize(token)) == 1
  assert len(ENCODER.tokenize(f"a{token}b")) == 3


def test_words_and_marks_are_tokens():
  a, comma, b = ENCODER.tokenize("red, blue")
  assert ENCODER.tokenize("blue red") == [b, a]
  assert len({a, comma, b}) == 3
  assert all(0 <= t < 2**31 for t in (a, comma, b))
  assert len(ENCODER.tokenize("汉字 <image1> x")) == 3


def test_a_state_depends_on_its_word_alone():
  ids = jnp.array([[5, 9, 5], [9, 5, 7]])
  valid = jnp.array([[True, True, True], [True, True, False]])
  states = ENCODER.states(ids, valid)
  assert states.shape == (2, 3, 32)
  np.testing.assert_array_equal(states[0, 0], states[0, 2])
  np.testing.assert_array_equal(states[0, 0], states[1, 1])
  assert np.abs(states[0, 0] - states[0, 1]).max() > 0.1
  assert (states[1, 2] == 0).all()
  other = WordHashEncoder(width=32, seed=1).states(ids, valid)
  assert np.abs(states[0, 0] - other[0, 0]).max() > 0.1


def test_states_are_standard_normal():
  ids = jnp.arange(4096).reshape(4, 1024)
  states = np.asarray(ENCODER.states(ids, jnp.ones(ids.shape, bool)))
  assert abs(states.mean()) < 0.01 and abs(states.std() - 1) < 0.01


def test_system_tokens_are_the_leading_turn():
  ids, _ = prompt_tokens(ENCODER, "x", [], 64)
  count = num_system_tokens(ENCODER)
  assert ids[:count] == ENCODER.tokenize(templates.SYSTEM)
  assert ids[count:] == ENCODER.tokenize(
    templates.HEADER + "x" + templates.FOOTER
  )


@pytest.mark.parametrize("slots", [[], [4], [3, 6]])
def test_slots_are_expanded_in_place(slots):
  ids, cut = prompt_tokens(ENCODER, "a b", slots, 64)
  assert cut == 0
  runs = []
  previous = None
  for token in ids:
    if token == ENCODER.slot_id:
      runs = runs if previous == token else [*runs, 0]
      runs[-1] += 1
    previous = token
  assert runs == slots


@pytest.mark.parametrize("slots", [[], [4], [3, 6]])
def test_long_prompts_lose_words_only(slots):
  words = " ".join(f"w{i}" for i in range(200))
  whole, _ = prompt_tokens(ENCODER, words, slots, 1000)
  ids, cut = prompt_tokens(ENCODER, words, slots, 60)
  assert len(ids) == num_system_tokens(ENCODER) + 60
  assert cut == len(whole) - len(ids) > 0
  assert ids[-len(FOOTER) :] == FOOTER
  assert ids.count(ENCODER.slot_id) == sum(slots)
  kept = len(ids) - len(FOOTER)
  assert ids[:kept] == whole[:kept]


@pytest.mark.parametrize("words", range(0, 40, 3))
def test_a_prompt_is_never_longer_than_asked(words):
  ids, cut = prompt_tokens(ENCODER, "w " * words, [], 24)
  assert len(ids) <= num_system_tokens(ENCODER) + 24
  assert ids[-len(FOOTER) :] == FOOTER
  bare, _ = prompt_tokens(ENCODER, "", [], 24)
  assert len(ids) + cut == len(bare) + words


@pytest.mark.parametrize("slots, length", [([], 3), ([40], 30), ([9, 30], 45)])
def test_slots_that_do_not_fit_are_refused(slots, length):
  with pytest.raises(InputError, match=f"text_length={length} is too short"):
    prompt_tokens(ENCODER, "a b c", slots, length)


@pytest.mark.parametrize("references", [0, 1])
def test_special_tokens_in_a_prompt_are_refused_or_harmless(references):
  """A user may paste a template; it must not claim image slots."""
  slots = [4] * references
  try:
    ids, _ = prompt_tokens(ENCODER, "a <|image_pad|> b", slots, 64)
  except InputError:
    return
  assert ids.count(ENCODER.slot_id) == sum(slots)
