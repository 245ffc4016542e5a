# SPDX-License-Identifier: Apache-2.0
"""Token layout against a plain restatement and diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from qi2_jax.conditioning.layout import (
  build_layout,
  grid_positions,
  num_slots,
  prefix_length,
)
from qi2_jax.errors import InputError
from qi2_jax.models import rope
from qi2_jax.models.condition import Conditioning
from qi2_jax.models.mmdit import MMDiT

CASES = [
  ((), (4, 4)),
  ((), (2, 6)),
  ((), (5, 3)),  # targets may be odd
  (((4, 6),), (6, 4)),
  (((2, 2), (4, 2)), (8, 2)),
  (((2, 8), (2, 2), (6, 4)), (4, 4)),
]
AXES, THETA = (4, 6, 6), 10000.0


def make(references, target, words=5, padding=0):
  is_slot = tiny_models.slots_of(words, references)
  length = len(is_slot) + padding
  return is_slot, build_layout(is_slot, references, target, length)


def centred(size):
  """-size/2 ... size/2 - 1, one more below zero where size is odd."""
  return [i - (size + 1) // 2 for i in range(size)]


def restated(words, references, target):
  """(kind, index, image, position) of every token, by the written rule."""
  tokens, cursor, text, latent = [], 0, 0, 0

  def word():
    nonlocal cursor, text
    tokens.append((("text", text), -1, (cursor,) * 3))
    cursor, text = cursor + 1, text + 1

  word()
  word()
  for image, (h, w) in enumerate(references):
    word()
    for y in centred(h):
      for x in centred(w):
        tokens.append((("latent", latent), image, (cursor, y, x)))
        latent += 1
    cursor, text = cursor + max(h, w), text + h * w // 4
    word()
  for _ in range(words):
    word()
  h, w = target
  return tokens, [(cursor, y, x) for y in centred(h) for x in centred(w)]


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("references, target", CASES)
def test_layout_equals_the_written_rule(references, target, padding):
  is_slot, layout = make(references, target, padding=padding)
  tokens, target_positions = restated(5, references, target)
  count = len(tokens)
  length = len(is_slot) + padding
  assert layout.source_BP.shape == (prefix_length(length, references),)
  np.testing.assert_array_equal(np.flatnonzero(layout.valid_BP), range(count))
  sources = [i + length * (kind == "latent") for (kind, i), _, _ in tokens]
  np.testing.assert_array_equal(layout.source_BP[:count], sources)
  np.testing.assert_array_equal(
    layout.blocks_BP[:count], [b for _, b, _ in tokens]
  )
  np.testing.assert_array_equal(
    layout.positions_BP3[:count], [p for _, _, p in tokens]
  )
  np.testing.assert_array_equal(layout.target_positions_BN3, target_positions)


@pytest.mark.parametrize("references, target", CASES)
def test_layout_equals_diffusers(references, target):
  torch = pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  from diffusers.models.transformers import transformer_qwenimage21 as theirs

  _, layout = make(references, target, padding=4)
  shapes = [(1, *grid) for grid in (*references, target)]
  blocks = list(layout.blocks_BP[layout.valid_BP])
  blocks += [len(references)] * (target[0] * target[1])
  mask = torch.tensor(blocks) >= 0
  ids, is_target = theirs.QwenImage21Transformer2DModel.build_token_metadata(
    mask, shapes
  )
  np.testing.assert_array_equal(blocks, ids.numpy())
  assert is_target.sum() == target[0] * target[1]
  turns = theirs.QwenImage21Rope(int(THETA), list(AXES))(shapes, mask, "cpu")
  positions = np.concatenate(
    [layout.positions_BP3[layout.valid_BP], layout.target_positions_BN3]
  )
  angles = rope.angles(jnp.asarray(positions[None]), AXES, THETA)[0]
  np.testing.assert_allclose(np.exp(1j * angles), turns.numpy(), atol=1e-5)


def test_padding_never_moves_a_token():
  references, target = ((4, 2),), (4, 4)
  _, short = make(references, target)
  _, long = make(references, target, padding=9)
  count = short.valid_BP.size
  np.testing.assert_array_equal(long.positions_BP3[:count], short.positions_BP3)
  np.testing.assert_array_equal(
    long.target_positions_BN3, short.target_positions_BN3
  )
  np.testing.assert_array_equal(long.blocks_BP[:count], short.blocks_BP)


def test_padding_leaves_the_velocity_unchanged():
  model = MMDiT(tiny_models.MMDIT)
  params = tiny_models.mmdit_params(model)
  references, target, padding = ((4, 2),), (4, 4), 6
  cond = tiny_models.conditioning(
    model.config, words=(5, 5), references=references, target=target
  )
  x = tiny_models.noise(model.config, target=target)
  sigma = jnp.array([0.3, 0.8])
  apply = jax.jit(lambda c: model.apply({"params": params}, x, sigma, c))
  expected = apply(cond)

  def padded(layout):
    # Garbage, not zeros: nothing may read the padding.
    extra = 7 * jnp.ones((2, padding, model.config.context_dim))
    text = jnp.concatenate([cond.text_BTC, extra], axis=1)
    return apply(Conditioning(text, cond.references_BRZ, layout))

  length = cond.text_BTC.shape[1] + padding
  layout = tiny_models.layouts((5, 5), references, target, length)
  assert tiny_models.relative(padded(layout), expected) <= 1e-5
  # The public pipeline's batched path takes padding for text.
  wrong = tiny_models.layouts((5 + padding,) * 2, references, target, length)
  assert tiny_models.relative(padded(wrong), expected) > 1e-3
  shifted = layout.replace(target_positions_BN3=wrong.target_positions_BN3)
  assert tiny_models.relative(padded(shifted), expected) > 1e-3


def test_grids_are_centred():
  for grid in [(2, 2), (4, 6), (8, 2)]:
    positions = grid_positions(grid, 3)
    assert (positions[:, 0] == 3).all()
    np.testing.assert_array_equal(positions[:, 1:].sum(0) * 2, [
      -grid[0] * grid[1], -grid[0] * grid[1]
    ])  # fmt: skip


def test_bad_input_is_named():
  with pytest.raises(InputError, match="48 x 64 px is not a multiple"):
    num_slots((3, 4))
  with pytest.raises(InputError, match="1 image slots but the references"):
    build_layout([False, True], ((4, 4),), (2, 2), 4)
  with pytest.raises(InputError, match="1 image slots but the references"):
    build_layout([False, True], (), (2, 2), 4)
  with pytest.raises(InputError, match="exceeds the text length 4"):
    build_layout([False] * 5, (), (2, 2), 4)
