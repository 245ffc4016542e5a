# SPDX-License-Identifier: Apache-2.0
"""Runs a stage of the offline pipeline.

    python -m data_pipelines.run --config=experiments/data.py:stage1 \\
      --input=photos --out=data/stage1

Five verbs follow each other: *ingest* reads the inputs, *measure* takes
metrics of every record, *score* adds those of models, *decide* applies the
filters, *materialise* writes the dataset at the resolution of the stage. Each
does what is missing or what a change has made stale, shard by shard, so the
same command resumes a run that was killed, and a changed threshold reruns
only the last two.

--input takes folders of captioned images (see `data_pipelines.imagefolder`),
JSON lines, webdataset tars, Parquet files, datasets and earlier stages,
separated by commas. --retry=REASON tries again what quarantine.jsonl lists
under that reason, or 'all'.

Work is spread by Apache Beam; what follows `--` is passed to it:

    python -m data_pipelines.run --config=... --input=... --out=... \\
      --runner=DataflowRunner -- --project=me --region=europe-west4
"""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

from absl import app, flags, logging
from ml_collections import config_flags

from data_pipelines.cli import clean_exit
from data_pipelines.engine import manifest, stage
from data_pipelines.engine.config import parse


def _define_flags() -> None:
  config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. experiments/data.py:stage1."
  )
  flags.DEFINE_list(
    "input", [], "Folders and files; none: those of the last ingest."
  )
  flags.DEFINE_string("out", None, "Folder of the stage.")
  flags.DEFINE_list("verbs", list(stage.VERBS), "What to do.")
  flags.DEFINE_string("retry", None, "Reason to try again, or 'all'.")
  # Beam's DirectRunner may fetch a program from the network.
  flags.DEFINE_string("runner", "FnApiRunner", "A runner of Apache Beam.")
  flags.DEFINE_integer(
    "processes",
    0,
    "Processes that decode and measure, for each worker of Beam; 0: one per "
    "core.",
    lower_bound=0,
  )
  flags.mark_flags_as_required(["config", "out"])


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
  """Says after Ctrl-C that finished shards are kept."""
  try:
    yield
  except KeyboardInterrupt:
    print(
      "Interrupted; the same command goes on with the first unfinished shard.",
      file=sys.stderr,
    )
    sys.exit(130)


def main(argv: list[str]) -> None:
  """Runs the verbs, then prints the funnel."""
  values = flags.FLAGS
  logging.set_verbosity(logging.WARNING)  # Beam notes every pipeline
  with clean_exit(), _resumable():
    found = stage.run(
      stage.Run(
        config=parse(values.config.to_dict()),
        out=pathlib.Path(values.out),
        inputs=tuple(values.input),
        verbs=tuple(values.verbs),
        retry=values.retry,
        runner=values.runner,
        beam_arguments=tuple(argv[1:]),
        processes=values.processes,
      )
    )
  if found is not None:
    print(f"{values.out}: {manifest.funnel(found)}")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
