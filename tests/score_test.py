# SPDX-License-Identifier: Apache-2.0
"""`python -m qi2_jax.score`: its values, its files, and its second start."""

import io
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from PIL import Image

from data_pipelines import codec, records
from data_pipelines.cli import exclusive
from data_pipelines.engine import shards
from data_pipelines.errors import InputError as DataError
from data_pipelines.images import EncodedImage, encode_png
from qi2_jax import score, scorer
from qi2_jax.errors import InputError
from qi2_jax.parallel import distributed

torch = pytest.importorskip("torch")
folders = pytest.importorskip("image_text_folders")
ROOT = pathlib.Path(__file__).parent.parent


def examples():
  """Nine records of several sizes; one is damaged, one is transparent."""
  rng = np.random.default_rng(0)
  out = []
  for i in range(9):
    channels = 4 if i == 3 else 3
    pixels = rng.integers(0, 256, (30 + 7 * i, 64 - 3 * i, channels), np.uint8)
    image = encode_png(pixels)
    if i == 5:
      image = EncodedImage(image.data[:80], image.width, image.height, "RGB")
    caption = folders.TEXTS[i % len(folders.TEXTS)] + f" {i}"
    out.append(codec.Record(f"id{i}", "t2i", caption, "user", image, (), {}))
  return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("clip")
  return (*folders.clip(path), str(path))


@pytest.fixture(scope="module")
def head(tmp_path_factory):
  rng = np.random.default_rng(1)
  path = tmp_path_factory.mktemp("head") / "linear.safetensors"
  arrays = {"weight": rng.normal(size=(1, 24)), "bias": np.ones(1)}
  arrays = {k: v.astype(np.float32) for k, v in arrays.items()}
  safetensors.numpy.save_file(arrays, path)
  return str(path), arrays


@pytest.fixture
def dataset(tmp_path):
  with records.DatasetWriter(tmp_path / "data", shards=2) as out:
    for record in examples():
      out.add(record)
  return str(tmp_path / "data")


def values(dataset, model, head="", **fields):
  given = {
    "model": model[-1], "input": dataset, "out": "", "name": "clip",
    "head": head and head[0], "batch_size": 4, "threads": 2,
  }  # fmt: skip
  return types.SimpleNamespace(**given | fields)


def over_white(record):
  image = Image.open(io.BytesIO(record.target.data))
  if image.mode == "RGB":
    return image
  white = Image.new("RGB", image.size, "white")
  white.paste(image, mask=image.getchannel("A"))
  return white


def test_scores_equal_transformers(dataset, model, head):
  theirs, tokenizer, processor, _ = model
  folder = score.score(values(dataset, model, head))
  assert folder == pathlib.Path(dataset) / "score" / "clip"
  names = [f"part-0000{i}-of-00002" for i in range(2)]
  assert sorted(p.name for p in folder.iterdir()) == sorted(
    name + ending for name in names for ending in (".parquet", ".done.json")
  )
  rows = [
    r for n in names for r in pq.read_table(folder / f"{n}.parquet").to_pylist()
  ]
  # Records go round robin over the shards.
  given = examples()[::2] + examples()[1::2]
  assert [row["id"] for row in rows] == [r.id for r in given]
  bad = next(row for row in rows if row["id"] == "id5")
  assert set(bad) == {"id", "clip_alignment", "embedding", "aesthetic"}
  assert all(v is None for k, v in bad.items() if k != "id")
  sound = [r for r in given if r.id != "id5"]
  ids = tokenizer(
    [r.caption for r in sound], padding="max_length", truncation=True,
    max_length=21, return_tensors="pt",
  )["input_ids"]  # fmt: skip
  images = [over_white(r) for r in sound]
  pixels = processor(images, return_tensors="pt")["pixel_values"]
  with torch.no_grad():
    out = theirs(input_ids=ids, pixel_values=pixels)
  embedding = out.image_embeds.numpy()
  cosine = (embedding * out.text_embeds.numpy()).sum(axis=1)
  marks = embedding @ head[1]["weight"][0] + 1
  rows = [row for row in rows if row["id"] != "id5"]
  for name, expected, close in (
    ("clip_alignment", cosine, 1e-5), ("aesthetic", marks, 1e-4),
    ("embedding", embedding, 5e-4),
  ):  # fmt: skip
    found = np.asarray([row[name] for row in rows])
    assert np.abs(found - expected).max() <= close
  assert np.std(cosine) > 1e-2
  marker = shards.read_marker(folder, names[1])
  assert marker["counts"] == {
    "model": os.path.basename(model[-1]), "head": "linear.safetensors",
    "random": False, "records": 4, "damaged": 1,
    "source_sha256": records.read_manifest(dataset)["shards"][1]["sha256"],
  }  # fmt: skip


