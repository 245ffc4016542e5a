# SPDX-License-Identifier: Apache-2.0
"""Renders images with exactly known text, as a dataset to train on.

    python -m data_pipelines.synthesis --out=data/synthetic --count=1000
    python -m data_pipelines.synthesis --out=data/pages --count=200 \\
      --strategies=template --languages=en,zh --sizes=1536x2048
    python -m data_pipelines.synthesis --out=data/mine --count=500 \\
      --texts=texts.jsonl --backgrounds=photos --fonts=fonts

The folder is an input of `data_pipelines.run` and of the loader; text, boxes,
fonts and layout are in every record's provenance. Needs the `synthesis` extra,
and for most languages the Debian packages fonts-noto-core and fonts-noto-cjk.
"""

import sys

from absl import app, flags

from data_pipelines.cli import clean_exit, parse_sizes
from data_pipelines.synthesis import generate
from data_pipelines.synthesis.languages import LANGUAGES


def _define_flags():
  flags.DEFINE_string("out", None, "Dataset folder to create.")
  flags.DEFINE_integer("count", 1000, "Images.")
  flags.DEFINE_list(
    "strategies", list(generate.STRATEGIES), "Kinds of images, in turn."
  )
  flags.DEFINE_list("languages", list(LANGUAGES), "Languages, in turn.")
  flags.DEFINE_list("sizes", ["512x512", "768x512"], "WIDTHxHEIGHT, ...")
  flags.DEFINE_string(
    "texts", "",
    "Your texts: one a line, or .jsonl with text and language. Those that a "
    "font cannot draw exactly are left out and counted.",
  )  # fmt: skip
  flags.DEFINE_string("fonts", "", "Folder of fonts; none: the system's.")
  flags.DEFINE_string("backgrounds", "", "Folder of photos to write on.")
  flags.DEFINE_integer("seed", 0, "Changes every image.")
  flags.DEFINE_integer("shards", 1, "Files of the dataset.")
  flags.DEFINE_enum(
    "format", "png", ["png", "jpeg"], "Lossless, or JPEG of quality 95."
  )
  flags.DEFINE_integer(
    "processes", 0, "0: one per CPU; changes no image.", lower_bound=0
  )
  flags.mark_flag_as_required("out")


def main(argv: list[str]):
  """Writes the dataset and says what was rejected."""
  values = flags.FLAGS
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  with clean_exit():
    options = generate.Options(
      count=values.count,
      strategies=tuple(values.strategies),
      languages=tuple(values.languages),
      sizes=parse_sizes(values.sizes),
      texts=values.texts,
      fonts=values.fonts,
      backgrounds=values.backgrounds,
      seed=values.seed,
      shards=values.shards,
      encoding=values.format,
    )
    rejected = generate.generate(values.out, options, values.processes)
    for reason, count in sorted(rejected.items()):
      print(f"rejected {count:,}: {reason}", file=sys.stderr)


if __name__ == "__main__":
  _define_flags()
  app.run(main)
