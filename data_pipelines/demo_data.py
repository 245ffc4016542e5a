# SPDX-License-Identifier: Apache-2.0
"""The demo's training data, made by the whole offline pipeline.

    python -m data_pipelines.demo_data --out=runs/pipeline/data
    python -m qi2_jax.demo --pipeline     # the same, then training on it

Draws shapes and glyphs as a raw folder, half of it without captions and some
of it damaged, too small, or there twice; adds rendered text and edit pairs;
then runs the stage `experiments/data.py:tiny`: filters, captions from a local
server, the mix of captions, buckets. The server is a stand-in that looks up
what was drawn (`data_pipelines.caption.stand_in`); so are the scores of the
stage. Captions that are too short for the checks are refused, and pictures
without any are dropped. Every command is printed. Interrupted, the same
command goes on.

    OUT/drawn      the shapes with their truth, a dataset
    OUT/raw        the same as a folder of pictures, the input
    OUT/text       rendered text, OUT/pairs  edit pairs, further inputs
    OUT/stage      the stage: data/ to train on, report.html

Needs the extras `data` and `synthesis`.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from data_pipelines import codec, images, records
from data_pipelines.caption import stand_in
from data_pipelines.cli import clean_exit
from data_pipelines.errors import InputError

_CONFIG = "--config=experiments/data.py:tiny"
# Every so many-th picture is there twice, cut off, or too small.
_TWICE, _CUT, _SMALL = 40, 97, 101
_NEEDED = ("apache_beam", "uharfbuzz")  # of the two extras


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much of everything.

  Attributes:
    t2i: shapes.
    edits: edits of shapes.
    text: pictures with rendered text.
    pairs: edit pairs of embedded pictures.
  """

  t2i: int = 20_000
  edits: int = 10_000
  text: int = 1_000
  pairs: int = 1_000


QUICK = Sizes(t2i=240, edits=120, text=24, pairs=24)


def make(out: pathlib.Path, sizes: Sizes, processes: int = 0) -> None:
  """Runs every step that is not done.

  Args:
    out: see the module docstring.
    sizes: how much.
    processes: of each step; 0: one per core.

  Raises:
    InputError: a package is missing, or a step failed.
  """
  missing = [n for n in _NEEDED if importlib.util.find_spec(n) is None]
  if missing:
    raise InputError(
      f"The packages {missing} are not installed; run "
      "`pip install -e '.[data,synthesis]'`."
    )
  if not pathlib.Path("experiments").is_dir():
    raise InputError(
      "There is no experiments folder here; run this from the root of the "
      "repository."
    )
  for folder, arguments in _generators(out, sizes, processes):
    if not (out / folder / "manifest.json").is_file():
      _run(*arguments, f"--out={out / folder}")
  drawn = records.open_dataset(out / "drawn")
  try:
    write_raw(drawn, out / "raw")
    truth = stand_in.learn(drawn[i] for i in range(len(drawn)))
  finally:
    drawn.close()
  stage = f"--out={out / 'stage'}"
  inputs = ",".join(str(out / name) for name in ("raw", "text", "pairs"))
  several = f"--processes={processes}"
  takes = "--config.limits.uncaptioned=True"
  _run(
    "run", _CONFIG, f"--input={inputs}", stage, takes, several,
    "--verbs=ingest,measure,score,decide",
  )  # fmt: skip
  with stand_in.serve(truth) as url:
    _run(
      "captioner", f"--input={out / 'stage'}", f"--url={url}",
      f"--model={stand_in.MODEL}", "--kinds=general,edit", "--lengths=short",
      # Rendered text and pairs have captions, and the stand-in none for them;
      # asked again it says the same.
      "--max_error_rate=1", "--tries=1", several,
    )  # fmt: skip
  _run(
    "run", _CONFIG, stage, takes, several,
    *(f"--config.captions.kinds.{kind}=1" for kind in
      ("original", "general", "edit")),
  )  # fmt: skip


