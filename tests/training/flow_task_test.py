# SPDX-License-Identifier: Apache-2.0
"""Dropped captions and references: how often, and that shapes stay."""

import numpy as np
import pytest

from qi2_jax.training.flow_task import drop_condition

REFERENCES = tuple(
  np.random.default_rng(i).integers(0, 256, (32 * i, 64, 4), np.uint8)
  for i in (1, 2)
)


def drop(seed, **rates):
  rates = {"caption_dropout": 0.0, "reference_dropout": 0.0} | rates
  rng = np.random.default_rng(seed)
  return drop_condition("a red circle", REFERENCES, rng, **rates)


def test_nothing_is_dropped_by_default():
  caption, references = drop(0)
  assert caption == "a red circle"
  for a, b in zip(references, REFERENCES, strict=True):
    np.testing.assert_array_equal(a, b)


def test_dropped_references_turn_white_and_keep_their_shapes():
  before = [r.copy() for r in REFERENCES]
  caption, references = drop(0, reference_dropout=1.0)
  assert caption == "a red circle"
  for a, b in zip(references, REFERENCES, strict=True):
    assert a.shape == b.shape and a.dtype == np.uint8
    assert (a == 255).all()
  for a, b in zip(before, REFERENCES):
    np.testing.assert_array_equal(a, b)
  assert drop(0, caption_dropout=1.0)[0] == ""


def test_rates_are_met_and_independent():
  rates = {"caption_dropout": 0.1, "reference_dropout": 0.3}
  drawn = [drop(seed, **rates) for seed in range(4000)]
  white = [[(r == 255).all() for r in images] for _, images in drawn]
  assert all(len(set(w)) == 1 for w in white)  # all of a sample, or none
  no_image = np.asarray([w[0] for w in white])
  no_text = np.asarray([caption == "" for caption, _ in drawn])
  # Four standard deviations of 4000 draws.
  assert no_text.mean() == pytest.approx(0.1, abs=0.019)
  assert no_image.mean() == pytest.approx(0.3, abs=0.029)
  assert (no_text & no_image).mean() == pytest.approx(0.03, abs=0.011)


def test_captions_are_dropped_alike_with_and_without_reference_dropout():
  one, other = (
    [drop(s, caption_dropout=0.5, reference_dropout=r)[0] for s in range(50)]
    for r in (0.0, 0.9)
  )
  assert one == other and len(set(one)) == 2
