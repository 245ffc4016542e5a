# SPDX-License-Identifier: Apache-2.0
"""Renders a corpus of small text: documents, slides, text over pictures.

    python -m data_pipelines.text_corpus --out=data/text --count=2000
    python -m data_pipelines.text_corpus --out=text_256 --format=folder \\
      --languages=en,zh --split=held_out

The result is a dataset to train on, or a folder of PNG files with captions.
Chinese needs a font: one that is installed, or --font_zh=PATH.
"""

from absl import app, flags

from data_pipelines.cli import clean_exit, parse_sizes
from data_pipelines.text_corpus import generate, layout


def _define_flags():
  flags.DEFINE_string("out", None, "Folder to create.")
  flags.DEFINE_enum(
    "format", "dataset", ["dataset", "folder"], "What to write."
  )
  flags.DEFINE_integer("count", 2000, "Pages.")
  flags.DEFINE_list("sizes", ["256x256"], "WIDTHxHEIGHT, ...")
  flags.DEFINE_list("languages", ["en"], "en, zh or both.")
  flags.DEFINE_list("kinds", list(layout.KINDS), "Kinds of pages.")
  flags.DEFINE_string("font_zh", "", "Font file for Chinese.")
  flags.DEFINE_integer("seed", 0, "Changes every page.")
  flags.DEFINE_enum(
    "split", "seen", list(generate.SPLITS), "Independent pages."
  )
  flags.DEFINE_integer("shards", 1, "Files of a dataset.")
  flags.mark_flag_as_required("out")


def main(argv: list[str]):
  """Writes what was asked for."""
  values = flags.FLAGS
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  with clean_exit():
    options = generate.Options(
      count=values.count,
      sizes=parse_sizes(values.sizes),
      languages=tuple(values.languages),
      kinds=tuple(values.kinds),
      font_zh=values.font_zh,
      seed=values.seed,
      split=values.split,
      shards=values.shards,
    )
    write = {
      "dataset": generate.write_dataset, "folder": generate.write_folder,
    }  # fmt: skip
    write[values.format](values.out, options)


if __name__ == "__main__":
  _define_flags()
  app.run(main)
