# SPDX-License-Identifier: Apache-2.0
"""The command: datasets of synthetic text, and what it says of bad input."""

import json
import os
import re
import signal
import subprocess
import sys

import interrupts
import numpy as np
import pytest
from PIL import Image
from stages import run

from data_pipelines.errors import InputError
from data_pipelines.loader.config import LoaderConfig, Phase, Resolution
from data_pipelines.loader.loader import Loader
from data_pipelines.records import decode_image, encode, open_dataset
from data_pipelines.synthesis import coverage, generate, pure
from data_pipelines.synthesis.generate import Options

# Of the fonts that every matplotlib has.
LANGUAGES = ("en", "ar")


def options(**fields):
  given = {
    "count": 20, "strategies": ("pure",), "languages": LANGUAGES,
    "sizes": ((160, 128), (128, 160)),
  }  # fmt: skip
  return Options(**given | fields)


def records_of(path):
  dataset = open_dataset(path)
  found = [dataset[i] for i in range(len(dataset))]
  dataset.close()
  return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  out = tmp_path_factory.mktemp("synthesis") / "data"
  rejected = generate.generate(out, options(), processes=1)
  return out, rejected


def test_processes_change_nothing(made, tmp_path):
  generate.generate(tmp_path / "two", options(), processes=2)
  one, two = (
    list(map(encode, records_of(p))) for p in (made[0], tmp_path / "two")
  )
  assert one == two and len(one) == 20
  for name in ("manifest.json", "quarantine.jsonl"):
    assert (made[0] / name).read_text() == (tmp_path / "two" / name).read_text()
  fewer = generate.make(generate.prepare(options(count=3)), 2)
  assert encode(fewer.record) == one[2]
  seeded = generate.make(generate.prepare(options(seed=1)), 2)
  assert encode(seeded.record) != one[2]


def test_records_hold_text_boxes_and_layout(made):
  found = records_of(made[0])
  assert [r.kind for r in found[:4]] == ["text-pure-en", "text-pure-ar"] * 2
  sizes = set()
  for record in found:
    image = decode_image(record.target)
    layout = record.provenance["layout"]
    assert layout["size"] == list(image.size) and image.mode == "RGB"
    sizes.add(image.size)
    text = "\n".join(line["text"] for line in layout["lines"])
    assert record.provenance["text"] == text and text
    assert record.task == "t2i" and record.provenance["strategy"] == "pure"
    assert all(block["text"] in record.caption for block in layout["blocks"])
  assert sizes == {(160, 128), (128, 160)}
  manifest = json.loads((made[0] / "manifest.json").read_text())
  source = manifest["source"]
  assert source["rejected"] == made[1] and source["seed"] == 0
  assert "DejaVuSans.ttf" in source["font_files"]
  assert manifest["by_kind"] == {"text-pure-en": 10, "text-pure-ar": 10}


def test_what_a_font_cannot_draw_is_left_out_and_counted(tmp_path):
  texts = tmp_path / "texts.txt"
  texts.write_text("fine\nnot 中\n{{open}}\n", encoding="utf-8")
  rejected = generate.generate(
    tmp_path / "some", options(languages=("en",), texts=str(texts)), 1
  )
  found = records_of(tmp_path / "some")
  blocks = [b for r in found for b in r.provenance["layout"]["blocks"]]
  assert {block["text"] for block in blocks} == {"fine"}
  assert rejected[coverage.NO_GLYPH] > 3 and rejected[coverage.PLACEHOLDER] > 3
  manifest = json.loads((tmp_path / "some/manifest.json").read_text())
  assert manifest["source"]["rejected"] == dict(sorted(rejected.items()))
  # Nothing but such text: every sample is quarantined, and nothing written.
  texts.write_text("中", encoding="utf-8")
  with pytest.raises(InputError, match=r"No record was written .*20 were"):
    generate.generate(
      tmp_path / "none", options(languages=("en",), texts=str(texts)), 1
    )
  assert not (tmp_path / "none").exists()


def test_a_sample_that_fails_ten_times_is_quarantined(tmp_path, monkeypatch):
  original = pure.draw

  def sometimes(language, faces, size, rng, texts, photos):
    if language.code == "ar":
      return pure.Rejected("no luck")
    return original(language, faces, size, rng, texts, photos)

  monkeypatch.setattr(pure, "draw", sometimes)
  rejected = generate.generate(tmp_path / "out", options(), processes=1)
  assert rejected["no luck"] == 100
  lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
  assert len(lines) == 10 and len(records_of(tmp_path / "out")) == 10
  assert json.loads(lines[0]) == {
    "id": "synthesis-0-00000001", "reason": "no luck", "where": "pure ar",
  }  # fmt: skip


