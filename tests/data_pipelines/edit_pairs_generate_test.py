# SPDX-License-Identifier: Apache-2.0
"""The command: the same bytes in any process, and nothing half-written."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import interrupts
import numpy as np
import pytest
from edit_pairs_inputs import SIZE, options, pixels, user_folder
from pictures import encoded, jpeg, picture
from PIL import Image
from stages import all_records, config, run

from data_pipelines.edit_pairs import contact_sheet, generate, masks
from data_pipelines.errors import InputError
from data_pipelines.images import decode_image
from data_pipelines.records import open_dataset
from data_pipelines.synthesis.fonts import faces_of
from data_pipelines.synthesis.languages import LANGUAGES


def command(*words):
  return [sys.executable, "-m", "data_pipelines.edit_pairs", *map(str, words)]


def content(path):
  return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def records_of(path):
  dataset = open_dataset(path)
  return [dataset[i] for i in range(len(dataset))]


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
  folder = user_folder(tmp_path / "in")
  given = options(count=21, seed=3)
  for processes in (1, 3):
    out = tmp_path / f"out{processes}"
    counts = generate.generate(out, [str(folder)], given, processes)
    assert counts["records"] == 21
  assert content(tmp_path / "out1") == content(tmp_path / "out3")
  found = records_of(tmp_path / "out1")
  assert [r.id for r in found] == [f"edit_pairs-3-{i:08d}" for i in range(21)]
  assert [r.kind for r in found[:7]] == [f"edit-{k}" for k in generate.KINDS]
  # Pair i depends on i alone.
  fewer = list(generate.records([str(folder)], options(count=7, seed=3)))
  other = list(generate.records([str(folder)], options(count=7, seed=4)))
  for a, b, c in zip(found, fewer, other):
    assert a == b
    assert (a.references, a.target) != (c.references, c.target)


def test_the_command_makes_a_dataset_and_quarantines_bad_inputs(tmp_path):
  folder = user_folder(tmp_path / "in", pictures=2)
  (folder / "cut.jpg").write_bytes(jpeg(9, (200, 160))[:-900])
  (folder / "no.png").write_bytes(b"no image")
  done = subprocess.run(
    command(
      f"--input={folder}", f"--out={tmp_path}/out", "--count=28",
      "--sizes=160x128", "--processes=2", "--seed=1",
    ),
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "28 pairs, 2 problems in quarantine.jsonl" in done.stdout
  assert "28/28" in done.stderr and "pair/s" in done.stderr
  rows = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
  reasons = {row["id"]: row["reason"] for row in map(json.loads, rows)}
  assert set(reasons) == {"in/cut.jpg", "in/no.png"}
  assert reasons["in/cut.jpg"].startswith("damaged image")
  manifest = json.loads((tmp_path / "out/manifest.json").read_text())
  assert manifest["records"] == 28 and manifest["quarantined"] == 2
  assert manifest["source"]["seed"] == 1
  assert manifest["source"]["inputs"] == [{"name": "in"}]
  again = subprocess.run(
    command(f"--out={tmp_path}/out"), capture_output=True, text=True
  )
  assert again.returncode == 2 and "already exists" in again.stderr
  assert len(again.stderr.strip().splitlines()) == 1


def test_ctrl_c_leaves_nothing(tmp_path):
  process = subprocess.Popen(
    command(f"--out={tmp_path}/out", "--count=2000", "--processes=1",
      "--sizes=128x128"),
    stderr=subprocess.PIPE, text=True, preexec_fn=interrupts.heard,
  )  # fmt: skip
  while process.poll() is None and not list(tmp_path.glob("out.tmp*/part*")):
    time.sleep(0.02)
  time.sleep(1)
  process.send_signal(signal.SIGINT)
  _, words = process.communicate()
  assert process.returncode == 130, words
  assert "nothing was written" in words and "Traceback" not in words
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fields, message", [
  ({"kinds": ("restore", "paint")}, "--kinds 'restore,paint' must be some"),
  ({"kinds": ()}, "--kinds"), ({"languages": ("fr",)}, "--languages"),
  ({"count": 0}, "--count 0"), ({"seed": -1}, "--seed -1"),
  ({"sizes": ()}, "--sizes"), ({"sizes": ((512, 64),)}, "128 pixels"),
  ({"inverse": 1.5}, "--inverse 1.5"),
  ({"text_languages": ("xx",)}, "'xx' is unknown"),
  ({"text_languages": ()}, "unknown"),
  ({"fonts": "nowhere"}, "Font folder nowhere"),
])  # fmt: skip
def test_bad_options_are_named(fields, message):
  base = options()
  own = {f.name for f in dataclasses.fields(base)}
  rules = {k: v for k, v in fields.items() if k not in own}
  changed = {k: v for k, v in fields.items() if k in own}
  with pytest.raises(InputError, match=message):
    dataclasses.replace(
      base, **changed, rules=dataclasses.replace(base.rules, **rules)
    )


def test_text_in_columns_is_refused():
  try:
    faces_of(LANGUAGES["zh-vertical"])
  except InputError as error:
    pytest.skip(str(error))  # it names the package
  with pytest.raises(InputError, match="written in columns"):
    options(text_languages=("en", "zh-vertical"))


@pytest.mark.parametrize("code", ["zh", "ar", "th"])
def test_text_may_be_of_other_scripts(code):
  try:
    faces_of(LANGUAGES[code])
  except InputError as error:
    pytest.skip(str(error))  # it names the package
  given = options(["text"], 4, text_languages=(code,), sizes=((320, 256),))
  found = list(generate.records([], given))
  assert len(found) == 4
  for record in found:
    parameters = record.provenance["parameters"]
    assert parameters["language"] == code
    lines = (*parameters["before"], *parameters["after"])
    assert lines and all(not line["text"].isascii() for line in lines)


@pytest.mark.parametrize("kinds, inputs, message", [
  (("restore",), {}, "--kinds restore needs pictures"),
  (("compose",), {"cutouts": 0, "marked": 0}, "needs cut-outs"),
  (("background",), {"pictures": 0, "marked": 0}, "without transparency"),
])  # fmt: skip
def test_without_drawn_ones_every_kind_needs_its_inputs(
  tmp_path, kinds, inputs, message
):
  where = [str(user_folder(tmp_path / "in", **inputs))] if inputs else []
  with pytest.raises(InputError, match=message):
    generate.generate(tmp_path / "out", where, options(kinds, embedded=False))
  assert not list(tmp_path.glob("out*"))
  # With them allowed, the same inputs do.
  assert list(generate.records(where, options(kinds, count=2)))


def test_an_input_without_one_good_image_is_refused(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in/a.png").write_bytes(b"no image")
  with pytest.raises(InputError, match="No image of the input can be used"):
    generate.generate(tmp_path / "out", [str(tmp_path / "in")], options())
  assert not (tmp_path / "out").exists()


def test_pairs_that_cannot_be_made_are_quarantined_with_a_reason(tmp_path):
  (tmp_path / "in").mkdir()
  image = Image.new("RGB", SIZE, (90, 90, 90))
  (tmp_path / "in/a.png").write_bytes(encoded(image, "PNG"))
  small = encoded(picture(0, (60, 60)), "PNG")
  (tmp_path / "in/small.png").write_bytes(small)
  counts = generate.generate(
    tmp_path / "out", [str(tmp_path / "in")],
    options(["restore"], 40, inverse=0.0), 1,
  )  # fmt: skip
  # A flat grey picture survives a grey copy and a blur: no edit. Other draws
  # are tried first.
  assert counts["records"] + counts["quarantined"] - 1 == 40
  assert 30 < counts["records"] < 40
  rows = (tmp_path / "out/quarantine.jsonl").read_text()
  assert rows.count('"id": "in/small.png"') == 1
  for record in records_of(tmp_path / "out"):
    source, target = record.references[0], record.target
    assert (pixels(decode_image(source)) != pixels(decode_image(target))).any()


def test_a_stage_takes_the_pairs_and_their_masks_stay_true(tmp_path):
  folder = user_folder(tmp_path / "in", pictures=4)
  generate.generate(
    tmp_path / "edits", [str(folder)],
    options(count=63, sizes=((192, 128), (128, 128))), 2,
  )  # fmt: skip
  given = {r.id: r for r in records_of(tmp_path / "edits")}
  # The thresholds of stage 2, whose filter `edit` the tiny stage relaxes.
  run(
    tmp_path / "out", tmp_path / "edits",
    config=config(filters__edit__min_edit_similarity=0.05,
      filters__edit__min_edit_change=0.02,
      filters__entropy__min_entropy=2.0, encoding__rgb="auto"),
  )  # fmt: skip
  manifest = json.loads((tmp_path / "out/manifest.json").read_text())
  assert manifest["dropped"]["edit"] == manifest["dropped"]["entropy"] == 0
  kept = all_records(tmp_path / "out")
  assert len(kept) > 0.75 * len(given)
  kinds = {r.kind for r in kept.values()}
  assert kinds == {f"edit-{kind}" for kind in generate.KINDS}
  checked = 0
  for record in kept.values():
    assert record.target.width in (64, 96)
    change = masks.of(record)
    if change is None:
      continue
    assert change.shape == (record.target.height, record.target.width)
    source = decode_image(record.references[0])
    target = decode_image(record.target)
    stays = ~change
    if source.size == target.size and stays.any():
      checked += 1
      np.testing.assert_array_equal(
        pixels(source)[stays], pixels(target)[stays]
      )
  assert checked > 15


def test_a_contact_sheet_shows_every_kind(tmp_path):
  path = tmp_path / "sheet.png"
  page = contact_sheet.contact_sheet(
    path, [], dataclasses.replace(options(count=14), languages=("en",))
  )
  assert Image.open(path).size == page.size
  rows = np.asarray(page.convert("L"))[:, 100:]
  assert (rows < 250).any(1).mean() > 0.6
  # The names of the kinds, one below the other.
  names = (np.asarray(page.convert("L"))[:, :90] < 128).any(1)
  starts = np.flatnonzero(names[1:] & ~names[:-1])
  assert (np.diff(starts) > 100).sum() + 1 == len(generate.KINDS)
  with pytest.raises(InputError, match="cannot be written"):
    contact_sheet.contact_sheet(
      tmp_path / "no/sheet.png", [],
      dataclasses.replace(options(["style"], 1), languages=("en",)),
    )  # fmt: skip
  assert list(tmp_path.iterdir()) == [path]
