# SPDX-License-Identifier: Apache-2.0
"""The demo's data through the whole pipeline, and training on it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import demo_data, records
from data_pipelines.caption import stand_in
from data_pipelines.caption.endpoint import Client, Endpoint, Failed
from data_pipelines.caption.prepare import prepare
from data_pipelines.codec import encode
from data_pipelines.errors import InputError
from data_pipelines.shapes.generate import Options, generate
from data_pipelines.sources.items import Limits
from qi2_jax import demo


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
  path = tmp_path_factory.mktemp("drawn") / "drawn"
  generate(path, Options(t2i=90, edits=20, shards=1), workers=1)
  return records.open_dataset(path)


def test_the_stand_in_answers_with_what_was_drawn(drawn):
  every = [drawn[i] for i in range(len(drawn))]
  truth = stand_in.learn(every[1:])
  with stand_in.serve(truth) as url:
    client = Client(
      Endpoint((url,), stand_in.MODEL, attempts=1, backoff=0.01, timeout=10.0)
    )
    for record in (every[5], every[-1]):
      shown = prepare(encode(record), 1536, Limits()).images
      assert len(shown) == 1 + len(record.references)
      answer = client(shown, "Whatever is asked.", 0)
      assert answer == record.caption
    unknown = prepare(encode(every[0]), 1536, Limits()).images
    other_source = (*unknown, shown[-1])
    for images in (unknown, other_source):
      with pytest.raises(Failed, match="422"):
        client(images, "Whatever is asked.", 0)


def test_the_raw_folder_is_as_people_leave_them(drawn, tmp_path):
  demo_data.write_raw(drawn, tmp_path / "raw")
  text = (tmp_path / "raw" / "metadata.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  whole = [x for x in lines if x["file_name"][:-4].isdigit()]
  assert len(whole) == 110 and len(lines) - 110 == 3 + 2 + 2
  assert sum("text" in line for line in whole) == 55
  assert sum("references" in line for line in whole) == 20
  for line in whole:
    record = drawn[int(line["file_name"][:-4])]
    names = [line["file_name"], *line.get("references", ())]
    for name, image in zip(names, (record.target, *record.references)):
      assert (tmp_path / "raw" / name).read_bytes() == image.data
    assert line.get("text", record.caption) == record.caption
  before = (tmp_path / "raw").stat().st_mtime_ns
  demo_data.write_raw(drawn, tmp_path / "raw")
  assert (tmp_path / "raw").stat().st_mtime_ns == before
  assert [p.name for p in tmp_path.iterdir()] == ["raw"]


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setattr(demo_data, "_NEEDED", ("no_such_package",))
  with pytest.raises(InputError, match=r"data,synthesis"):
    demo_data.make(tmp_path / "out", demo_data.QUICK)
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_pipeline_makes_what_the_demo_trains_on(tmp_path):
  """Filters, captions of the server, text and edits; then a short training."""
  pytest.importorskip("uharfbuzz")
  work = tmp_path / "demo"
  data_phase, _, pretrain, *_ = demo.plan(work, None, 0.1, True, True)
  command(data_phase.arguments)
  stage = work / "data" / "stage"
  manifest = json.loads((stage / "manifest.json").read_text())
  assert data_phase.product == stage / "manifest.json"
  dropped = manifest["dropped"]
  assert manifest["kept"] > 350 and dropped["broken"] == 4
  assert dropped["exact_duplicate"] >= 6 and dropped["resolution"] == 4
  assert manifest["by_task"]["t2i"] > 200 and manifest["by_task"]["ti2i"] > 100
  kinds = " ".join(manifest["by_kind"])
  assert all(word in kinds for word in ("glyph", "text-pure-en", "restore"))
  by = manifest["by_caption"]
  assert min(by["original"], by["general"], by["edit"]) > 30
  check_shapes(work / "data")
  command([
    # The VAE of the demo takes minutes to train; random weights do here.
    *(a for a in pretrain.arguments if not a.startswith("--config.vae")),
    "--config.num_steps=4", "--config.preview_every=4", "--config.log_every=2",
  ])  # fmt: skip
  lines = (work / "pretrain" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines][-1] == 4
  assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


def command(arguments):
  done = subprocess.run(
    [sys.executable, *arguments], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def check_shapes(folder):
  """Pixels as they were drawn; captions as drawn, found or asked for."""
  drawn = records.open_dataset(folder / "drawn")
  data = records.open_dataset(folder / "stage" / "data")
  compared = 0
  for record in (data[i] for i in range(len(data))):
    name = record.id.removeprefix("raw/")[:-4]
    if not name.isdigit():
      continue
    truth = drawn[int(name)]
    compared += 1
    assert record.task == truth.task and record.kind == truth.kind
    assert record.target == truth.target
    assert record.references == truth.references
    assert record.caption == truth.caption
  assert compared > 300
