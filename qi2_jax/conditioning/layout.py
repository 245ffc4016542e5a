# SPDX-License-Identifier: Apache-2.0
"""Token layout of one sample, on the host, from its true text length.

The joint sequence is the text tokens in order, each reference image's
latents in place of its run of encoder slots, the target last. A slot stands
for 2x2 latents. Text token p sits at (p, p, p); an h x w image freezes the
frame axis at the cursor, is centred on zero in rows and columns, and moves
the cursor on by max(h, w).
"""

from collections.abc import Sequence

import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.models.condition import Layout

Grid = tuple[int, int]
LATENTS_PER_SLOT = 4
# Rows of the public model's position table. Our angles are computed, so
# nothing wraps, but beyond it no released weight was ever trained.
MAX_POSITION = 8192


def grid_positions(grid: Grid, frame: int) -> np.ndarray:
  """Positions of an image's latents, row-major: int32 `[h * w, 3]`."""
  h, w = grid
  rows = np.arange(h) - (h - h // 2)
  columns = np.arange(w) - (w - w // 2)
  out = np.empty((h, w, 3), np.int32)
  out[..., 0] = frame
  out[..., 1] = rows[:, None]
  out[..., 2] = columns[None, :]
  return out.reshape(h * w, 3)


def num_slots(grid: Grid) -> int:
  """Encoder slots of a reference image on an h x w latent grid.

  Raises:
    InputError: the grid is odd, i.e. the image is no multiple of 32 px.
  """
  if grid[0] % 2 or grid[1] % 2:
    raise InputError(
      f"a reference image of {grid[0] * 16} x {grid[1] * 16} px is not a "
      "multiple of 32 px on both sides; resize it."
    )
  return grid[0] * grid[1] // LATENTS_PER_SLOT


def prefix_length(text_length: int, references: Sequence[Grid]) -> int:
  """Prefix tokens P for `text_length` encoder tokens including slots."""
  slots = sum(num_slots(g) for g in references)
  return text_length + sum(h * w for h, w in references) - slots


def _check_end(position: int) -> None:
  if position >= MAX_POSITION:
    raise InputError(
      f"the prompt and its references end at position {position}, but the "
      f"model's position table has {MAX_POSITION} rows; shorten the prompt."
    )


def build_layout(
  is_slot: Sequence[bool], references: Sequence[Grid], target: Grid,
  text_length: int,
) -> Layout:  # fmt: skip
  """Lays out one sample.

  Args:
    is_slot: per true encoder token (after the dropped system turn), whether
      it is an image slot.
    references: latent grids of the reference images, in prompt order.
    target: latent grid of the target image.
    text_length: padded number of encoder tokens T.

  Returns:
    Layout of numpy arrays without a batch axis.

  Raises:
    InputError: slots and references disagree, the text is longer than
      `text_length`, or it ends beyond `MAX_POSITION`.
  """
  if len(is_slot) > text_length:
    raise InputError(
      f"a prompt of {len(is_slot)} tokens exceeds the text length "
      f"{text_length}; shorten it or raise config.text.length."
    )
  slots = [num_slots(g) for g in references]
  if sum(is_slot) != sum(slots):
    raise InputError(
      f"the prompt has {sum(is_slot)} image slots but the references need "
      f"{sum(slots)}."
    )
  length = prefix_length(text_length, references)
  source = np.zeros(length, np.int32)
  blocks = np.full(length, -1, np.int32)
  positions = np.zeros((length, 3), np.int32)
  cursor = token = out = image = latents = 0
  while token < len(is_slot):
    if not is_slot[token]:
      source[out], positions[out] = token, cursor
      token, out, cursor = token + 1, out + 1, cursor + 1
      continue
    grid = references[image]
    span = slice(out, out + grid[0] * grid[1])
    source[span] = text_length + latents + np.arange(grid[0] * grid[1])
    positions[span] = grid_positions(grid, cursor)
    blocks[span] = image
    token += slots[image]
    out, latents = span.stop, latents + grid[0] * grid[1]
    cursor, image = cursor + max(grid), image + 1
  _check_end(cursor)
  return Layout(
    source_BP=source,
    blocks_BP=blocks,
    valid_BP=np.arange(length) < out,
    positions_BP3=positions,
    target_positions_BN3=grid_positions(target, cursor),
  )
