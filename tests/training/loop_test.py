# SPDX-License-Identifier: Apache-2.0
"""The loop on a toy: order, resuming, signals, lost runs, profiles."""

import contextlib
import dataclasses
import json
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qi2_jax.errors import InputError
from qi2_jax.parallel import mesh as mesh_lib
from qi2_jax.training import state, steps
from qi2_jax.training.checkpoints import CheckpointStore
from qi2_jax.training.health import Health, skip_nonfinite
from qi2_jax.training.loop import LoopConfig, run
from qi2_jax.training.metrics import Writers
from qi2_jax.training.profile import ProfileWindow
from qi2_jax.training.progress import Work

TX = optax.adam(0.1)
CONFIG = LoopConfig(
  num_steps=12,
  log_every=1,
  save_every=4,
  preview_every=5,
  validate_every=6,
  seed=0,
)


def loss_fn(params, batch, key):
  noise = jax.random.normal(key, batch["x"].shape)
  return jnp.mean((params["w"] - batch["x"] - 0.1 * noise) ** 2), {}


STEP = jax.jit(
  skip_nonfinite(steps.make_step(loss_fn, TX, 0.9)), donate_argnums=0
)


def batches(start, *, nan=(), hook=lambda step: None):
  step = start
  while True:
    hook(step)
    x = np.random.default_rng(step).normal(size=4).astype(np.float32)
    yield {"x": np.full(4, np.nan, np.float32) if step in nan else x}
    step += 1


def toy(workdir, config=CONFIG, *, max_skipped=3, profile=(0, 0), **data):
  """Starts or resumes a run of `config` in `workdir`; returns the state."""
  workdir = str(workdir)
  mesh = mesh_lib.create_mesh({}, jax.devices()[:1])
  sharding = jax.NamedSharding(mesh, jax.P())
  fresh = jax.device_put(state.create({"w": jnp.zeros(3)}, TX), sharding)
  with contextlib.closing(CheckpointStore(workdir)) as store:
    start, meta = store.restore_newest(fresh) or (fresh, {})
    health = Health(workdir, max_skipped, 2.0, meta.get("health"))
    first = int(start.step)
    with contextlib.closing(Writers(workdir, first)) as writers:
      with jax.set_mesh(mesh):
        out, stopped = run(
          start, STEP, lambda _, b: {"x": jnp.mean(b["x"], keepdims=True)},
          batches(first, **data), config, mesh=mesh, store=store,
          writers=writers, health=health,
          window=ProfileWindow(f"{workdir}/profile", *profile),
          meta=lambda step: {"step": step},
          preview=lambda s, step: {"grid": np.full((2, 2, 3), step, np.uint8)},
          validate=lambda s, step: {"held_out_loss": float(step)},
          work=lambda features: Work(tokens=features["x"].size),
        )  # fmt: skip
  return types.SimpleNamespace(state=out, stopped=stopped, health=health)


# What depends on the clock.
RATES = (
  "images_per_second", "tokens_per_second", "data_wait_fraction",
  "eta_seconds", "mfu", "device_memory_gib", "device_memory_peak_gib",
)  # fmt: skip


