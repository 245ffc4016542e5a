# SPDX-License-Identifier: Apache-2.0
"""Makes a shapes-and-glyphs dataset, or a page of samples to look at.

    python -m data_pipelines.shapes --out=DIR --t2i=16000 --edits=8000
    python -m data_pipelines.shapes --contact_sheet=samples.png

Sizes are WIDTHxHEIGHT. Kinds may carry weights: --kinds=glyph:3,position:2.
"""

import sys

from absl import app, flags

from data_pipelines.cli import clean_exit, parse_sizes
from data_pipelines.errors import InputError
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.contact_sheet import contact_sheet
from data_pipelines.shapes.generate import Options, generate


def _define_flags():
  flags.DEFINE_string("out", None, "Dataset folder to create.")
  flags.DEFINE_string("contact_sheet", None, "PNG of samples to write.")
  flags.DEFINE_integer("t2i", 16000, "Text-to-image records.")
  flags.DEFINE_integer("edits", 8000, "Editing records.")
  flags.DEFINE_list("sizes", ["64x64", "96x64", "64x96"], "WIDTHxHEIGHT, ...")
  flags.DEFINE_list("size_weights", [], "One weight per size; none: equal.")
  flags.DEFINE_list(
    "kinds", list(vocab.T2I_KINDS), "Text-to-image kinds, as KIND[:WEIGHT]."
  )
  flags.DEFINE_list(
    "edit_kinds", list(vocab.EDIT_KINDS), "Edit kinds, as KIND[:WEIGHT]."
  )
  flags.DEFINE_integer("seed", 0, "Changes every sample.")
  flags.DEFINE_enum(
    "split", "seen", ["seen", "held_out"], "Which side of the prompt hash."
  )
  flags.DEFINE_integer("shards", 4, "Number of files.")
  flags.DEFINE_integer(
    "workers", 0, "Processes; 0: one per CPU.", lower_bound=0
  )


def parse_mixture(texts: list[str]) -> dict[str, float]:
  """Parses ['glyph:3', 'word'] to {'glyph': 3.0, 'word': 1.0}."""
  mixture = {}
  for text in texts:
    kind, _, weight = text.partition(":")
    mixture[kind] = _number(weight or "1")
  return mixture


def _number(text: str) -> float:
  try:
    return float(text)
  except ValueError as error:
    raise InputError(
      f"Weight {text!r} is not a number; write it like 2 or 0.5."
    ) from error


def _options() -> Options:
  values = flags.FLAGS
  return Options(
    t2i=values.t2i,
    edits=values.edits,
    sizes=parse_sizes(values.sizes),
    size_weights=tuple(map(_number, values.size_weights)),
    kinds=parse_mixture(values.kinds),
    edit_kinds=parse_mixture(values.edit_kinds),
    seed=values.seed,
    split=values.split,
    shards=values.shards,
  )


def main(argv: list[str]):
  """Runs the two outputs that were asked for."""
  values = flags.FLAGS
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  if not values.out and not values.contact_sheet:
    raise app.UsageError("Give --out, --contact_sheet or both.")
  with clean_exit():
    options = _options()
    if values.contact_sheet:
      contact_sheet(values.contact_sheet, options)
      print(f"Wrote {values.contact_sheet}.", file=sys.stderr)
    if values.out:
      generate(values.out, options, values.workers)


if __name__ == "__main__":
  _define_flags()
  app.run(main)
