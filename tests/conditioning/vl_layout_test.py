# SPDX-License-Identifier: Apache-2.0
"""Host side of the encoder against the written rule, Pillow, transformers."""

import jax
import numpy as np
import pytest
from PIL import Image

from qi2_jax.conditioning.vl_layout import (
  normalise,
  over_white,
  text_positions,
)
from qi2_jax.errors import InputError

MEAN, STD = (0.5, 0.45, 0.4), (0.5, 0.3, 0.25)


def prompt(grids, words):
  """A word, every image in brackets, then `words` words."""
  is_slot = [False]
  for h, w in grids:
    is_slot += [False] + [True] * (h * w) + [False]
  return is_slot + [False] * words


def restated(grids, words):
  """(time, row, column, index) of every token, by the written rule."""
  tokens, cursor, count = [], 0, 0

  def word():
    nonlocal cursor
    tokens.append((cursor, cursor, cursor, -1))
    cursor += 1

  word()
  for h, w in grids:
    word()
    for row in range(h):
      for column in range(w):
        tokens.append((cursor, cursor + row, cursor + column, count))
        count += 1
    cursor += max(h, w)
    word()
  for _ in range(words):
    word()
  return np.array(tokens)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("grids", [(), ((2, 2),), ((1, 4), (5, 2), (3, 3))])
def test_positions_equal_the_written_rule(grids, padding):
  is_slot = prompt(grids, words=4)
  true = len(is_slot)
  positions, index = text_positions(is_slot, grids, true + padding)
  assert positions.dtype == index.dtype == np.int32
  expected = restated(grids, words=4)
  np.testing.assert_array_equal(positions[:, :true], expected[:, :3].T)
  np.testing.assert_array_equal(index[:true], expected[:, 3])
  assert positions.shape == (3, true + padding)
  assert not positions[:, true:].any()
  assert (index[true:] == -1).all()


def test_images_may_touch():
  positions, index = text_positions([True] * 5, [(2, 2), (1, 1)], 5)
  np.testing.assert_array_equal(positions[:, -1], [2, 2, 2])
  np.testing.assert_array_equal(index, range(5))


@pytest.mark.parametrize(
  "is_slot, grids, length, message",
  [
    ([False] * 3, (), 2, "3 tokens exceeds the text length 2"),
    ([False, True], ((2, 1),), 4, "1 image slots but its images need 2"),
    ([True, False], (), 4, "1 image slots but its images need 0"),
    ([True, False, True], ((2, 1),), 4, "image 1 needs 2 image slots in one"),
  ],
)
def test_disagreement_is_named(is_slot, grids, length, message):
  with pytest.raises(InputError, match=message):
    text_positions(is_slot, grids, length)


def test_over_white_equals_pillow_for_every_pixel():
  value, alpha = np.meshgrid(np.arange(256), np.arange(256))
  rgba = np.stack([value, 255 - value, value // 2, alpha], -1).astype(np.uint8)
  picture = Image.fromarray(rgba)
  white = Image.new("RGB", picture.size, (255, 255, 255))
  white.paste(picture, mask=picture.getchannel("A"))
  expected = np.asarray(white)
  assert len(np.unique(expected)) == 256
  ours = over_white(rgba)
  assert isinstance(ours, np.ndarray) and ours.dtype == np.uint8
  np.testing.assert_array_equal(ours, expected)
  inside = jax.jit(over_white)(rgba)
  assert inside.dtype == np.uint8
  np.testing.assert_array_equal(inside, expected)


def test_over_white_keeps_rgb_and_names_other_channels():
  rgb = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
  np.testing.assert_array_equal(over_white(rgb), rgb)
  with pytest.raises(InputError, match="2 channels"):
    over_white(rgb[..., :2])


def test_normalise_equals_the_published_processor():
  transformers = pytest.importorskip("transformers")
  values = np.arange(256, dtype=np.uint8).reshape(16, 16)
  rgb = np.stack([values, values[::-1], values.T], axis=-1)
  processor = transformers.Qwen2VLImageProcessorPil(
    patch_size=16, merge_size=1, image_mean=MEAN, image_std=STD,
    do_resize=False,
  )  # fmt: skip
  patch = processor([Image.fromarray(rgb)], return_tensors="np")
  patch = patch["pixel_values"].reshape(3, 2, 16, 16)
  ours = normalise(rgb, MEAN, STD)
  assert ours.dtype == np.float32
  for frame in (0, 1):
    np.testing.assert_array_equal(ours.transpose(2, 0, 1), patch[:, frame])
  inside = jax.jit(lambda x: normalise(x, MEAN, STD))(rgb)
  np.testing.assert_allclose(inside, ours, rtol=0, atol=1e-6)
