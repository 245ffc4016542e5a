# SPDX-License-Identifier: Apache-2.0
"""Templates, the embedded encoder and prompt truncation."""

import jax
import numpy as np
import pytest

from qi2_jax.conditioning import templates, tokenizer, vl_layout
from qi2_jax.conditioning.encoder import (
  built_in,
  num_system_tokens,
  prompt_tokens,
)
from qi2_jax.errors import InputError

ENCODER, PARAMS = built_in(32)
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


def batch(texts, images=()):
  """Stacked arrays of right-padded raw texts and equal images per row."""
  ids = [ENCODER.tokenize(text) for text in texts]
  length = max(map(len, ids))
  cells = [(i.shape[0] // 32, i.shape[1] // 32) for i in images]
  rows = []
  for row in ids:
    is_slot = [token == ENCODER.slot_id for token in row]
    positions, index = vl_layout.text_positions(is_slot, cells, length)
    padded = np.zeros(length, np.int32)
    padded[: len(row)] = row
    rows.append((padded, np.arange(length) < len(row), positions, index))
  columns = [np.stack(column) for column in zip(*rows)]
  names = ("ids", "ids_valid", "positions", "image_index")
  stacked = tuple(np.stack([image] * len(texts)) for image in images)
  return dict(zip(names, columns)) | {"references": stacked}


STATES = jax.jit(ENCODER.states)


def test_a_state_is_mostly_its_own_word():
  """The model must tell words apart although the weights are random."""
  made = batch(["a red circle", "two red blue green crosses", "the blue cat"])
  states = np.asarray(STATES(PARAMS, made))
  rows = states[made["ids_valid"]]
  words = made["ids"][made["ids_valid"]]
  unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
  cosine = unit @ unit.T
  same = words[:, None] == words[None]
  assert cosine[same].min() > 0.8 and cosine[~same].max() < 0.7


def test_states_do_not_see_later_words():
  made = batch(["a red circle", "a red square"])
  states = np.asarray(STATES(PARAMS, made))
  np.testing.assert_allclose(states[0, :2], states[1, :2], atol=1e-5)
  assert np.abs(states[0, 2] - states[1, 2]).max() > 0.1


def test_the_same_encoder_is_built_every_time():
  _, again = built_in(32)
  jax.tree.map(np.testing.assert_array_equal, PARAMS, again)


def test_transparent_references_are_seen_over_white():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (32, 64, 4), np.uint8)
  text = ["x <|image_pad|><|image_pad|> y"]
  clear = image.copy()
  clear[..., 3] = 0
  white = np.full_like(image[..., :3], 255)
  a = STATES(PARAMS, batch(text, [clear]))
  b = STATES(PARAMS, batch(text, [white]))
  c = STATES(PARAMS, batch(text, [image]))
  np.testing.assert_allclose(a, b, atol=1e-6)
  assert np.abs(a - c).max() > 1e-3


def test_system_tokens_are_the_leading_turn():
  ids, _ = prompt_tokens(ENCODER, "x", [], 64)
  count = num_system_tokens(ENCODER)
  assert ids[:count] == ENCODER.tokenize(templates.SYSTEM)
  assert ids[count:] == ENCODER.tokenize(
    templates.HEADER + "x" + templates.FOOTER
  )


def test_the_system_turn_is_what_a_chat_template_makes_of_it():
  """diffusers counts the dropped tokens by rendering the system message."""
  text = templates.SYSTEM.split("\n", 1)[1].removesuffix("<|im_end|>\n")
  for content in (text, [{"type": "text", "text": text}]):
    ids = tokenizer.built_in().apply_chat_template(
      [{"role": "system", "content": content}], return_dict=False
    )
    assert len(ids) == num_system_tokens(ENCODER)


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
  ids, cut = prompt_tokens(ENCODER, " red" * words, [], 24)
  assert len(ids) <= num_system_tokens(ENCODER) + 24
  assert ids[-len(FOOTER) :] == FOOTER
  bare, _ = prompt_tokens(ENCODER, "", [], 24)
  assert len(ids) + cut == len(bare) - 1 + max(words, 1)


@pytest.mark.parametrize("slots, length", [([], 3), ([40], 30), ([9, 30], 55)])
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
