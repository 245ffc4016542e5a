# SPDX-License-Identifier: Apache-2.0
"""Evaluation prompts and images do not reach training data."""

import json
import subprocess
import sys

import numpy as np
import pytest
from metric_table import dropped, judge, rows
from PIL import Image
from skimage import data as photos

from data_pipelines import decontaminate as clean_command
from data_pipelines import images, records
from data_pipelines.errors import InputError
from data_pipelines.filters import decontaminate, pixels

OPTIONS = {"ngram": 4, "min_overlap": 0.5, "max_phash": 6, "max_colour": 8.0}
PROMPT = "A red bicycle leans against the old stone wall of a mill"


@pytest.fixture
def prompts(tmp_path):
  path = tmp_path / "prompts.jsonl"
  lines = [
    {"prompt": PROMPT},
    {"text": "两只猫坐在红色的椅子上"},
    {"prompt": "a cat"},
  ]
  path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
  return path


@pytest.mark.parametrize(
  "caption, drops",
  [
    (PROMPT, True),
    ("A RED bicycle, leans against the old\nstone wall of a mill!", True),
    (PROMPT.translate({c: c + 0xFEE0 for c in range(0x21, 0x7F)}), True),
    (f"In a photo {PROMPT.lower()} at dawn, seen from the river", True),
    ("a red bicycle leans against the old stone barn", True),
    ("a green bicycle leans near the old stone wall of a barn", False),
    ("两只猫坐在红色的椅子上。", True),
    ("照片里两只猫坐在红色的沙发旁", True),
    ("两只狗躺在蓝色的地毯上", False),
    ("A cat.", True),
    ("a cat sleeps", False),
    ("", False),
  ],
)
def test_prompts(prompts, caption, drops):
  verdicts = judge(
    rows(1, caption=[caption]),
    ("decontaminate",),
    decontaminate={**OPTIONS, "prompts": [str(prompts)]},
  )
  assert bool(dropped(verdicts)) == drops
  row = verdicts.to_pylist()[0]
  if drops:
    assert row["value"] >= row["threshold"] == 0.5
    assert "evaluation prompt" in row["detail"]


def test_shares_against_brute_force(prompts):
  block = decontaminate.load([prompts], [], 3)
  rng = np.random.default_rng(0)
  vocabulary = decontaminate.words(PROMPT)

  def grams(sequence):
    return {sequence[i : i + 3] for i in range(len(sequence) - 2)}

  for _ in range(50):
    caption = tuple(rng.choice(vocabulary, 20))
    start = rng.integers(0, 8)
    caption = caption[:9] + vocabulary[start : start + 5] + caption[9:]
    share, _ = decontaminate.match_text(" ".join(caption), block)
    expected = len(grams(caption) & grams(vocabulary)) / len(grams(vocabulary))
    assert share == expected > 0


def photo_rows(*pictures):
  hashes = [
    pixels.hash_metrics(picture, picture.convert("L")) for picture in pictures
  ]
  columns = {name: [h[name] for h in hashes] for name in hashes[0]}
  return rows(len(pictures), **columns)


@pytest.fixture
def evaluation_images(tmp_path):
  folder = tmp_path / "evaluation" / "deep"
  folder.mkdir(parents=True)
  Image.fromarray(photos.coffee()).save(folder / "coffee.jpg", quality=60)
  Image.fromarray(photos.chelsea()).save(folder / "cat.png")
  (folder / "notes.txt").write_text("not an image")
  return folder.parent


def test_images(evaluation_images):
  coffee = Image.fromarray(photos.coffee())
  tinted = Image.fromarray(photos.coffee()[..., ::-1].copy())
  table = photo_rows(
    coffee.resize((300, 200)), Image.fromarray(photos.astronaut()), tinted
  )
  verdicts = judge(
    table,
    ("decontaminate",),
    decontaminate={**OPTIONS, "images": [str(evaluation_images)]},
  )
  assert dropped(verdicts).keys() == {"r0"}
  row = verdicts.to_pylist()[0]
  assert row["detail"] == "evaluation image deep/coffee.jpg"
  assert row["value"] <= row["threshold"] == 6


def test_a_prompt_is_named_before_an_image(prompts, evaluation_images):
  coffee = Image.fromarray(photos.coffee())
  table = photo_rows(coffee, coffee)
  captions = table.schema.get_field_index("caption")
  table = table.set_column(captions, "caption", [[PROMPT, "a cup"]])
  options = {
    **OPTIONS,
    "prompts": [str(prompts)],
    "images": [str(evaluation_images)],
  }
  found = judge(table, ("decontaminate",), decontaminate=options).to_pylist()
  assert found[0]["detail"].startswith("evaluation prompt")
  assert (found[0]["value"], found[0]["threshold"]) == (1, 0.5)
  assert found[1]["detail"].startswith("evaluation image")


