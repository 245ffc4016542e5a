# SPDX-License-Identifier: Apache-2.0
"""Stages of stages, scores of models, and requests that cannot be met."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import folder
from stages import all_records, config, run

from data_pipelines import cli
from data_pipelines.engine import shards
from data_pipelines.errors import InputError


def test_later_stages_link_what_earlier_ones_kept(finished, verbs, tmp_path):
  path, _, cfg, first = finished
  more = folder(tmp_path / "more", 3, first=30)
  second = run(tmp_path / "out", path / "out", more, config=cfg)
  count = len(first["ingest"])
  assert verbs == [
    ("ingest", count + 1), ("measure", 1), ("score/clip", 1),
    ("score/nsfw", 1), ("materialise", count + 1),
  ]  # fmt: skip
  assert second["in"] == first["kept"] + 3
  assert second["kept"] == second["in"]
  assert second["inputs"] == [
    {"name": "out", "parent": first["id"]}, {"name": "more"},
  ]  # fmt: skip
  name = "ingest/part-00000.array_record"
  assert os.path.samefile(path / "out" / name, tmp_path / "out" / name)
  assert set(all_records(tmp_path / "out")) == set(
    all_records(path / "out")
  ) | {f"more/p{i:03d}.jpg" for i in range(30, 33)}
  with pytest.raises(InputError, match="is both in shard 0 and in shard"):
    run(tmp_path / "twice", path / "out", path / "out", config=cfg)
  (path / "out" / "manifest.json").rename(tmp_path / "manifest.json")
  try:
    with pytest.raises(InputError, match="is not a complete stage"):
      run(tmp_path / "third", path / "out", config=cfg)
  finally:
    (tmp_path / "manifest.json").rename(path / "out" / "manifest.json")


def test_datasets_are_inputs(finished, tmp_path):
  path, _, cfg, first = finished
  second = run(tmp_path / "out", path / "out" / "data", config=cfg)
  assert second["in"] == second["kept"] == first["kept"]
  assert set(all_records(tmp_path / "out")) == set(all_records(path / "out"))
  assert [r.target for r in all_records(tmp_path / "out").values()] == [
    r.target for r in all_records(path / "out").values()
  ]


def test_scores_of_models_are_taken_as_they_are(tmp_path, verbs):
  where = folder(tmp_path / "in", 10)
  out = tmp_path / "out"
  must = config(score__clip__stand_ins=())
  with pytest.raises(InputError, match=r"run `python -m qi2_jax\.score`"):
    run(out, where, config=must)
  for index in range(2):
    stem = f"part-{index:05d}"
    ids = pq.read_table(out / "measure" / f"{stem}.parquet")["id"].to_pylist()
    table = pa.table({
      "id": ids[::-1],  # in any order
      "clip_alignment": [0.1 if id == "in/p002.jpg" else 0.3 for id in ids][
        ::-1
      ],
      "embedding": [list(np.eye(10, dtype=np.float32)[i]) for i in
                    range(index * 8, index * 8 + len(ids))],
    })  # fmt: skip
    (out / "score" / "clip").mkdir(exist_ok=True)
    pq.write_table(table, out / "score" / "clip" / f"{stem}.parquet")
    (out / "score" / "clip" / f"{stem}.done.json").write_text('{"rows": 1}')
  verbs.clear()
  manifest = run(out, where, config=must)
  assert "score/clip" not in [label for label, _ in verbs]
  assert manifest["dropped"]["alignment"] == 1
  assert manifest["scores"]["clip"] == "model"
  assert "in/p002.jpg" not in all_records(out)


def test_scores_of_other_records_are_refused(tmp_path):
  where = folder(tmp_path / "in", 3)
  out = tmp_path / "out"
  run(out, where)
  marker = out / "score" / "clip" / "part-00000.done.json"
  value = json.loads(marker.read_text())
  sha256 = shards.sha256_of(out / "ingest", "part-00000", ".array_record")
  value["counts"] = {"model": "vit", "source_sha256": sha256}
  marker.write_text(json.dumps(value))
  assert run(out, where)["scores"]["clip"] == "model vit"
  value["counts"]["source_sha256"] = "0" * 64
  marker.write_text(json.dumps(value))
  with pytest.raises(InputError, match="records that have changed since"):
    run(out, where)


def test_nothing_left_is_an_error_that_says_why(tmp_path):
  where = folder(tmp_path / "in", 3)
  cfg = config(filters__resolution__min_pixels=10**9)
  with pytest.raises(InputError, match="3 dropped by resolution"):
    run(tmp_path / "out", where, config=cfg)
  assert not (tmp_path / "out" / "data").exists()
  assert "resolution" in (tmp_path / "out" / "report.html").read_text()


def test_two_runs_in_one_folder_are_refused(tmp_path):
  where = folder(tmp_path / "in", 1)
  with cli.exclusive(tmp_path / "out"):
    with pytest.raises(InputError, match="Another run is writing"):
      run(tmp_path / "out", where)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"encoding__rgb": "bmp"}, r"config\.encoding\.rgb is 'bmp'"),
    ({"max_error_rate": 2}, r"config\.max_error_rate is 2"),
    ({"limits__pixels": 10**12}, r"config\.limits\.pixels"),
    ({"limits__nonsense": 1}, "nonsense"),
    ({"nonsense": 1}, r"unknown \['nonsense'\]"),
    ({"score__clip__stand_ins": ("gpt",)}, r"names the stand-ins \['gpt'\]"),
    ({"score__clip__stand_ins": "nsfw"}, "needs exactly the field"),
    ({"buckets": {}}, "buckets is empty"),
    ({"filters__entropy__nonsense": 1}, "nonsense"),
  ],
)
def test_unusable_configs_are_refused_before_any_work(change, message):
  with pytest.raises(InputError, match=message):
    config(**change)


def test_unusable_requests_are_refused(tmp_path):
  with pytest.raises(InputError, match="holds no ingested input"):
    run(tmp_path / "out")
  with pytest.raises(InputError, match="are unknown"):
    run(tmp_path / "out", verbs=("bake",))
  where = folder(tmp_path / "in", 1)
  with pytest.raises(InputError, match="run the verb 'ingest' first"):
    run(tmp_path / "out", where, verbs=("ingest",), runner="FnApiRunner")
    (tmp_path / "out" / "ingest" / "part-00000.done.json").unlink()
    run(tmp_path / "out", verbs=("measure",))
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="Cannot write to"):
    run(tmp_path / "file" / "out", where)
