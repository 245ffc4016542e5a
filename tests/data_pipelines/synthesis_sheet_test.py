# SPDX-License-Identifier: Apache-2.0
"""The page of samples."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.synthesis import contact_sheet, generate
from data_pipelines.synthesis.sample import Rejected

CELL, GAP = 96, 8
OPTIONS = generate.Options(
  1, ("pure", "composed"), ("en",), sizes=((192, 128),), seed=1
)


def cells_of(page, count):
  """The samples' pixels, left to right."""
  left, top, high = 34 + GAP, 34, CELL * 128 // 192
  starts = (left + k * (CELL + GAP) for k in range(count))
  return [page[top : top + high, x : x + CELL].astype(int) for x in starts]


def test_page_holds_the_samples_of_every_strategy(tmp_path):
  path = tmp_path / "sheet.png"
  page = np.array(contact_sheet.contact_sheet(path, OPTIONS, each=2, cell=CELL))
  # The file is rounded to 32 steps per channel.
  stored = np.array(Image.open(path)).astype(int)
  assert abs(stored - page).max() <= 5
  job = generate.prepare(OPTIONS)
  cells = cells_of(page, 4)
  for i, (strategy, k) in enumerate(
    (s, k) for s in OPTIONS.strategies for k in range(2)
  ):
    sample = contact_sheet._sample(strategy, "en", k, job)
    small = sample.image.convert("RGB").resize(cells[i].shape[1::-1], 1)
    np.testing.assert_array_equal(cells[i], np.array(small))
    assert cells[i].std() > 3


def test_polygons_frame_the_lines(tmp_path):
  plain, framed = (
    np.array(
      contact_sheet.contact_sheet(tmp_path / "a.png", OPTIONS, 1, CELL, shown)
    )
    for shown in (False, True)
  )
  job = generate.prepare(OPTIONS)
  for strategy, before, after in zip(
    OPTIONS.strategies, cells_of(plain, 2), cells_of(framed, 2)
  ):
    sample = contact_sheet._sample(strategy, "en", 0, job)
    first = np.array(sample.layout["lines"][0]["polygon"]) * CELL / 192
    changed = np.abs(after - before).sum(-1)
    for corner in first:
      x, y = (int(v) for v in corner)
      near = changed[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
      assert near.max() > 30
    # The first line's frame is red, others are blue.
    (x0, y0), (x1, y1) = first.min(0).astype(int), first.max(0).astype(int) + 1
    box = np.s_[y0:y1, x0:x1]
    redder, bluer = ((after - before)[box][..., c].max() for c in (0, 2))
    assert redder > 60 and redder > bluer + 30


def test_a_cell_without_samples_says_why(tmp_path, monkeypatch):
  def none(*args, **kwargs):
    return Rejected("no such thing")

  monkeypatch.setattr(generate, "draw", none)
  page = np.array(
    contact_sheet.contact_sheet(tmp_path / "a.png", OPTIONS, 1, CELL)
  )
  for cell in cells_of(page, 2):
    assert 0 < (cell < 128).all(-1).mean() < 0.2


def test_unwritable_pages_leave_nothing(tmp_path):
  with pytest.raises(InputError, match="cannot be written"):
    contact_sheet.contact_sheet(tmp_path / "no" / "a.png", OPTIONS, 1, CELL)
  taken = tmp_path / "taken.png"
  taken.mkdir()
  with pytest.raises(InputError, match="choose another path"):
    contact_sheet.contact_sheet(taken, OPTIONS, 1, CELL)
  assert [p.name for p in tmp_path.iterdir()] == ["taken.png"]