def test_nearest_image_against_brute_force(monkeypatch):
  from fingerprints import colour_distance, fingerprints

  monkeypatch.setattr(decontaminate, "_BLOCK", 17)
  phash, _, thumb = fingerprints(120, flips=20)
  block = decontaminate.Blocklist(
    (), {}, {}, (), 4, tuple("x" * 40), phash[:40], thumb[:40]
  )
  distance, nearest = decontaminate.match_images(phash, thumb, block, 3.0)
  for i in range(120):
    near = {
      j: int(phash[i] ^ phash[j]).bit_count()
      for j in range(40)
      if colour_distance(thumb[i], thumb[j]) <= 3.0
    }
    best = min(near.values(), default=65)
    if best < 32:
      assert distance[i] == best and near[int(nearest[i])] == best
    else:
      assert distance[i] == 65


def test_broken_rows_are_judged_by_their_text(prompts, evaluation_images):
  table = rows(2, caption=[PROMPT, "other"], phash=[None, None])
  options = {**OPTIONS, "prompts": [str(prompts)],
             "images": [str(evaluation_images)]}  # fmt: skip
  verdicts = judge(table, ("decontaminate",), decontaminate=options)
  assert dropped(verdicts).keys() == {"r0"}


@pytest.mark.parametrize("name", ["missing.txt", "bad.jsonl", "latin.txt"])
def test_unusable_lists_are_told(tmp_path, name):
  (tmp_path / "bad.jsonl").write_text('{"question": "?"}\n')
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
  with pytest.raises(InputError, match=name):
    decontaminate.load([tmp_path / name], [], 4)


def test_nothing_to_compare_with(tmp_path):
  (tmp_path / "empty.txt").write_text("\n  \n...\n")
  with pytest.raises(InputError, match="neither prompts nor images"):
    decontaminate.load([tmp_path / "empty.txt"], [], 4)
  with pytest.raises(InputError, match="does not exist"):
    decontaminate.load([], [tmp_path / "nowhere"], 4)
  (tmp_path / "broken.png").write_bytes(b"no image")
  with pytest.raises(InputError, match=r"broken\.png"):
    decontaminate.load([], [tmp_path], 4)


@pytest.fixture
def dataset(tmp_path):
  """Two records that match evaluation sets among four."""
  pictures = [photos.coffee(), photos.chelsea(), photos.rocket(),
              photos.astronaut()]  # fmt: skip
  captions = ["a cup", "a pet", f"{PROMPT}!", "a portrait"]
  with records.DatasetWriter(tmp_path / "data", shards=2) as writer:
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
      image = images.encode_png(np.ascontiguousarray(picture[::2, ::2]))
      writer.add(
        records.Record(f"r{i}", "t2i", caption, "user", image, (), {"n": i})
      )
  return tmp_path / "data"


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "data_pipelines.decontaminate",
     *map(str, arguments)],
    capture_output=True, text=True,
  )  # fmt: skip


def test_the_command(tmp_path, dataset, prompts, evaluation_images):
  (evaluation_images / "deep" / "cat.png").unlink()
  out = tmp_path / "clean"
  done = command(
    f"--data={dataset}", f"--out={out}", f"--prompts={prompts}",
    f"--images={evaluation_images}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "2 records kept" in done.stdout
  assert "1 like an evaluation prompt" in done.stdout
  assert "1 like an evaluation image" in done.stdout
  before, after = map(records.open_dataset, (dataset, out))
  assert {r.id for r in map(after.__getitem__, range(2))} == {"r1", "r3"}
  by_id = {r.id: r for r in map(before.__getitem__, range(4))}
  assert all(by_id[r.id] == r for r in map(after.__getitem__, range(2)))
  assert len(after.manifest["shards"]) == 2
  removed = (out / "quarantine.jsonl").read_text("utf-8").splitlines()
  reasons = {r["id"]: r["reason"] for r in map(json.loads, removed)}
  assert reasons.keys() == {"r0", "r2"}
  assert reasons["r0"] == "evaluation image deep/coffee.jpg"
  with pytest.raises(InputError, match="already exists"):
    clean_command.clean(dataset, out, [prompts], [], OPTIONS)


def test_nothing_is_written_when_nothing_can_be_compared(tmp_path, dataset):
  with pytest.raises(InputError, match="neither prompts nor images"):
    clean_command.clean(dataset, tmp_path / "clean", [], [], OPTIONS)
  assert not (tmp_path / "clean").exists()


def test_chunks_do_not_matter(tmp_path, dataset, prompts, monkeypatch):
  monkeypatch.setattr(clean_command, "_CHUNK", 3)
  counts = clean_command.clean(
    dataset, tmp_path / "clean", [prompts], [], OPTIONS
  )
  assert counts == {"kept": 3, "evaluation prompt": 1}
