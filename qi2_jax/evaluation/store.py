# SPDX-License-Identifier: Apache-2.0
"""The folder an evaluation leaves behind, and reading it back.

    results.json      the table, sampling settings, versions
    per_sample.csv    every figure of every image, one line each
    images/SUITE/ID[-ROLE].png
    report.html

The report is made from the other three, so it can be made again without the
model.
"""

import csv
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from qi2_jax.errors import InputError
from qi2_jax.evaluation.report import png
from qi2_jax.evaluation.suite import Case, Judged

_COLUMNS = ("suite", "row", "kind", "split", "index", "seed", "prompt")


@dataclasses.dataclass(frozen=True)
class Sample:
  """One image of the model, as the report shows it.

  Attributes:
    suite: as in `Case`.
    kind: as in `Case`.
    split: as in `Case`.
    prompt: as in `Case`.
    figures: name to value.
    images: role ('model', 'source', 'truth', 'vae') to PNG bytes.
  """

  suite: str
  kind: str
  split: str
  prompt: str
  figures: dict[str, float]
  images: dict[str, bytes]


def create(folder: str | os.PathLike) -> pathlib.Path:
  """Makes the folder before anything expensive starts.

  Raises:
    InputError: it cannot be written.
  """
  path = pathlib.Path(folder)
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise InputError(
      f"Cannot write to {path} ({error.strerror}); choose another --out."
    ) from error
  return path


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file that is either complete or as it was."""
  path = pathlib.Path(path)
  temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
  temporary.write_text(text, encoding="utf-8")
  os.replace(temporary, path)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON that is either complete or as it was."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_images(
  folder: pathlib.Path, cases: Sequence[Case], **images: Sequence
) -> None:
  """Saves the sources and right answers of all cases, and more images.

  Args:
    folder: of the evaluation.
    cases: N cases.
    **images: role (see `Sample`) to N images.
  """
  truth = [] if cases[0].suite == "t2i" else [case.truth for case in cases]
  sources = [case.source for case in cases]
  for role, column in {"source": sources, "truth": truth, **images}.items():
    for case, image in zip(cases, column):
      if image is not None:
        path = _image_path(folder, case.suite, case.id, role)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))


def _image_path(
  folder: pathlib.Path, suite: str, name: str, role: str
) -> pathlib.Path:
  return folder / "images" / suite / f"{name}-{role}.png"


def write_samples(folder: pathlib.Path, judged: Sequence[Judged]) -> None:
  """Writes per_sample.csv."""
  names = list(dict.fromkeys(n for j in judged for n in j.figures))
  path = folder / "per_sample.csv"
  temporary = path.with_suffix(f".tmp-{os.getpid()}")
  with temporary.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, [*_COLUMNS, *names])
    writer.writeheader()
    for j in judged:
      fields = {
        name: getattr(j.case, name) for name in _COLUMNS if name != "row"
      }
      figures = {name: f"{value:g}" for name, value in j.figures.items()}
      writer.writerow(fields | {"row": j.row} | figures)
  os.replace(temporary, path)


def read_results(folder: str | os.PathLike) -> dict[str, Any]:
  """Reads results.json.

  Raises:
    InputError: there is none.
  """
  path = pathlib.Path(folder) / "results.json"
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(
      f"{folder} holds no evaluation ({error}); run `python -m "
      "qi2_jax.evaluate` first."
    ) from error


def read_samples(folder: str | os.PathLike, count: int) -> list[Sample]:
  """The model's first `count` samples per suite, kind and split."""
  folder = pathlib.Path(folder)
  samples = []
  with (folder / "per_sample.csv").open(newline="", encoding="utf-8") as file:
    for line in csv.DictReader(file):
      if line["row"] == "model" and int(line["index"]) < count:
        samples.append(_sample(folder, line))
  return samples


def _sample(folder: pathlib.Path, line: dict[str, str]) -> Sample:
  name = f"{line['kind']}-{line['split']}-{int(line['index']):04d}"
  paths = {
    role: _image_path(folder, line["suite"], name, role)
    for role in ("source", "truth", "vae", "model")
  }
  return Sample(
    suite=line["suite"],
    kind=line["kind"],
    split=line["split"],
    prompt=line["prompt"],
    figures={k: float(v) for k, v in line.items() if k not in _COLUMNS and v},
    images={r: p.read_bytes() for r, p in paths.items() if p.exists()},
  )
