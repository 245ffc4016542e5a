# SPDX-License-Identifier: Apache-2.0
"""A page of samples with captions, so that a person can look at the data."""

import os
import textwrap

from PIL import Image, ImageDraw, ImageFont

from data_pipelines import sheet_file
from data_pipelines.shapes import fonts, generate, render

_COLUMNS = 6
_GAP = 28
_CAPTION = 52  # height of two lines, and air
_LABEL = 120  # width of the column that names the kinds
_TILE = 144  # images are enlarged by whole factors to at most about this
_INK, _LINE = (40, 40, 40), (205, 205, 205)


def contact_sheet(
  path: str | os.PathLike, options: generate.Options
) -> Image.Image:
  """Writes a PNG with one row of samples per kind of the options.

  Text-to-image rows show six samples, edit rows three pairs. Pixels are the
  ones a model would see, enlarged without smoothing.

  Args:
    path: the PNG to write.
    options: as for `generate.generate`; counts do not matter.

  Returns:
    The page, RGB.
  """
  scale = max(1, round(_TILE / max(map(max, options.sizes))))
  cell_w = scale * max(width for width, _ in options.sizes) + _GAP
  cell_h = scale * max(height for _, height in options.sizes) + _CAPTION
  rows = _rows(options)
  page = Image.new(
    "RGB",
    (_LABEL + _COLUMNS * cell_w + _GAP, len(rows) * cell_h + 2 * _GAP),
    "white",
  )
  for r, (kind, tiles) in enumerate(rows):
    top = _GAP + r * cell_h
    draw = ImageDraw.Draw(page)
    draw.text((_GAP, top), kind, _INK, _font(15, bold=True))
    span = _COLUMNS // len(tiles)
    for c, (caption, images) in enumerate(tiles):
      left = _LABEL + c * span * cell_w
      _paste_tile(page, (left, top), cell_w, scale, caption, images)
  sheet_file.save(page, path)
  return page


def _rows(options: generate.Options) -> list[tuple[str, list]]:
  """(kind, [(caption, [image, ...]), ...]) for every kind in use."""
  rows = []
  for task, mixture, count in (
    ("t2i", options.kinds, _COLUMNS),
    ("ti2i", options.edit_kinds, _COLUMNS // 2),
  ):
    for kind in (k for k, weight in mixture.items() if weight > 0):
      # Other indices for every row, or all rows would share their colours.
      start = len(rows) * _COLUMNS
      indices = range(start, start + count)
      rows.append((kind, [_tile(task, kind, i, options) for i in indices]))
  return rows


def _tile(task: str, kind: str, index: int, options: generate.Options):
  example, (width, height) = generate.sample(task, index, options, kind)
  if task == "t2i":
    return example.prompt, [render.render(example.scene, width, height)]
  scenes = (example.source, example.target)
  return example.instruction, [render.render(s, width, height) for s in scenes]


def _paste_tile(page, corner, cell_w: int, scale: int, caption: str, images):
  """Pastes one image, or a pair with an arrow between, over its caption."""
  draw = ImageDraw.Draw(page)
  left, top = corner
  for k, array in enumerate(images):
    image = Image.fromarray(array)
    size = (image.width * scale, image.height * scale)
    x = left + k * (size[0] + _GAP + 4)
    page.paste(image.resize(size, Image.Resampling.NEAREST), (x, top))
    draw.rectangle((x - 1, top - 1, x + size[0], top + size[1]), outline=_LINE)
    if k:
      y = top + size[1] // 2
      draw.line((x - 24, y, x - 11, y), _INK, 2)
      draw.polygon(((x - 14, y - 5), (x - 14, y + 6), (x - 7, y)), _INK)
  columns = (cell_w * len(images) - _GAP) // 7
  text = "\n".join(textwrap.wrap(caption, columns)[:2])
  draw.text((left, top + size[1] + 5), text, _INK, _font(12, bold=False))


def _font(pixels: int, bold: bool) -> ImageFont.FreeTypeFont:
  path = fonts.default_font()
  return fonts.font_at(path if bold else path.replace("-Bold", ""), pixels)
