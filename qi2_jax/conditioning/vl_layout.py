# SPDX-License-Identifier: Apache-2.0
"""What the Qwen3-VL encoder is told about one sample, on the host.

Text token p sits at (p, p, p). The slots of an image on an h x w grid of
merged tokens sit at (cursor, cursor + row, cursor + column), and the cursor
moves on by max(h, w): `get_rope_index` of transformers for images.
"""

from collections.abc import Sequence

import numpy as np

from qi2_jax.errors import InputError

Grid = tuple[int, int]


def _image_positions(grid: Grid, cursor: int) -> np.ndarray:
  """Positions of an image's slots, row-major: `[3, h * w]`."""
  h, w = grid
  rows, columns = np.divmod(np.arange(h * w), w)
  return cursor + np.stack([np.zeros(h * w, int), rows, columns])


def text_positions(
  is_slot: Sequence[bool], grids: Sequence[Grid], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Positions and image indices of one sample, padded on the right.

  Args:
    is_slot: per true token, whether it is an image slot.
    grids: grid of merged tokens of each image, in prompt order.
    length: padded number of tokens T.

  Returns:
    `(positions, image_index)`: int32 `[3, T]`, 0 on padding, and int32
    `[T]`, the index into the row's image tokens, -1 at text and padding.

  Raises:
    InputError: slots and grids disagree, or the text is too long.
  """
  slots = np.asarray(is_slot, bool)
  if len(slots) > length:
    raise InputError(
      f"a prompt of {len(slots)} tokens exceeds the text length {length}; "
      "shorten it or raise config.text.length."
    )
  needed = sum(h * w for h, w in grids)
  if slots.sum() != needed:
    raise InputError(
      f"the prompt has {slots.sum()} image slots but its images need {needed}."
    )
  positions = np.zeros((3, length), np.int32)
  image_index = np.full(length, -1, np.int32)
  image_index[: len(slots)][slots] = np.arange(needed)
  token = cursor = image = 0
  while token < len(slots):
    if not slots[token]:
      positions[:, token] = cursor
      token, cursor = token + 1, cursor + 1
      continue
    grid = grids[image]
    end = token + grid[0] * grid[1]
    if not slots[token:end].all():
      raise InputError(
        f"image {image + 1} needs {end - token} image slots in one run, but "
        "text interrupts them."
      )
    positions[:, token:end] = _image_positions(grid, cursor)
    token, cursor, image = end, cursor + max(grid), image + 1
  return positions, image_index


def over_white(image):
  """Composites an image over white, to the bit as Pillow's `paste`.

  Works on numpy and JAX arrays; Pillow itself does not run inside jit.

  Args:
    image: uint8 `[..., 4]`, or `[..., 3]`, which is returned as it is.

  Returns:
    uint8 `[..., 3]`.

  Raises:
    InputError: for another number of channels.
  """
  if image.shape[-1] == 3:
    return image
  if image.shape[-1] != 4:
    raise InputError(
      f"a condition image has {image.shape[-1]} channels; give RGB or RGBA."
    )
  colour = image[..., :3].astype(np.int32)
  alpha = image[..., 3:].astype(np.int32)
  x = 255 * (255 - alpha) + colour * alpha + 128
  return (((x >> 8) + x) >> 8).astype(np.uint8)


def normalise(image, mean: Sequence[float], std: Sequence[float]):
  """`(image / 255 - mean) / std` in fp32, per channel.

  Works on numpy and JAX arrays; on numpy it equals transformers'
  `Qwen2VLImageProcessorPil` to the bit.

  Args:
    image: uint8 RGB `[..., 3]`.
    mean: of each channel, on the scale [0, 1].
    std: of each channel, on the scale [0, 1].
  """
  tail = (1,) * (image.ndim - 1) + (3,)
  mean, std = (np.asarray(x, np.float32).reshape(tail) for x in (mean, std))
  return (image.astype(np.float32) / np.float32(255) - mean) / std
