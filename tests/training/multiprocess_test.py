# SPDX-License-Identifier: Apache-2.0
"""Two processes of four devices train as one process of eight does."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 20
TOLERANCE = 1e-5


def command(workdir, *more: str) -> list[str]:
  """A tiny pre-training run on 2 x 4 devices that logs every step."""
  return [
    sys.executable, "-m", "qi2_jax.train",
    "--config=experiments/pretrain.py:tiny", f"--workdir={workdir}",
    f"--config.num_steps={STEPS}", "--config.save_every=8",
    "--config.log_every=1", "--config.preview_every=0",
    "--config.data.buckets=((64,64),)", "--config.data.batch_size=8",
    "--config.data.rendered_t2i=64", "--config.data.rendered_edits=32",
    "--config.mesh.data=2", "--config.mesh.fsdp=4", *more,
  ]  # fmt: skip


def start(arguments: list[str], log, devices: int, **environ: str):
  """Starts one process with simulated devices; it writes to `log`."""
  environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  cache = str(log.parent / "cache")
  with open(log, "w") as file:
    return subprocess.Popen(
      arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
      env=os.environ | environ | {"JAX_COMPILATION_CACHE_DIR": cache},
    )  # fmt: skip


def start_two(arguments: list[str], folder, name: str) -> list:
  """Starts the same command twice, as processes 0 and 1."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
    start(
      arguments, folder / f"{name}.{i}.log", 4,
      JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
      JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]  # fmt: skip


