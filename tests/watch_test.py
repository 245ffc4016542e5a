# SPDX-License-Identifier: Apache-2.0
"""watch.sh: what it restarts, what it gives up on, what it leaves alone."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest
from tpu_scripts import (
  REPO,
  TRAIN,
  WHERE,
  bash,
  copy_scripts,
  pretend_gcloud,
  printed,
  wait_for,
)


@pytest.fixture
def checkout(tmp_path):
  return copy_scripts(tmp_path)


@pytest.fixture
def cloud(tmp_path):
  return pretend_gcloud(tmp_path)


def test_watch_prints_start_look_and_restart():
  commands = printed(
    "watch.sh", *WHERE, "--type=v5p-128", "--spot=1", REPO, "--", *TRAIN
  )
  verbs = [c[4] for c in commands]
  start = ["create", "describe", "ssh", "ssh"]
  look = ["describe", "describe", "ssh"]
  crash = ["ssh", "ssh", "ssh", "ssh"]
  assert verbs == [*start, *look, *crash, "delete", *start]
  assert "--spot" in commands[0]
  assert "qi2_jax/runs/hosts/train.status" in commands[6][-1]
  assert r"ls /a\ b/run/checkpoints" in commands[7][-1]
  assert "--worker=all" in commands[8]


def watch(cloud, *flags: str, **answers: str):
  """Runs watch.sh against the answers; also returns gcloud's calls."""
  for verb, lines in answers.items():
    (cloud / verb).write_text("\n".join(lines.split(",")) + "\n")
  done = bash(
    "watch.sh", *WHERE, "--type=v5p-128", "--every=0", "--restarts=3", *flags,
    REPO, "--", *TRAIN, FAKE=str(cloud),
    PATH=f"{cloud / 'bin'}:{os.environ['PATH']}",
  )  # fmt: skip
  calls = (cloud / "calls").read_text().splitlines()
  return done, [c for c in calls if "describe" not in c]


def test_watch_restarts_what_has_saved(cloud):
  done, calls = watch(
    cloud, describe="ACTIVE", node="READY", status=",143,,0"
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert calls == ["tpu-vm ssh"] * (2 + 2 + 2 + 2)  # start, looks, twice
  assert "was stopped and has saved; restarting" in done.stdout
  assert "finished" in done.stdout


def test_watch_shows_a_failure_and_stops(cloud):
  done, calls = watch(
    cloud, describe="ACTIVE", node="READY", status="2", tail="error: no data"
  )  # fmt: skip
  assert done.returncode == 2
  assert "failed with status 2" in done.stderr
  assert "error: no data" in done.stderr
  assert len(calls) == 2 + 1 + 1


def test_watch_restarts_after_a_crash(cloud):
  done, calls = watch(
    cloud, describe="ACTIVE", node="READY", status="134,,139,0"
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("crashed with status") == 2
  # Three starts of two commands, four looks, and after each crash a look for
  # checkpoints and an end of what is left on other hosts.
  assert calls == ["tpu-vm ssh"] * (3 * 2 + 4 + 2 * 2)
  assert (cloud / "kills").read_text().splitlines() == ["kill"] * 2


@pytest.mark.parametrize(
  "flags, steps, crashes",
  [
    ((), "40", 3),
    ((), "", 3),
    # The first look only learns where the run is.
    (("--crashes=2",), "40,40", 2),
    (("--crashes=2",), "9,10,10", 3),
  ],
)
def test_watch_stops_when_crashes_lead_nowhere(cloud, flags, steps, crashes):
  done, _ = watch(
    cloud, *flags, describe="ACTIVE", node="READY", status="134", steps=steps,
    tail="Fatal Python error: Aborted",
  )  # fmt: skip
  assert done.returncode == 134
  assert done.stdout.count("crashed with status 134; restart") == crashes - 1
  assert "without a newer checkpoint, at last with status 134" in done.stderr
  assert "Fatal Python error" in done.stderr


@pytest.mark.parametrize(
  "flags, steps",
  [(("--crashes=2",), "1,2,3,4"), (("--crashes=2", "--minutes=-1"), "7")],
)
def test_watch_bears_crashes_with_progress_or_long_between(cloud, flags, steps):
  done, _ = watch(
    cloud, *flags, describe="ACTIVE", node="READY", status="134", steps=steps
  )  # fmt: skip
  assert done.returncode == 2
  assert "gave up after 3 restarts" in done.stderr


def test_watch_ends_when_a_person_stopped_the_run(cloud):
  done, calls = watch(cloud, describe="ACTIVE", node="READY", status="130")
  assert done.returncode == 130
  assert "was stopped by a person" in done.stdout
  assert len(calls) == 2 + 1


@pytest.mark.skipif(not shutil.which("setsid"), reason="hosts run Linux")
def test_watch_ends_leftovers_and_nothing_else(checkout):
  (checkout.parent / "qi2_jax").symlink_to(checkout)
  commands = printed(
    "watch.sh", *WHERE, "--type=v5p-128", REPO, "--", *TRAIN
  )  # fmt: skip
  command = commands[8][-1].removeprefix("--command=")

  def end_leftovers():
    end = subprocess.run(["bash", "-c", command], cwd=checkout.parent)
    assert end.returncode == 0

  end_leftovers()  # Nothing there yet.
  stubborn = "trap : TERM; while true; do sleep 1; done"
  run = ("--run=train", "--", "bash", "-c", stubborn)
  assert bash("host_run.sh", *run, root=checkout).returncode == 0
  pid = int(wait_for(checkout / "runs" / "hosts" / "train.pid"))
  end_leftovers()
  for _ in range(200):
    if not pathlib.Path(f"/proc/{pid}/environ").exists():
      break
    time.sleep(0.05)
  assert bash("host_run.sh", *run, root=checkout).returncode == 0
  end_leftovers()
  # A number that has passed to another process.
  other = subprocess.Popen(["sleep", "30"], start_new_session=True)
  (checkout / "runs" / "hosts" / "train.pid").write_text(f"{other.pid}\n")
  end_leftovers()
  assert other.poll() is None
  other.kill()
  other.wait()


@pytest.mark.parametrize("status", ["GONE", "134"])
def test_watch_replaces_a_slice_that_is_gone(cloud, status):
  # The answers to: start; after the loss (twice); once deleted; the queue.
  done, calls = watch(
    cloud, describe="ACTIVE,ACTIVE,ACTIVE,GONE,WAITING_FOR_RESOURCES,ACTIVE",
    node="READY,PREEMPTED,PREEMPTED,READY", status=f"{status},0",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert [c for c in calls if "queued" in c] == [
    "queued-resources delete", "queued-resources create",
  ]  # fmt: skip
  assert "the slice is gone; asking for another" in done.stdout


def test_watch_gives_up(cloud):
  done, _ = watch(cloud, describe="ACTIVE", node="READY", status="143")
  assert done.returncode == 2
  assert "gave up after 3 restarts" in done.stderr