def rows(workdir, holding="loss") -> list[dict]:
  """Rows of metrics.jsonl without what depends on the clock."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  keep = lambda row: {k: v for k, v in row.items() if k not in RATES}  # noqa: E731
  return [row for row in map(keep, map(json.loads, lines)) if holding in row]


def test_everything_happens_when_it_should(tmp_path):
  out = toy(tmp_path)
  assert (out.stopped, int(out.state.step)) == (0, 12)
  found = rows(tmp_path)
  held_out = [r["held_out_loss"] for r in rows(tmp_path, "held_out_loss")]
  assert held_out == [6.0, 12.0]
  assert [r["step"] for r in found] == list(range(1, 13))
  fresh, key = (
    state.create({"w": jnp.zeros(3)}, TX),
    jax.random.key(CONFIG.seed),
  )
  for row, batch in zip(found, batches(0)):
    x = jnp.mean(jnp.asarray(batch["x"]), keepdims=True)
    fresh, metrics = STEP(fresh, {"x": x}, key)
    assert row["loss"] == float(metrics["loss"])
  assert {"skipped_steps", "loss_spikes", "grad_norm"} <= set(found[0])
  assert sorted(os.listdir(tmp_path / "samples")) == [
    "grid_0000005.png", "grid_0000010.png"
  ]  # fmt: skip
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["12", "8"]
  assert not (tmp_path / "profile").exists()


def test_nothing_happens_with_zeros(tmp_path):
  never = LoopConfig(
    5, log_every=0, save_every=0, preview_every=0, validate_every=0, seed=0
  )
  toy(tmp_path, never)
  assert [r["step"] for r in rows(tmp_path)] == [5]
  assert os.listdir(tmp_path / "checkpoints") == ["5"]


class Killed(Exception):
  """Stands for a power cut."""


def kill_at(wanted):
  def hook(step):
    if step == wanted:
      raise Killed

  return hook


@pytest.mark.parametrize("cut", [1, 6, 9])
@pytest.mark.parametrize(
  "nan, log_every", [((), 1), ((2, 3, 5, 7, 8), 1), ((2, 3, 6, 7), 5)]
)
def test_a_killed_run_ends_the_same(cut, nan, log_every, tmp_path):
  config = dataclasses.replace(CONFIG, log_every=log_every)
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  for folder in (whole, broken):
    folder.mkdir()
  expected = toy(whole, config, nan=nan)
  with pytest.raises(Killed):
    toy(broken, config, nan=nan, hook=kill_at(cut))
  actual = toy(broken, config, nan=nan)
  assert expected.health.skipped == len(nan)
  assert actual.health.record() == expected.health.record()
  jax.tree.map(np.testing.assert_array_equal, actual.state, expected.state)
  assert str(rows(broken)) == str(rows(whole))  # NaN is not NaN


def test_skipped_steps_are_in_the_metrics_and_not_in_the_state(tmp_path):
  toy(tmp_path, nan=(2, 3, 7))
  found = rows(tmp_path)
  assert [r["skipped"] for r in found] == [0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0]
  assert [r["skipped_steps"] for r in found] == [
    0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3
  ]  # fmt: skip
  assert all(np.isfinite(r["param_norm"]) for r in found if not r["skipped"])


def test_a_lost_run_stops_and_leaves_batch_and_checkpoint(tmp_path):
  with pytest.raises(InputError, match="3 steps in a row were not finite"):
    toy(tmp_path, nan=range(5, 99))
  saved = np.load(tmp_path / "nonfinite_batch_8.npz")
  np.testing.assert_array_equal(saved["x"], np.full(4, np.nan, np.float32))
  # Step 4 is from before; the run can go on from there with better data.
  assert os.listdir(tmp_path / "checkpoints") == ["4"]
  assert int(toy(tmp_path).state.step) == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_it_interrupts(number, tmp_path):
  def hook(step):
    if step == 6:
      os.kill(os.getpid(), number)

  before = signal.getsignal(number)
  out = toy(tmp_path, hook=hook)
  assert out.stopped == number
  assert signal.getsignal(number) is before
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "7"]
  expected = toy(_made(tmp_path / "whole"))
  jax.tree.map(
    np.testing.assert_array_equal, toy(tmp_path).state, expected.state
  )


def _made(path):
  path.mkdir()
  return path


def test_the_profile_window_is_traced_once(tmp_path, monkeypatch):
  calls, step_now = [], [0]
  for name in ("start_trace", "stop_trace"):
    monkeypatch.setattr(
      jax.profiler,
      name,
      lambda *a, name=name: calls.append((name, step_now[0])),
    )

  def hook(step):
    step_now[0] = step

  toy(tmp_path, profile=(3, 4), hook=hook)
  # The hook runs after the window's turn, so it still holds the step before.
  assert calls == [("start_trace", 2), ("stop_trace", 6)]
  calls.clear()
  with pytest.raises(Killed):
    toy(_made(tmp_path / "cut"), profile=(3, 99), hook=kill_at(6))
  assert [name for name, _ in calls] == ["start_trace", "stop_trace"]


def test_a_real_trace_is_written(tmp_path):
  window = ProfileWindow(str(tmp_path / "profile"), 1, 1)
  x = jnp.ones(3)
  with window:
    for step in range(4):
      window.before(step, x)
      x = x * 2
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
