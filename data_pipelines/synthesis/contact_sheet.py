# SPDX-License-Identifier: Apache-2.0
"""One PNG with samples of every strategy and language, to look at.

    python -m data_pipelines.synthesis.contact_sheet --out=samples.png
    python -m data_pipelines.synthesis.contact_sheet --out=boxes.png --polygons

Columns are strategies, rows languages. Every sample is shrunk to its cell;
with `--polygons` the lines of the layout are framed, the first one of each
sample in another colour.
"""

import os
import sys
import textwrap

import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw

from data_pipelines import images, sheet_file
from data_pipelines.cli import clean_exit
from data_pipelines.shapes import fonts
from data_pipelines.synthesis import generate
from data_pipelines.synthesis.languages import LANGUAGES
from data_pipelines.synthesis.sample import Rejected, Sample

_GAP, _HEAD, _SIDE = 8, 34, 34
_INK, _FIRST, _OTHER = (40, 40, 40), (230, 40, 40), (40, 130, 230)
_TRIES = 20
_FINE = 2  # samples are shrunk less and polygons drawn on them first


def contact_sheet(
  path: str | os.PathLike, options: generate.Options, each: int = 2,
  cell: int = 220, polygons: bool = False,
) -> Image.Image:  # fmt: skip
  """Writes a page of samples.

  Args:
    path: of the PNG to write.
    options: what to draw; the first size is used, the count does not matter.
    each: samples per strategy and language.
    cell: width of a sample on the page, in pixels.
    polygons: whether lines of text are framed.

  Returns:
    The page, RGB.

  Raises:
    InputError: fonts, texts or photos are missing, or the page cannot be
      written.
  """
  job = generate.prepare(options)
  width, height = options.sizes[0]
  tall = round(cell * height / width)
  columns = len(options.strategies) * each
  page = Image.new(
    "RGB",
    (
      _SIDE + columns * (cell + _GAP) + _GAP,
      _HEAD + len(options.languages) * (tall + _GAP),
    ),
    "white",
  )
  for c, strategy in enumerate(options.strategies):
    left = _SIDE + c * each * (cell + _GAP) + _GAP
    _label(page, (left, 8), strategy)
    for r, code in enumerate(options.languages):
      top = _HEAD + r * (tall + _GAP)
      if c == 0:
        _label_upright(page, (6, top, tall), code)
      for k in range(each):
        found = _sample(strategy, code, k, job)
        corner = (left + k * (cell + _GAP), top)
        if isinstance(found, Rejected):
          _label(page, corner, "none: " + found.reason, cell)
        else:
          page.paste(_tile(found, (cell, tall), polygons), corner)
  sheet_file.save(_coarse(page), path)
  return page


def _sample(strategy: str, code: str, k: int, job) -> Sample | Rejected:
  """Sample number k of a cell, or why the last of all tries was rejected."""
  place = [list(generate.STRATEGIES).index(strategy), [*LANGUAGES].index(code)]
  for attempt in range(_TRIES):
    rng = np.random.default_rng([job.options.seed, *place, k, attempt])
    found = generate.draw(strategy, code, job.options.sizes[0], job, rng)
    if not isinstance(found, Rejected):
      break
  return found


def _tile(sample: Sample, size: tuple[int, int], polygons: bool) -> Image.Image:
  """A sample, shrunk; on white if it is transparent."""
  image = images.on_white(sample.image)
  if polygons:
    scale = np.array(size) * _FINE / image.size
    image = image.resize([_FINE * n for n in size], Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    lines = enumerate(sample.layout["lines"])
    for i, line in reversed([*lines]):  # the first one over all others
      corners = [tuple(p) for p in np.array(line["polygon"]) * scale]
      draw.polygon(corners, outline=_OTHER if i else _FIRST, width=_FINE)
  return image.resize(size, Image.Resampling.LANCZOS)


def _font():
  return fonts.font_at(fonts.default_font(), 15)


def _label(page: Image.Image, corner, text: str, width: int = 10**4) -> None:
  """Text, in lines of about so many pixels."""
  text = "\n".join(textwrap.wrap(text, max(1, width // 11)))
  ImageDraw.Draw(page).text(corner, text, _INK, _font())


def _label_upright(page: Image.Image, place, text: str) -> None:
  """Text that runs upwards, in the middle of a row."""
  left, top, height = place
  strip = Image.new("RGB", (height, 20), "white")
  draw = ImageDraw.Draw(strip)
  draw.text((height // 2, 10), text, _INK, _font(), anchor="mm")
  page.paste(strip.transpose(Image.Transpose.ROTATE_90), (left, top))


def _coarse(page: Image.Image) -> Image.Image:
  """32 steps per channel: half the bytes, nothing to be seen at this size."""
  return Image.fromarray(
    np.uint8(np.rint(np.asarray(page) / (255 / 31)) * (255 / 31))
  )


def _define_flags():
  flags.DEFINE_string("out", None, "PNG to write.")
  flags.DEFINE_list(
    "strategies", list(generate.STRATEGIES), "Columns, in this order."
  )
  flags.DEFINE_list("languages", list(LANGUAGES), "Rows, in this order.")
  flags.DEFINE_integer("each", 2, "Samples per cell.", lower_bound=1)
  flags.DEFINE_integer("cell", 220, "Width of a sample.", lower_bound=32)
  flags.DEFINE_integer("side", 512, "Sides of the samples as drawn.")
  flags.DEFINE_bool("polygons", False, "Frame every line of text.")
  flags.DEFINE_string("fonts", "", "Folder of fonts; none: the system's.")
  flags.DEFINE_string("backgrounds", "", "Folder of photos to write on.")
  flags.DEFINE_integer("seed", 0, "Changes every sample.")
  flags.mark_flag_as_required("out")


def main(argv: list[str]):
  """Writes the page that was asked for."""
  values = flags.FLAGS
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  with clean_exit():
    options = generate.Options(
      count=1,
      strategies=tuple(values.strategies),
      languages=tuple(values.languages),
      sizes=((values.side, values.side),),
      fonts=values.fonts,
      backgrounds=values.backgrounds,
      seed=values.seed,
    )
    contact_sheet(
      values.out, options, values.each, values.cell, values.polygons
    )
    print(f"Wrote {values.out}.", file=sys.stderr)


if __name__ == "__main__":
  _define_flags()
  app.run(main)
