# SPDX-License-Identifier: Apache-2.0
"""Makes edit pairs from pictures and cut-outs.

    python -m data_pipelines.edit_pairs --input=photos,cutouts \\
      --out=data/edits --count=10000
    python -m data_pipelines.edit_pairs --out=data/edits --count=1000
    python -m data_pipelines.edit_pairs --contact_sheet=pairs.png --count=42

--input takes folders of images (captions are optional; NAME_mask.png beside
NAME.jpg marks an object), dataset folders, stages and Parquet files, separated
by commas. RGBA images are cut-outs. Without an input, and for what it lacks,
simple pictures and cut-outs are drawn by code; every record says so.

The result is an input of `data_pipelines.run`, which wants images of more
pixels than it stores. `data_pipelines.edit_pairs.masks.of` gives the exact
mask of a record at any size.
"""

from absl import app, flags

from data_pipelines.cli import clean_exit, parse_sizes
from data_pipelines.edit_pairs import generate, instructions
from data_pipelines.edit_pairs.contact_sheet import contact_sheet
from data_pipelines.edit_pairs.supply import Rules

_SIZES = ("512x512", "608x416", "416x608", "672x384", "384x672")


def _define_flags() -> None:
  flags.DEFINE_list("input", [], "Folders, datasets, Parquet files.")
  flags.DEFINE_string("out", None, "Dataset folder to create.")
  flags.DEFINE_string("contact_sheet", None, "PNG of all pairs to write.")
  flags.DEFINE_integer("count", 1000, "Pairs.")
  flags.DEFINE_list("kinds", list(generate.KINDS), "Kinds of edits, in turn.")
  flags.DEFINE_list("sizes", list(_SIZES), "WIDTHxHEIGHT, ...")
  flags.DEFINE_list(
    "languages", list(instructions.LANGUAGES), "Of instructions, in turn."
  )
  flags.DEFINE_list(
    "text_languages", ["en"], "Of text in pictures; others than en need fonts."
  )
  flags.DEFINE_string("fonts", "", "Folder of fonts for that text.")
  flags.DEFINE_float("inverse", 0.2, "Share of `restore` that damages instead.")
  flags.DEFINE_bool("embedded", True, "Draw what the input lacks.")
  flags.DEFINE_integer("seed", 0, "Changes every pair.")
  flags.DEFINE_integer("shards", 1, "Files of the dataset.", lower_bound=1)
  flags.DEFINE_integer(
    "processes", 0, "Processes; 0: one per core.", lower_bound=0
  )


def main(argv: list[str]) -> None:
  """Writes the dataset, then says what is in it."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  values = flags.FLAGS
  if not values.out and not values.contact_sheet:
    raise app.UsageError("Give --out, --contact_sheet or both.")
  with clean_exit():
    options = generate.Options(
      count=values.count,
      kinds=tuple(values.kinds),
      languages=tuple(values.languages),
      seed=values.seed,
      shards=values.shards,
      rules=Rules(
        sizes=parse_sizes(values.sizes),
        embedded=values.embedded,
        inverse=values.inverse,
        text_languages=tuple(values.text_languages),
        fonts=values.fonts,
      ),
    )
    if values.contact_sheet:
      contact_sheet(values.contact_sheet, values.input, options)
    if not values.out:
      return
    counts = generate.generate(
      values.out, values.input, options, values.processes
    )
  print(
    f"{values.out}: {counts['records']} pairs, {counts['quarantined']} problems"
    + (" in quarantine.jsonl" if counts["quarantined"] else "")
  )


if __name__ == "__main__":
  _define_flags()
  app.run(main)
