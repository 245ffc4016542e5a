# SPDX-License-Identifier: Apache-2.0
"""The command: its messages, what kills it, and what runs it."""

import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import interrupts
import pytest
from pictures import folder
from stages import content, mixed_input

CONFIG = "--config=experiments/data.py:tiny"
SHARDS = "--config.shard_records=8"


def command(out, *words):
  return [
    sys.executable, "-m", "data_pipelines.run", CONFIG, SHARDS,
    f"--out={out}", *words,
  ]  # fmt: skip


def start(out, *words, **options):
  return subprocess.run(
    command(out, *words), capture_output=True, text=True, **options
  )


def hashes(out):
  return {
    path: hashlib.sha256(data).hexdigest()
    for path, data in content(out).items()
  }


def test_one_command_makes_a_dataset_and_says_what_became_of_it(tmp_path):
  where = mixed_input(tmp_path / "in")
  out = tmp_path / "out"
  done = start(out, f"--input={where}", "--processes=1")
  assert done.returncode == 0, done.stderr
  last = done.stdout.strip().splitlines()[-1]
  manifest = json.loads((out / "manifest.json").read_text())
  assert f"{manifest['in']} in = {manifest['kept']} kept + " in last
  assert "1 dropped by exact_duplicate" in last and "1 empty file" in last
  assert re.search(r"measure: 3/3 shards, 15 items, \d+/s", done.stderr)
  assert "Traceback" not in done.stderr and "WARNING" not in done.stderr
  # Whatever follows -- is for Beam; a second runner writes the same bytes.
  # (Its name is that of a class, as for any runner Beam does not know.)
  other = start(
    tmp_path / "other", f"--input={where}", "--processes=1",
    "--runner=apache_beam.runners.direct.direct_runner.BundleBasedDirectRunner",
    "--", "--direct_num_workers=1",
  )  # fmt: skip
  assert other.returncode == 0, other.stderr
  assert hashes(tmp_path / "other") == hashes(out)


@pytest.mark.parametrize(
  "words, message",
  [
    (("--input=nowhere",), "Error: Input nowhere does not exist; check"),
    ((), "holds no ingested input; give --input=FOLDER_OR_FILE."),
    (("--config.max_enlarge=0",), "Error: config.max_enlarge is 0"),
  ],
)
def test_bad_requests_are_one_sentence(tmp_path, words, message):
  done = start(tmp_path / "out", *words)
  assert done.returncode == 2
  assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_full_disk_is_one_sentence_and_can_be_resumed(tmp_path):
  where = folder(tmp_path / "in", 12)
  # No file that the process or its children write may become larger.
  limited = (
    "import os, resource, sys\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    "os.execv(sys.argv[1], sys.argv[1:])"
  )
  words = command(tmp_path / "out", f"--input={where}", "--processes=1")
  done = subprocess.run(
    [sys.executable, "-c", limited, *words], capture_output=True, text=True
  )
  assert done.returncode == 2, done.stderr
  (sentence,) = [s for s in done.stderr.splitlines() if s.startswith("Error")]
  assert "Writing " in sentence and "check the free space" in sentence
  names = [path.name for path in (tmp_path / "out").rglob("part-*")]
  assert not [name for name in names if "done" in name or "tmp" in name]
  done = start(tmp_path / "out", f"--input={where}", "--processes=1")
  assert done.returncode == 0, done.stderr


def test_ctrl_c_keeps_finished_shards_and_says_so(tmp_path):
  where = folder(tmp_path / "in", 64)
  out = tmp_path / "out"
  process = subprocess.Popen(
    command(out, f"--input={where}", "--processes=1"),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    preexec_fn=interrupts.heard,
  )
  while process.poll() is None and not list(out.glob("measure/*.done.json")):
    time.sleep(0.002)
  process.send_signal(signal.SIGINT)
  _, words = process.communicate()
  assert process.returncode == 130, words
  assert words.strip().endswith("goes on with the first unfinished shard.")
  assert "Traceback" not in words
  assert not [path for path in out.rglob("*") if ".tmp" in path.name]
  assert 0 < len(list(out.glob("measure/*.done.json"))) < 8


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_with_the_same_bytes(tmp_path):
  where = folder(tmp_path / "in", 120)
  mixed_input(where)
  whole = start(tmp_path / "whole", f"--input={where}")
  assert whole.returncode == 0, whole.stderr
  expected = hashes(tmp_path / "whole")
  out = tmp_path / "out"
  kills, rng = 0, random.Random(0)
  progress = []
  while kills < 3:
    process = subprocess.Popen(
      command(out, f"--input={where}"),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    before = _markers(out)
    # Between the second shard from here and the tenth.
    target = before + rng.randint(2, 10)
    while process.poll() is None and _markers(out) < target:
      time.sleep(0.002)
    if process.poll() is not None:
      pytest.fail("it ended before it was killed")
    time.sleep(rng.random() * 0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kills += 1
    progress.append(_markers(out))
  assert progress == sorted(progress) and progress[-1] > progress[0]
  last = start(out, f"--input={where}")
  assert last.returncode == 0, last.stderr
  assert hashes(out) == expected


def _markers(out):
  return sum(1 for _ in out.rglob("*.done.json")) if out.is_dir() else 0


@pytest.mark.slow
def test_worker_processes_of_beam_write_the_same_bytes(tmp_path):
  where = mixed_input(tmp_path / "in")
  one = start(tmp_path / "one", f"--input={where}")
  two = start(
    tmp_path / "two", f"--input={where}", "--processes=1", "--",
    "--direct_num_workers=2", "--direct_running_mode=multi_processing",
  )  # fmt: skip
  assert one.returncode == two.returncode == 0, one.stderr + two.stderr
  assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


@pytest.mark.slow
def test_a_finished_stage_takes_about_a_second(tmp_path):
  """CPU seconds, which another program on the machine does not change."""
  where = folder(tmp_path / "in", 40)
  start(tmp_path / "out", f"--input={where}")
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = start(tmp_path / "out", f"--input={where}")
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert done.stdout.count("nothing to do") == 6
  seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  assert seconds < 2, seconds