def test_every_language_has_every_strategy_that_can_draw_it():
  pairs = generate.pairs_of(Options(count=1))
  assert len(pairs) == len(set(pairs)) == 3 * 8 - 1
  assert ("template", "zh-vertical") not in pairs
  assert [strategy for strategy, _ in pairs[:3]] == list(generate.STRATEGIES)


def test_png_is_lossless_and_jpeg_is_small(made, tmp_path):
  generate.generate(tmp_path / "jpeg", options(encoding="jpeg"), processes=1)
  for png, jpeg in zip(records_of(made[0]), records_of(tmp_path / "jpeg")):
    assert png.target.data[:4] == b"\x89PNG"
    assert jpeg.target.data[:2] == b"\xff\xd8"
    assert png.provenance["layout"] == jpeg.provenance["layout"]
    a, b = (np.asarray(decode_image(r.target), float) for r in (png, jpeg))
    assert 0 < np.abs(a - b).mean() < 5
  job = generate.prepare(options())
  rng = np.random.default_rng(0)
  sample = generate.draw("pure", "en", (160, 128), job, rng)
  encoded = generate._encode(sample.image, "png")
  np.testing.assert_array_equal(
    np.asarray(decode_image(encoded)), np.asarray(sample.image)
  )


def test_the_loader_and_the_offline_pipeline_read_it(made, tmp_path):
  buckets = {"all": Resolution(((128, 160), (160, 128)), 4)}
  phases = (Phase(0, {"all": 1.0}),)
  loader = Loader(
    LoaderConfig((made[0],), buckets, phases, threads=1, repeat_small=True)
  )
  batch = next(iter(loader.iterate(0)))
  loader.close()
  assert batch["image"].shape[0] == 4
  where = tmp_path / "stage"
  run(where, made[0])
  manifest = json.loads((where / "manifest.json").read_text())
  assert manifest["in"] == 20 and manifest["kept"] > 0
  kept = records_of(where / "data")[0]
  assert kept.provenance["layout"]["lines"]


@pytest.mark.parametrize("fields, message", [
  ({"strategies": ("fancy",)}, "strategies"), ({"languages": ()}, "languages"),
  ({"strategies": ("template",), "languages": ("zh-vertical",)}, "vertical"),
  ({"count": 0}, "at least one image"), ({"seed": -1}, "seed"),
  ({"sizes": ((64, 512),)}, "128 to 4096"), ({"encoding": "gif"}, "format"),
])  # fmt: skip
def test_bad_options_are_named(fields, message):
  with pytest.raises(InputError, match=message):
    options(**fields)


def test_missing_inputs_are_named_and_nothing_is_written(made, tmp_path):
  (tmp_path / "empty").mkdir()
  for fields, message in (
    ({"fonts": str(tmp_path / "no")}, "Font folder"),
    ({"texts": str(tmp_path / "no")}, "cannot be read"),
    ({"backgrounds": str(tmp_path / "empty")}, "holds no photo"),
  ):
    with pytest.raises(InputError, match=message):
      generate.generate(tmp_path / "out", options(**fields))
  with pytest.raises(InputError, match="already exists"):
    generate.generate(made[0], options())
  assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_photos_become_backgrounds(tmp_path):
  (tmp_path / "photos").mkdir()
  Image.new("RGB", (300, 200), (200, 230, 220)).save(tmp_path / "photos/a.jpg")
  given = options(backgrounds=str(tmp_path / "photos"))
  job = generate.prepare(given)
  made = [generate.make(job, i).record for i in range(12)]
  kinds = {r.provenance["layout"]["background"] for r in made}
  assert "a photo" in kinds and len(kinds) > 2


def command(out, *words):
  return [
    sys.executable, "-m", "data_pipelines.synthesis", f"--out={out}",
    "--strategies=pure", "--languages=en,ar", "--sizes=256x256", *words,
  ]  # fmt: skip


def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path):
  done = subprocess.run(
    command(tmp_path / "out", "--languages=xx"), capture_output=True, text=True
  )
  assert done.returncode == 2 and "languages ['xx'] must be" in done.stderr
  assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(tmp_path):
  process = subprocess.Popen(
    command(tmp_path / "out", "--count=100000", "--processes=2"),
    stderr=subprocess.PIPE, text=True, preexec_fn=interrupts.heard,
    start_new_session=True,
  )  # fmt: skip
  seen = ""
  while not re.search(r" [1-9]\d*/100000", seen):  # all processes are at work
    read = process.stderr.read(1)
    assert read, seen
    seen += read
  os.killpg(process.pid, signal.SIGINT)  # as a terminal does
  _, words = process.communicate(timeout=120)
  assert process.returncode == 130, words
  assert "nothing was written" in words and "Traceback" not in words
  assert not list(tmp_path.iterdir())