def finish(processes: list, status: int, log) -> None:
  """Waits for all; shows the log if one ended otherwise."""
  try:
    ends = [process.wait(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert ends == [status] * len(ends), log.read_text()[-3000:]


def losses(workdir) -> dict[int, float]:
  """Loss by step; every step occurs once."""
  lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert len({row["step"] for row in rows}) == len(rows)
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def parameters(workdir) -> dict[str, np.ndarray]:
  """The parameters of the last checkpoint, by path."""
  path = os.path.abspath(f"{workdir}/checkpoints/{STEPS}/state")
  with ocp.PyTreeCheckpointer() as reader:
    saved = reader.metadata(path).item_metadata.tree
    # As numpy: the devices that saved it are not those of this process.
    whole = ocp.RestoreArgs(restore_type=np.ndarray)
    arguments = ocp.args.PyTreeRestore(
      restore_args=jax.tree.map(lambda _: whole, saved)
    )
    params = reader.restore(path, args=arguments)["params"]
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}


def assert_equal_runs(expected, actual) -> None:
  """Losses within the tolerance, parameters within a hundred times it."""
  one, other = losses(expected), losses(actual)
  assert list(one) == list(other) == list(range(1, STEPS + 1))
  np.testing.assert_allclose(
    list(other.values()), list(one.values()), rtol=0, atol=TOLERANCE
  )
  values = parameters(actual)
  for name, value in parameters(expected).items():
    # Adam divides by the size of gradients: rounding in tiny ones grows.
    np.testing.assert_allclose(
      values[name], value, rtol=0, atol=1e-3, err_msg=name
    )


def signal_at(process, log, step: int) -> None:
  """Sends SIGTERM to one process when the log shows `step`."""
  while process.poll() is None:
    if re.search(rf"step {step}/", log.read_text()):
      process.send_signal(signal.SIGTERM)
      return
  raise AssertionError(log.read_text()[-3000:])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
  one, two, broken = (str(tmp_path / name) for name in ("one", "two", "broken"))
  log = tmp_path / "one.log"
  finish([start(command(one), log, 8)], 0, log)
  finish(
    start_two(command(two), tmp_path, "two"), 0, tmp_path / "two.0.log"
  )  # fmt: skip
  assert_equal_runs(one, two)
  assert sorted(os.listdir(f"{one}/checkpoints")) == sorted(
    os.listdir(f"{two}/checkpoints")
  )

  # A preempted host tells its own process only: both save the same step.
  log = tmp_path / "broken.0.log"
  processes = start_two(command(broken), tmp_path, "broken")
  signal_at(processes[1], log, 5)
  finish(processes, 128 + signal.SIGTERM, log)
  saved = max(int(s) for s in os.listdir(f"{broken}/checkpoints"))
  assert 5 <= saved < STEPS
  # And one process with another mesh goes on from there.
  log = tmp_path / "resumed.log"
  more = ("--config.mesh.data=4", "--config.mesh.fsdp=2")
  finish([start(command(broken, *more), log, 8)], 0, log)
  assert f"resuming from step {saved}" in log.read_text()
  assert_equal_runs(one, broken)

  # Two processes restore too: here a run that is already at its end.
  log = tmp_path / "again.0.log"
  finish(start_two(command(two), tmp_path, "again"), 0, log)
  assert f"resuming from step {STEPS}" in log.read_text()
  assert_equal_runs(one, two)


RESTORE = """
import os, sys
import jax
import numpy as np
import jax.numpy as jnp
from qi2_jax.parallel import distributed
from qi2_jax.training.checkpoints import CheckpointStore

distributed.initialise()
mesh = jax.make_mesh((8,), ("x",))
place = jax.NamedSharding(mesh, jax.P("x"))
value = lambda step: jax.jit(lambda: {"w": step + jnp.arange(16.0)},
                             out_shardings=place)()
shape = jax.ShapeDtypeStruct((16,), "float32", sharding=place)
mode, *views = sys.argv[1:]
# What this process sees of a shared folder.
view = views[jax.process_index()]
store = CheckpointStore(view, keep=9, read_only=mode == "read")
if mode == "save":
  for step in (2, 4, 6):
    store.save(step, value(step), {"step": step})
else:
  state, meta = store.restore_newest({"w": shape})
  w = state["w"].addressable_shards[0]
  np.testing.assert_array_equal(w.data, np.arange(16.0)[w.index] + meta["step"])
  print("restored", meta["step"])
store.close()
"""


@pytest.mark.slow
def test_processes_agree_on_what_is_damaged(tmp_path):
  """Process 1 alone cannot read step 6, process 0 alone not step 4."""
  shared = tmp_path / "shared"

  def both(mode, *views):
    script = [sys.executable, "-c", RESTORE, mode, *map(str, views)]
    processes = start_two(script, tmp_path, mode)
    finish(processes, 0, tmp_path / f"{mode}.1.log")
    return [(tmp_path / f"{mode}.{i}.log").read_text() for i in range(2)]

  both("save", shared, shared)
  views = [tmp_path / "view0", tmp_path / "view1"]
  for view, step in zip(views, (4, 6)):
    shutil.copytree(shared, view)
    (view / f"checkpoints/{step}/state/manifest.ocdbt").write_bytes(b"")
  for mode in ("read", "resume"):
    logs = both(mode, *views)
    assert all("restored 2\n" in log for log in logs), logs
  assert os.listdir(views[0] / "checkpoints") == ["2"]
  assert len(os.listdir(views[0] / "unreadable_checkpoints")) == 2


@pytest.mark.slow
def test_vae_training_previews_and_exports_from_two_processes(tmp_path):
  workdir = str(tmp_path / "vae")
  arguments = [
    sys.executable, "-m", "qi2_jax.train",
    "--config=experiments/vae.py:tiny", f"--workdir={workdir}",
    "--config.num_steps=2", "--config.preview_every=2",
    "--config.data.buckets=((64,64),)", "--config.data.batch_size=8",
    "--config.data.rendered_t2i=16", "--config.data.rendered_edits=16",
    "--config.latent_stat_batches=1",
  ]  # fmt: skip
  processes = start_two(arguments, tmp_path, "vae")
  finish(processes, 0, tmp_path / "vae.0.log")
  assert os.listdir(f"{workdir}/samples") == ["reconstruction_0000002.png"]
  from qi2_jax.interop import model_folder

  _, variables = model_folder.load_vae(workdir)
  assert np.isfinite(variables["latent_stats"]["std"]).all()