def stamps(folder):
  return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_a_second_start_does_what_is_left(dataset, model, head, monkeypatch):
  given = values(dataset, model)
  folder = score.score(given)
  first = {p.name: p.read_bytes() for p in folder.iterdir()}
  before = stamps(folder)
  (folder / "part-00001-of-00002.done.json").unlink()
  (folder / "part-00001-of-00002.parquet.tmp-dead").write_bytes(b"half")
  score.score(given)
  after = stamps(folder)
  assert after.keys() == before.keys()
  assert {k for k in after if after[k] == before[k]} == {
    "part-00000-of-00002.parquet", "part-00000-of-00002.done.json",
  }  # fmt: skip
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == first
  # Finished: not even the model is read.
  load = scorer.load
  monkeypatch.setattr(scorer, "load", None)
  score.score(given)
  assert stamps(folder) == after
  # Another head, batch by batch the same model: everything is made again.
  monkeypatch.setattr(scorer, "load", load)
  score.score(values(dataset, model, head))
  table = pq.read_table(folder / "part-00000-of-00002.parquet")
  assert table.schema.field("aesthetic").type == pa.float32()
  assert table.schema.field("embedding").type == pa.list_(pa.float16())
  assert table.schema.field("clip_alignment").type == pa.float32()


def test_hosts_share_the_work_by_shard(dataset, model, monkeypatch):
  monkeypatch.setattr(distributed, "on_first", lambda work: work())
  monkeypatch.setattr("jax.process_count", lambda: 2)
  for host in (1, 0):
    monkeypatch.setattr("jax.process_index", lambda host=host: host)
    folder = score.score(values(dataset, model))
    assert (folder / f"part-0000{host}-of-00002.parquet").exists()
    assert len(list(folder.iterdir())) == (2 if host else 4)


def test_a_run_that_dies_leaves_whole_shards(dataset, model, monkeypatch):
  calls, call = [], scorer.dispatched

  def dies(*given):
    calls.append(given)
    if len(calls) == 2:
      raise RuntimeError("the device is gone")
    return call(*given)

  monkeypatch.setattr(scorer, "dispatched", dies)
  with pytest.raises(RuntimeError, match="the device is gone"):
    score.score(values(dataset, model, out=dataset + "-out"))
  folder = pathlib.Path(dataset + "-out", "score", "clip")
  assert {p.name for p in folder.iterdir()} == {
    "part-00000-of-00002.parquet", "part-00000-of-00002.done.json",
  }  # fmt: skip


def ingest(folder, parts):
  """The shards that the pipeline's verb *ingest* leaves behind."""
  for i, part in enumerate(parts):
    with shards.write(folder / "ingest", shards.name(i), "x") as shard:
      writer = shard.records()
      for record in part:
        writer.write(record)


def test_a_stage_is_scored_with_its_empty_shards(tmp_path, model, head):
  encoded = [codec.encode(record) for record in examples()]
  ingest(tmp_path, [encoded[:5], [], [*encoded[5:], b"no record"]])
  folder = score.score(values(str(tmp_path), model, head))
  assert folder == tmp_path / "score" / "clip"
  read = [pq.read_table(folder / f"part-0000{i}.parquet") for i in range(3)]
  assert [t.num_rows for t in read] == [5, 0, 5]
  assert read[0].schema == read[1].schema == read[2].schema
  assert read[2]["id"].to_pylist() == ["id5", "id6", "id7", "id8", None]
  assert read[2]["clip_alignment"].null_count == 2


def test_a_stage_that_is_being_written_is_not_scored(tmp_path, model):
  stage = tmp_path / "stage"
  ingest(stage, [[codec.encode(examples()[0])]])
  elsewhere = values(str(stage), model, out=str(tmp_path / "out"))
  for given in (values(str(stage), model), elsewhere):
    with (
      exclusive(stage),
      pytest.raises(InputError, match=r"Another run is writing to .*stage"),
    ):
      score.score(given)
  assert not (stage / "score").exists()
  assert not (tmp_path / "out" / "score").exists()
  score.score(values(str(stage), model))


def test_what_cannot_be_scored_is_named(tmp_path, model, head, dataset):
  for fields, message in (
    ({"input": str(tmp_path / "none")}, "does not exist"),
    ({"name": "../x"}, "no name of a folder"),
    ({"model": str(tmp_path)}, r"config\.json does not exist"),
    ({"head": str(tmp_path / "no.safetensors")}, "unreadable"),
  ):
    with pytest.raises((InputError, DataError), match=message):
      given = vars(values(dataset, model)) | fields
      score.score(types.SimpleNamespace(**given))
  (tmp_path / "stage" / "ingest").mkdir(parents=True)
  with pytest.raises(InputError, match="run the pipeline's verb ingest"):
    score.sources(str(tmp_path / "stage"))
  ingest(tmp_path / "stage", [[codec.encode(examples()[0])]])
  (tmp_path / "stage" / "ingest" / "part-00000.done.json").unlink()
  with pytest.raises(DataError, match="not complete"):
    score.sources(str(tmp_path / "stage"))


def test_the_command_with_random_weights_says_so(dataset, tmp_path):
  command = [
    sys.executable, "-m", "qi2_jax.score", "--model=random", "--head=random",
    f"--input={dataset}", "--name=clip", f"--out={tmp_path / 'out'}",
  ]  # fmt: skip
  done = subprocess.run(
    command, cwd=ROOT, text=True, capture_output=True, env=os.environ
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "RANDOM WEIGHTS" in done.stderr and "9/9" in done.stderr
  folder = pathlib.Path(done.stdout.strip())
  marker = json.loads((folder / "part-00000-of-00002.done.json").read_text())
  assert marker["counts"]["random"] is True
  found = pq.read_table(folder / "part-00000-of-00002.parquet").to_pylist()
  alignment = [row["clip_alignment"] for row in found]
  assert np.std(alignment) > 1e-4 and np.abs(alignment).max() <= 1
