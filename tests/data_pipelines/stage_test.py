# SPDX-License-Identifier: Apache-2.0
"""Whole stages on small folders: sums, resumption, retries."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import folder, jpeg
from stages import all_records, config, content, reasons, run

from data_pipelines import records
from data_pipelines.errors import InputError
from data_pipelines.images import decode_image
from data_pipelines.loader.config import LoaderConfig, Phase, Resolution
from data_pipelines.loader.loader import Loader


def test_everything_is_accounted_for(finished):
  path, _, _, manifest = finished
  out = path / "out"
  assert manifest["in"] == 17
  assert {k: v for k, v in manifest["dropped"].items() if v} == {
    "broken": 1, "resolution": 1, "exact_duplicate": 1,
  }  # fmt: skip
  assert reasons(out) == {
    "in/zero.jpg": "empty file", "in/mute.jpg": "image without caption",
  }  # fmt: skip
  assert manifest["quarantined"] == 2 and manifest["kept"] == 12
  assert json.loads((out / "manifest.json").read_text()) == manifest
  assert list(manifest["dropped"])[:2] == ["broken", "resolution"]
  verdicts = pq.read_table(out / "decide" / "verdicts.parquet").to_pylist()
  assert {v["id"]: v["filter"] for v in verdicts if not v["kept"]} == {
    "in/cut.jpg": "broken",
    "in/small.jpg": "resolution",
    "in/twin.jpg": "exact_duplicate",
  } or {v["id"] for v in verdicts if not v["kept"]} == {
    "in/cut.jpg", "in/small.jpg", "in/p003.jpg",
  }  # fmt: skip
  assert manifest["by_task"] == {"t2i": 11, "ti2i": 1}
  assert manifest["by_kind"] == {"edit": 1, "user": 11}
  assert "stand-in" in manifest["scores"]["clip"]
  names = {path.name for path in out.iterdir()}
  assert names >= {"ingest", "measure", "score", "decide", "data"}
  assert not [p for p in out.rglob("*") if ".tmp" in p.name]


def test_the_dataset_has_the_bucket_and_the_origin_of_each_record(finished):
  path, where, _, manifest = finished
  found = all_records(path / "out")
  assert len(found) == manifest["kept"]
  one = found["in/p000.jpg"]
  assert (one.target.width, one.target.height) == (64, 64)
  assert one.provenance["original_size"] == [80, 72]
  assert one.provenance["where"] == "p000.jpg"
  assert found["in/alpha.png"].target.mode == "RGBA"
  edit = found["in/t.webp"]
  assert [(i.width, i.height) for i in (edit.target, *edit.references)] == [
    (96, 64)
  ] * 3
  raw = decode_image(records.EncodedImage(jpeg(0), 80, 72, "RGB"))
  box = (4, 0, 76, 72)  # the centre, as wide as the square bucket
  expected = raw.resize((64, 64), resample=1, box=box)  # 1: Lanczos
  got = np.asarray(decode_image(one.target)).astype(int)
  assert np.abs(got - np.asarray(expected)).max() == 0
  assert found["in/p000.jpg"].caption == "a soft picture, number 0"
  raw_file = path / "out" / "ingest" / "part-00000.array_record"
  assert (where / "p000.jpg").read_bytes() in raw_file.read_bytes()


def test_the_loader_reads_it(finished):
  path, _, cfg, _ = finished
  buckets = tuple(tuple(b) for b in cfg.resolutions[0])
  loader = Loader(
    LoaderConfig(
      (str(path / "out" / "data"),), {"all": Resolution(buckets, 2)},
      (Phase(0, {"all": 1.0}),), max_enlarge=1.0, threads=0,
      repeat_small=True,
    )
  )  # fmt: skip
  assert sum(program.count for program in loader.programs) == 12
  assert "dropped" not in loader.report()
  batches = loader.iterate()
  shapes = {next(batches)["image"].shape for _ in range(20)}
  assert shapes == {(2, 64, 64, 4), (2, 64, 96, 4)}
  loader.close()


def test_a_finished_stage_does_nothing(finished, verbs, capsys):
  path, where, cfg, manifest = finished
  before = {
    p: (p.stat().st_mtime_ns, p.stat().st_ino)
    for p in (path / "out").rglob("part-*")
    if "data" not in p.relative_to(path / "out").parts
  }
  assert run(path / "out", where, config=cfg) == manifest
  assert verbs == []
  assert capsys.readouterr().out.count("nothing to do") == 6
  assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in before}
  # Without inputs the last listing counts.
  assert run(path / "out", config=cfg) == manifest


def test_a_changed_threshold_decides_and_materialises_again(
  finished, verbs, tmp_path
):
  path, where, _, manifest = finished
  out = tmp_path / "out"
  shutil.copytree(path / "out", out)
  strict = config(
    filters__edit__min_edit_similarity=None, filters__resolution__min_pixels=0
  )
  changed = run(out, where, config=strict)
  # Only the shard of the record that came back is made again.
  assert verbs == [("materialise", 1)]
  # 50 x 70 fills no bucket: the funnel says so.
  assert changed["dropped"]["resolution"] == 0
  assert changed["dropped"]["bucket"] == 1
  assert changed["kept"] == manifest["kept"]
  larger = config(
    filters__edit__min_edit_similarity=None,
    filters__resolution__min_pixels=0,
    max_enlarge=1.4,
  )
  assert run(out, where, config=larger)["kept"] == manifest["kept"] + 1
  assert run(out, where, config=strict) == changed
  assert run(out, where, config=finished[2]) == manifest
  assert content(out) == content(path / "out")


def test_what_is_added_makes_one_more_shard(verbs, tmp_path):
  where = folder(tmp_path / "in", 16)
  run(tmp_path / "out", where)
  verbs.clear()
  folder(where, 3, first=16)
  manifest = run(tmp_path / "out", where)
  assert verbs == [
    ("ingest", 1), ("measure", 1), ("score/clip", 1), ("score/nsfw", 1),
    ("materialise", 1),
  ]  # fmt: skip
  assert manifest["in"] == manifest["kept"] == 19
  verbs.clear()
  (where / "p009.txt").write_text("a soft picture, described anew")
  run(tmp_path / "out", where)
  assert verbs[0] == ("ingest", 1)
  changed = all_records(tmp_path / "out")["in/p009.jpg"]
  assert changed.caption == "a soft picture, described anew"
  for name in ("p017", "p018"):
    (where / f"{name}.jpg").unlink()
    (where / f"{name}.txt").unlink()
  assert run(tmp_path / "out", where)["in"] == 17
  shutil.rmtree(where)
  folder(where, 8)
  assert run(tmp_path / "out", where)["in"] == 8
  shards = {p.name for p in (tmp_path / "out").rglob("part-00001*")}
  assert shards == set()


def test_retry_reads_only_what_failed_for_that_reason(verbs, tmp_path):
  where = folder(tmp_path / "in", 20)
  good = (where / "p003.jpg").read_bytes()
  (where / "p003.jpg").write_bytes(b"GIF89a")
  (where / "p004.jpg").write_bytes(b"")
  out = tmp_path / "out"
  run(out, where)
  assert set(reasons(out)) == {"in/p003.jpg", "in/p004.jpg"}
  (where / "p003.jpg").write_bytes(good)
  (where / "p004.jpg").write_bytes(jpeg(4))
  (where / "p005.jpg").write_bytes(jpeg(99))  # must not be read again
  verbs.clear()
  run(out, where, retry="not a PNG, JPEG or WebP image")
  assert reasons(out) == {"in/p004.jpg": "empty file"}
  assert verbs[:2] == [("ingest", 1), ("measure", 1)]
  run(out, where, retry="all")
  assert reasons(out) == {}
  (where / "p005.jpg").write_bytes(jpeg(5))
  fresh = run(tmp_path / "fresh", where)
  assert fresh["in"] == 20 and fresh["quarantined"] == 0
  kept = lambda o: {p: b for p, b in content(o).items() if "done" not in p}  # noqa: E731
  assert kept(out) == kept(tmp_path / "fresh")


def test_retry_measures_again_what_ran_out_of_time(tmp_path):
  where = folder(tmp_path / "in", 6)
  out = tmp_path / "out"
  run(out, where)
  expected = content(out)
  path = out / "measure" / "part-00000.parquet"
  table = pq.read_table(path)
  rows = table.to_pylist()
  rows[2] = {"id": rows[2]["id"], "error": "ran out of time (30 s)"}
  pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
  marker = out / "measure" / "part-00000.done.json"
  value = json.loads(marker.read_text())
  value["files"][".parquet"]["bytes"] = path.stat().st_size
  marker.write_text(json.dumps(value))
  with pytest.raises(InputError, match=r"reasons are \['ran out of time'\]"):
    run(out, where, retry="something else")
  run(out, where)
  assert pq.read_table(path)["error"].to_pylist()[2]
  run(out, where, retry="ran out of time")
  assert content(out) == expected


def test_a_shard_with_too_many_errors_is_refused_and_others_go_on(tmp_path):
  where = folder(tmp_path / "in", 60)
  for i in range(20, 36):
    (where / f"p{i:03d}.jpg").write_bytes(b"")
  cfg = config(shard_records=20)
  with pytest.raises(InputError, match=r"16 of 20 .*\(16\): empty file"):
    run(tmp_path / "out", where, config=cfg)
  done = {p.name for p in (tmp_path / "out" / "ingest").glob("*.done.json")}
  assert done == {"part-00000.done.json", "part-00002.done.json"}
  assert not (tmp_path / "out" / "manifest.json").exists()
  lenient = config(shard_records=20, max_error_rate=0.9)
  assert run(tmp_path / "out", where, config=lenient)["quarantined"] == 16


def test_names_that_are_no_unicode(tmp_path):
  where = folder(tmp_path / "in", 1)
  for name, data in ((b"odd\xff", jpeg(1)), (b"void\xff", b"")):
    path = os.fsencode(where) + b"/" + name
    with open(path + b".jpg", "wb") as file:
      file.write(data)
    with open(path + b".txt", "w") as file:
      file.write("a soft picture, oddly named")
  run(tmp_path / "out", where)
  assert set(all_records(tmp_path / "out")) == {
    "in/p000.jpg",
    "in/odd\\xff.jpg",
  }
  assert reasons(tmp_path / "out") == {"in/void\\xff.jpg": "empty file"}
