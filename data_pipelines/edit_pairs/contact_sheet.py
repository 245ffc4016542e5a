# SPDX-License-Identifier: Apache-2.0
"""A page of edit pairs, so that a person can look at them.

From left to right: references, target, and the mask (white: may change; grey:
no pixel is promised to stay). Below: the instruction.
"""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines import images, sheet_file
from data_pipelines.edit_pairs import generate, masks
from data_pipelines.filters import pixels
from data_pipelines.records import Record
from data_pipelines.synthesis.fonts import Face, faces_of
from data_pipelines.synthesis.languages import language_of
from data_pipelines.synthesis.typeset import font_of
from data_pipelines.text_corpus import layout

_TILE, _GAP, _LINE_HIGH, _LABEL = 132, 8, 17, 92
_PAGE, _LINES = 1480, 2
_INK, _GREY, _EDGE = (30, 30, 30), 128, (190, 190, 190)


def contact_sheet(
  path: str | os.PathLike, inputs: Sequence[str], options: generate.Options
) -> Image.Image:
  """Writes a PNG with all pairs of the options, by kind.

  Args:
    path: the PNG to write.
    inputs: see `catalogue.find`.
    options: as for `generate.generate`.

  Returns:
    The page, RGB.

  Raises:
    InputError: an input is unusable, a font is missing, or the page cannot be
      written.
  """
  faces = {code: faces_of(language_of(code))[0] for code in options.languages}
  by_kind: dict[str, list[Image.Image]] = {}
  for record in generate.records(inputs, options):
    strip = _strip(record, faces[record.provenance["language"]])
    by_kind.setdefault(record.kind, []).append(strip)
  rows = [
    (kind.removeprefix("edit-") if first else "", row)
    for kind, strips in by_kind.items()
    for first, row in _rows(strips)
  ]
  high = _TILE + _LINES * _LINE_HIGH + _GAP
  page = Image.new("RGB", (_PAGE, len(rows) * high + _GAP), "white")
  label = font_of(next(iter(faces.values())), 13)
  for r, (name, row) in enumerate(rows):
    x, y = _LABEL, _GAP + r * high
    ImageDraw.Draw(page).text((_GAP, y), name, _INK, label)
    for strip in row:
      page.paste(strip, (x, y))
      x += strip.width + 3 * _GAP
  sheet_file.save(page, path)
  return page


def _rows(strips: Sequence[Image.Image]):
  """Strips side by side, as many as fit: (whether it is the first, row)."""
  row: list[Image.Image] = []
  first, x = True, _LABEL
  for strip in strips:
    if row and x + strip.width > _PAGE:
      yield first, row
      row, first, x = [], False, _LABEL
    row.append(strip)
    x += strip.width + 3 * _GAP
  if row:
    yield first, row


def _strip(record: Record, face: Face) -> Image.Image:
  """One pair with its mask over its instruction."""
  tiles = [
    _thumbnail(images.decode_image(image))
    for image in (*record.references, record.target)
  ]
  tiles.append(_mask(record))
  width = sum(tile.width + _GAP for tile in tiles) + 2 * _GAP
  strip = Image.new("RGB", (width, _TILE + _LINES * _LINE_HIGH), "white")
  draw = ImageDraw.Draw(strip)
  x = 1
  for k, tile in enumerate(tiles):
    if k == len(record.references):
      draw.text((x - 2, _TILE // 2 - 12), "→", _INK, _arrow())
      x += 2 * _GAP
    y = _TILE - tile.height
    strip.paste(tile, (x, y))
    box = (x - 1, y - 1, x + tile.width, y + tile.height)
    draw.rectangle(box, outline=_EDGE)
    x += tile.width + _GAP
  font = font_of(face, 13)
  language = record.provenance["language"]
  lines = layout.wrap(record.caption, font, width, language)
  for n, line in enumerate(lines[:_LINES]):
    draw.text((0, _TILE + n * _LINE_HIGH), line, _INK, font)
  return strip


def _arrow() -> ImageFont.FreeTypeFont:
  """At least DejaVu Sans, of matplotlib, has the sign."""
  faces = faces_of(language_of("en"))
  return font_of(next(f for f in faces if f.file == "DejaVuSans.ttf"), 16)


def _thumbnail(image: Image.Image) -> Image.Image:
  """On a chequered ground where it is transparent."""
  small = image.copy()
  small.thumbnail((_TILE, _TILE))
  if small.mode != "RGBA":
    return small
  y, x = np.indices((small.height, small.width)) // 8
  ground = np.where((x + y) % 2, 255, 214).astype(np.uint8)
  canvas = Image.fromarray(ground).convert("RGBA")
  return pixels.on_white(Image.alpha_composite(canvas, small))


def _mask(record: Record) -> Image.Image:
  change = masks.decode(record.provenance["mask"])
  size = (record.target.width, record.target.height)
  if change is None:
    image = Image.new("RGB", size, (_GREY,) * 3)
  else:
    image = Image.fromarray(change.astype(np.uint8) * 255).convert("RGB")
  image.thumbnail((_TILE, _TILE))
  return image
