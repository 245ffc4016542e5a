# SPDX-License-Identifier: Apache-2.0
"""Captions of a stage, mixed when it is materialised; and the command."""

import os
import signal
import subprocess
import sys
import time

import pytest
from caption_data import ENGLISH_ONLY, client, dataset, table
from caption_server import ENGLISH, good, prompt_of
from pictures import jpeg, lines
from stages import all_records, config, run

from data_pipelines import captioner, records
from data_pipelines.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return dataset(tmp_path_factory.mktemp("captions") / "data")


def test_of_a_stage_what_was_kept_is_captioned_and_mixed(tmp_path, serve):
  where = tmp_path / "in"
  where.mkdir()
  for i in range(12):
    (where / f"p{i:02d}.jpg").write_bytes(jpeg(i))
    (where / f"p{i:02d}.txt").write_text(f"a soft picture, number {i}")
  (where / "small.jpg").write_bytes(jpeg(52, (50, 70)))
  (where / "small.txt").write_text("a soft picture, too small")
  out, mixed = tmp_path / "out", config(
    captions__kinds={"general": 0.5, "original": 0.5}
  )  # fmt: skip
  with pytest.raises(InputError, match=r"python -m data_pipelines.captioner"):
    run(out, where, config=mixed)
  captioner.caption(out, out / "caption", ENGLISH_ONLY, client(serve()))
  assert {row["id"] for row in table(out / "caption")} == {
    f"in/p{i:02d}.jpg" for i in range(12)
  }
  manifest = run(out, where, config=mixed)
  assert manifest["kept"] == 12
  by = manifest["by_caption"]
  assert sum(by.values()) == 12 and set(by) == {"general", "original"}
  found = records.open_dataset(out / "data")
  for record in (found[i] for i in range(len(found))):
    about = record.provenance["caption"]
    if about["kind"] == "general":
      assert record.caption == f'{ENGLISH} "OPEN"'
      assert about["original"].startswith("a soft picture")
    else:
      assert record.caption.startswith("a soft picture")
  # Nothing changes until the captions or the weights do.
  assert run(out, where, config=mixed) == manifest
  only = config(captions__kinds={"general": 1.0})
  assert run(out, where, config=only)["by_caption"] == {"general": 12}
  assert "by_caption" not in run(out, where, config=config())
  # What is kept later needs captions first.
  loose = config(
    captions__kinds={"general": 1.0}, filters__resolution__min_pixels=0,
    max_enlarge=1.4,
  )  # fmt: skip
  with pytest.raises(InputError, match=r"in/small\.jpg"):
    run(out, where, config=loose)
  captioner.caption(out, out / "caption", ENGLISH_ONLY, client(serve()))
  assert run(out, where, config=loose)["by_caption"] == {"general": 13}


def test_images_without_captions_wait_for_the_captioner(tmp_path, serve):
  where = tmp_path / "in"
  where.mkdir()
  for i in range(6):
    (where / f"p{i}.jpg").write_bytes(jpeg(i))
  (where / "p0.txt").write_text("a soft picture of nothing")
  edit = {"file_name": "p5.jpg", "references": ["p4.jpg"]}
  lines(where / "metadata.jsonl", [edit])
  out = tmp_path / "out"
  manifest = run(out, where)
  assert manifest["kept"] == 1 and manifest["reasons"] == {
    "image without caption": 3, "no `text` in metadata": 1,
  }  # fmt: skip
  takes = {"limits__uncaptioned": True}
  manifest = run(out, where, config=config(**takes))
  assert manifest["kept"] == 1 and manifest["dropped"]["no caption"] == 4
  assert "no caption" in (out / "report.html").read_text()
  captioner.caption(out, out / "caption", ENGLISH_ONLY, client(serve()))
  kinds = {"original": 5.0, "general": 1.0, "edit": 1.0}
  mixed = config(captions__kinds=kinds, **takes)
  manifest = run(out, where, config=mixed)
  assert manifest["kept"] == 5 and "no caption" not in manifest["dropped"]
  assert manifest["by_task"] == {"t2i": 4, "ti2i": 1}
  # The original caption has no part where there is none.
  assert manifest["by_caption"]["general"] >= 3
  found = all_records(out)
  assert all(record.caption for record in found.values())
  assert found["in/p1.jpg"].provenance["caption"]["original"] == ""


def command(data, out, url, *more):
  return [
    sys.executable, "-m", "data_pipelines.captioner", f"--input={data}",
    f"--out={out}", f"--url={url}", "--model=m", "--languages=en,zh",
    "--lengths=short,medium", "--processes=1", *more,
  ]  # fmt: skip


def test_the_command_survives_kill_9_and_asks_nothing_twice(
  data, tmp_path, serve
):
  out, count = tmp_path / "out", [0]

  def reply(request):
    count[0] += 1
    return (0.0 if count[0] <= 30 else 600.0, good(prompt_of(request)))

  server = serve(reply)
  process = subprocess.Popen(
    command(data, out, server.url, "--concurrency=2"),
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  for _ in range(1200):
    if count[0] > 31 or process.poll() is not None:
      break
    time.sleep(0.1)
  time.sleep(0.2)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  cached = len(list((out / "cache").rglob("*.json")))
  assert cached == 30
  fresh = serve()
  done = subprocess.run(
    command(data, out, fresh.url), capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "42 captions, 0 failed" in done.stdout
  assert len(fresh.seen) == 12
  assert not [p for p in out.iterdir() if ".tmp" in p.name]


@pytest.mark.parametrize(
  "flags, why",
  [
    (["--url=localhost"], "http://"),
    (["--languages=xx"], "'xx' is none of the languages"),
    (["--kinds=generic"], "'generic' is none of the kinds"),
    (["--input=nowhere"], "does not exist"),
  ],
)
def test_bad_flags_are_one_sentence(data, tmp_path, monkeypatch, flags, why):
  from absl import flags as absl_flags

  values = absl_flags.FlagValues()
  monkeypatch.setattr(captioner.flags, "FLAGS", values)
  for name in ("string", "list", "integer", "bool", "float"):
    define = getattr(absl_flags, f"DEFINE_{name}")
    monkeypatch.setattr(
      captioner.flags, f"DEFINE_{name}",
      lambda *a, define=define, **k: define(*a, flag_values=values, **k),
    )  # fmt: skip
  monkeypatch.setattr(
    captioner.flags, "mark_flags_as_required", lambda names: None
  )
  captioner._define_flags()
  values(command(data, tmp_path / "o", "http://127.0.0.1:9")[2:] + flags)
  with pytest.raises(SystemExit) as end:
    captioner.main([])
  assert end.value.code == 2