def _generators(
  out: pathlib.Path, sizes: Sizes, processes: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Folders of what is drawn, and their commands."""
  several = f"--processes={processes}"
  yield "drawn", (
    "shapes", f"--t2i={sizes.t2i}", f"--edits={sizes.edits}",
    "--sizes=64x64,96x64", "--size_weights=6,1",
    "--kinds=single:2,position:3,counting:2,relation:2,glyph:4,word:2",
    f"--workers={processes}",
  )  # fmt: skip
  yield "text", (
    "synthesis", f"--count={sizes.text}", "--strategies=pure",
    "--languages=en", "--sizes=128x128", several,
  )  # fmt: skip
  yield "pairs", (
    "edit_pairs", f"--count={sizes.pairs}", "--sizes=128x128", "--languages=en",
    "--kinds=restore,style,attribute,structure", several,
  )  # fmt: skip


def _run(module: str, *arguments: str) -> None:
  command = [sys.executable, "-m", f"data_pipelines.{module}", *arguments]
  print("$", shlex.join(["python", *command[1:]]), flush=True)
  status = subprocess.run(command).returncode
  if status in (130, 143):
    raise KeyboardInterrupt
  if status:
    raise InputError(f"`{module}` ended with status {status}; see above.")


def write_raw(drawn: records.Dataset, out: pathlib.Path) -> None:
  """Pictures as a person would collect them; complete or absent.

  Args:
    drawn: shapes.
    out: folder to create; one that is there is left as it is.
  """
  if out.is_dir():
    return
  temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
  try:
    temporary.mkdir(parents=True)
    lines = [
      json.dumps(line)
      for i in range(len(drawn))
      for line in _lines(drawn[i], i, temporary)
    ]
    text = "\n".join(lines) + "\n"
    (temporary / "metadata.jsonl").write_text(text, encoding="utf-8")
    os.rename(temporary, out)
  except OSError as error:
    raise InputError(
      f"Writing {out} failed ({error.strerror}); check the free space."
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _lines(
  record: codec.Record, number: int, folder: pathlib.Path
) -> Iterator[dict[str, Any]]:
  """Writes the pictures of a record; yields its lines of metadata."""
  name = f"{number:06d}"
  line: dict[str, Any] = {"file_name": f"{name}.png", "kind": record.kind}
  (folder / line["file_name"]).write_bytes(record.target.data)
  for i, reference in enumerate(record.references):
    line.setdefault("references", []).append(f"{name}-{i}.png")
    (folder / line["references"][-1]).write_bytes(reference.data)
  if number % 2:  # the others wait for the captioner
    line["text"] = record.caption
  yield line
  caption = {"text": record.caption, "kind": record.kind}
  if number % _TWICE == 1 and not record.references:
    yield _another(folder, f"{name}-twice", record.target.data, caption)
  if number % _CUT == 0:
    data = record.target.data[: len(record.target.data) // 2]
    yield _another(folder, f"{name}-cut", data, caption)
  if number % _SMALL == 0:
    small = images.decode_image(record.target).resize((32, 32))
    path = folder / f"{name}-small.png"
    small.save(path)
    yield {"file_name": path.name, **caption}


def _another(
  folder: pathlib.Path, name: str, data: bytes, fields: dict[str, Any]
) -> dict[str, Any]:
  (folder / f"{name}.png").write_bytes(data)
  return {"file_name": f"{name}.png", **fields}


def _define_flags() -> None:
  flags.DEFINE_string("out", None, "Folder for everything.", required=True)
  for field in dataclasses.fields(Sizes):
    flags.DEFINE_integer(field.name, field.default, "Records.", 1)
  flags.DEFINE_bool("quick", False, "A few hundred records, to see it run.")
  flags.DEFINE_integer("processes", 0, "0: one per core.", 0)


def main(argv: list[str]) -> None:
  """Makes the data, then says where it is."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  values = flags.FLAGS
  names = [field.name for field in dataclasses.fields(Sizes)]
  sizes = Sizes(**{name: getattr(values, name) for name in names})
  out = pathlib.Path(values.out)
  with clean_exit():
    make(out, QUICK if values.quick else sizes, values.processes)
  print(f"{out / 'stage' / 'data'}: train with --config.data.path; see also "
        f"{out / 'stage' / 'report.html'}")  # fmt: skip


if __name__ == "__main__":
  _define_flags()
  app.run(main)
