# SPDX-License-Identifier: Apache-2.0
"""Whole datasets of shapes and glyphs, and the command line."""

import dataclasses
import filecmp
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines import records
from data_pipelines.errors import InputError
from data_pipelines.shapes import __main__ as cli
from data_pipelines.shapes import checker, generate, prompts, render
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.contact_sheet import contact_sheet
from data_pipelines.shapes.generate import Options

SMALL = Options(t2i=40, edits=30, sizes=((64, 64), (96, 64)), shards=2)


def pixels(image):
  return np.asarray(records.decode_image(image))


def files(folder):
  return sorted(p.name for p in folder.iterdir())


def test_records_hold_what_they_say(tmp_path):
  assert generate.generate(tmp_path / "d", SMALL, workers=1)
  data = records.open_dataset(tmp_path / "d")
  assert len(data) == 70
  seen = [data[i] for i in range(len(data))]
  assert len({r.id for r in seen}) == 70
  assert sum(r.task == "ti2i" for r in seen) == 30
  assert {(r.target.width, r.target.height) for r in seen} == set(SMALL.sizes)
  for record in seen:
    provenance = record.provenance
    assert provenance["source"] == "shapes" and provenance["split"] == "seen"
    target = pixels(record.target)
    assert checker.check(target, provenance["atoms"])["all"], record.caption
    if record.task == "t2i":
      assert not prompts.is_held_out(record.caption)
    else:
      (source,) = map(pixels, record.references)
      assert source.shape == target.shape and (source != target).any()


def test_held_out_split(tmp_path):
  options = dataclasses.replace(SMALL, edits=0, split="held_out")
  generate.generate(tmp_path / "d", options, workers=1)
  data = records.open_dataset(tmp_path / "d")
  captions = [data[i].caption for i in range(len(data))]
  assert all(map(prompts.is_held_out, captions))


def test_result_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
  # So few records that one process would do: ask for two all the same.
  monkeypatch.setattr(generate, "_RECORDS_PER_WORKER", 10)
  generate.generate(tmp_path / "two", SMALL, workers=2)
  generate.generate(tmp_path / "one", SMALL, workers=1)
  names = files(tmp_path / "one")
  assert names == files(tmp_path / "two")
  names = [n for n in names if not n.endswith(".npz")]  # zip holds the time
  same = filecmp.cmpfiles(
    tmp_path / "one", tmp_path / "two", names, shallow=False
  )
  assert same == (names, [], [])


def test_records_do_not_depend_on_the_counts():
  more = dataclasses.replace(SMALL, t2i=41)
  assert generate.sample("ti2i", 3, SMALL) == generate.sample("ti2i", 3, more)
  again = dataclasses.replace(SMALL, seed=1)
  assert generate.sample("ti2i", 3, SMALL) != generate.sample("ti2i", 3, again)


def test_finished_dataset_is_kept_and_another_is_refused(tmp_path, capsys):
  out = tmp_path / "d"
  assert generate.generate(out, SMALL, workers=1)
  before = {n: os.stat(out / n).st_mtime_ns for n in files(out)}
  assert not generate.generate(out, SMALL, workers=1)
  assert "already holds this dataset" in capsys.readouterr().err
  assert {n: os.stat(out / n).st_mtime_ns for n in files(out)} == before
  with pytest.raises(InputError, match="seed differ"):
    generate.generate(out, dataclasses.replace(SMALL, seed=1), workers=1)


def test_failure_leaves_nothing(tmp_path, monkeypatch):
  def broken(*_):
    raise InputError("Broken on purpose; do nothing.")

  monkeypatch.setattr(render, "render", broken)
  with pytest.raises(InputError, match="on purpose"):
    generate.generate(tmp_path / "d", SMALL, workers=1)
  assert not files(tmp_path)


def test_weights_steer_the_mixture():
  options = dataclasses.replace(
    SMALL,
    size_weights=(0, 1),
    kinds={"glyph": 3, "word": 1, "single": 0},
    edit_kinds={"add": 1},
  )
  drawn = [generate.sample("t2i", i, options) for i in range(400)]
  kinds = [example.kind for example, _ in drawn]
  assert {size for _, size in drawn} == {(96, 64)}
  assert set(kinds) == {"glyph", "word"}
  assert kinds.count("glyph") / 400 == pytest.approx(0.75, abs=0.07)
  assert generate.sample("ti2i", 0, options)[0].kind == "add"
  turned = dict(reversed(options.kinds.items()))
  same = dataclasses.replace(options, kinds=turned)
  assert drawn[:9] == [generate.sample("t2i", i, same) for i in range(9)]


@pytest.mark.parametrize(
  "change",
  [
    {"t2i": 0, "edits": 0},
    {"t2i": -1},
    {"seed": -1},
    {"shards": 0},
    {"split": "train"},
    {"sizes": ()},
    {"sizes": ((64, 16),)},
    {"size_weights": (1.0,)},
    {"size_weights": (0.0, 0.0)},
    {"kinds": {"ballet": 1.0}},
    {"kinds": {}},
    {"kinds": {"glyph": -1.0, "word": 2.0}},
    {"edit_kinds": {"add": float("nan")}},
  ],
)
def test_bad_options_are_refused(change):
  with pytest.raises(InputError):
    dataclasses.replace(SMALL, **change)


def test_flags_parse():
  assert cli.parse_sizes(["64x64", "96x64"]) == ((64, 64), (96, 64))
  assert cli.parse_mixture(["glyph:3", "word"]) == {"glyph": 3.0, "word": 1.0}
  for bad in ("64", "axb", "64x"):
    with pytest.raises(InputError, match="WIDTHxHEIGHT"):
      cli.parse_sizes([bad])
  with pytest.raises(InputError, match="not a number"):
    cli.parse_mixture(["glyph:many"])


def test_contact_sheet_is_written(tmp_path):
  page = contact_sheet(tmp_path / "sheet.png", SMALL)
  with Image.open(tmp_path / "sheet.png") as saved:
    assert saved.size == page.size
  assert files(tmp_path) == ["sheet.png"]
  rows = len(vocab.T2I_KINDS) + len(vocab.EDIT_KINDS)
  assert page.height > 64 * rows
  with pytest.raises(InputError, match="cannot be written"):
    contact_sheet(tmp_path / "absent" / "sheet.png", SMALL)


def run(*flags):
  return subprocess.run(
    [sys.executable, "-m", "data_pipelines.shapes", *flags],
    capture_output=True,
    text=True,
  )


def test_command_line(tmp_path):
  out = tmp_path / "d"
  done = run(f"--out={out}", "--t2i=8", "--edits=4", "--kinds=glyph:3,single")
  assert done.returncode == 0, done.stderr
  assert "12/12 records" in done.stderr
  assert records.read_manifest(out)["source"]["kinds"] == {
    "glyph": 3.0,
    "single": 1.0,
  }
  wrong = run(f"--out={out}", "--kinds=ballet")
  assert wrong.returncode == 2
  assert wrong.stderr.startswith("Error: Unknown t2i kinds ballet")
  assert "Traceback" not in wrong.stderr
