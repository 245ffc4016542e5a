# SPDX-License-Identifier: Apache-2.0
"""Writes the page of a stage: `python -m data_pipelines.report --out=DIR`."""

import pathlib

from absl import app, flags

from data_pipelines.cli import clean_exit
from data_pipelines.report import page


def _define_flags() -> None:
  flags.DEFINE_string("out", None, "Folder of the stage.", required=True)


def main(argv: list[str]) -> None:
  """Writes OUT/report.html and says where."""
  del argv
  with clean_exit():
    print(page.write_report(pathlib.Path(flags.FLAGS.out)))


if __name__ == "__main__":
  _define_flags()
  app.run(main)
