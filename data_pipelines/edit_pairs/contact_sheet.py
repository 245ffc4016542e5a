# SPDX-License-Identifier: Apache-2.0
"""A page of edit pairs, so that a person can look at them.

From left to right: references, target, and the mask (white: may change; grey:
no pixel is promised to stay). Below: the instruction.
"""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines import images
from data_pipelines.edit_pairs import generate, masks
from data_pipelines.errors import InputError
from data_pipelines.filters import pixels
from data_pipelines.records import Record
from data_pipelines.synthesis.fonts import Face, faces_of
from data_pipelines.synthesis.languages import language_of
from data_pipelines.synthesis.typeset import font_of

_TILE, _GAP, _CAPTION, _LABEL = 132, 8, 40, 92
_IMAGES = 6  # four references, target, mask
_INK, _GREY, _LINE = (30, 30, 30), 128, (190, 190, 190)


def contact_sheet(
  path: str | os.PathLike,
  inputs: Sequence[str],
  options: generate.Options,
  columns: int = 2,
) -> Image.Image:
  """Writes a PNG with all pairs of the options, by kind.

  Args:
    path: the PNG to write.
    inputs: see `catalogue.find`.
    options: as for `generate.generate`.
    columns: pairs side by side.

  Returns:
    The page, RGB.

  Raises:
    InputError: an input is unusable, a font is missing, or the page cannot be
      written.
  """
  by_kind: dict[str, list[Record]] = {}
  for record in generate.records(inputs, options):
    by_kind.setdefault(record.kind, []).append(record)
  faces = {code: faces_of(language_of(code))[0] for code in options.languages}
  rows = [
    (kind if first == 0 else "", found[first : first + columns])
    for kind, found in by_kind.items()
    for first in range(0, len(found), columns)
  ]
  wide = _IMAGES * (_TILE + _GAP) + 3 * _GAP
  high = _TILE + _CAPTION
  page = Image.new(
    "RGB", (_LABEL + columns * wide, len(rows) * high + 2 * _GAP), "white"
  )
  label = font_of(next(iter(faces.values())), 13)
  for r, (kind, found) in enumerate(rows):
    top = _GAP + r * high
    name = kind.removeprefix("edit-")
    ImageDraw.Draw(page).text((_GAP, top), name, _INK, label)
    for c, record in enumerate(found):
      face = faces[record.provenance["language"]]
      _paste(page, (_LABEL + c * wide, top), record, face)
  temporary = pathlib.Path(f"{os.fspath(path)}.tmp-{os.getpid()}")
  try:
    page.save(temporary, format="PNG", optimize=True)
    os.replace(temporary, path)
  except OSError as error:
    raise InputError(
      f"Contact sheet {path} cannot be written ({error.strerror}); choose "
      "another path."
    ) from error
  finally:
    temporary.unlink(missing_ok=True)
  return page


def _paste(page: Image.Image, corner, record: Record, face: Face) -> None:
  shown = [
    _thumbnail(images.decode_image(image))
    for image in (*record.references, record.target)
  ]
  shown.append(_mask(record))
  draw = ImageDraw.Draw(page)
  x, y = corner
  for k, tile in enumerate(shown):
    if k == len(record.references):
      draw.text((x, y + _TILE // 2 - 8), "→", _INK, _arrow())
      x += 2 * _GAP
    page.paste(tile, (x, y))
    box = (x - 1, y - 1, x + tile.width, y + tile.height)
    draw.rectangle(box, outline=_LINE)
    x += tile.width + _GAP
  font = font_of(face, 13)
  room = _IMAGES * (_TILE + _GAP)
  lines, line = [], ""
  between = " " if record.provenance["language"] == "en" else ""
  text = record.caption
  for word in text.split(" ") if between else text:
    longer = f"{line}{between}{word}" if line else word
    if font.getlength(longer) > room:
      lines.append(line)
      longer = word
    line = longer
  lines.append(line)
  shown_lines = "\n".join(lines[:2])
  draw.text((corner[0], y + _TILE + 1), shown_lines, _INK, font, spacing=0)


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
