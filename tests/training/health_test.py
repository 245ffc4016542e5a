# SPDX-License-Identifier: Apache-2.0
"""Non-finite steps change nothing and are counted; spikes are seen."""

import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.training import state, steps
from qi2_jax.training.health import Health, skip_nonfinite


@jax.custom_jvp
def bend(w, slope):
  """Adds 0 to a loss and `slope` to its gradient."""
  return jnp.zeros(())


@bend.defjvp
def _(primals, tangents):
  return jnp.zeros(()), jnp.sum(tangents[0]) * primals[1]


def loss_fn(params, batch, key):
  """A noisy quadratic; `slope` spoils the gradient and not the loss."""
  noise = 0.1 * jax.random.normal(key)
  loss = jnp.sum((params["w"] - batch["x"]) ** 2) + noise
  return loss + bend(params["w"], batch["slope"]), {"noise": noise}


def build():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
  step = steps.make_step(loss_fn, tx, 0.9)
  return state.create({"w": jnp.arange(3.0)}, tx), step


def batch(x=1.0, slope=0.0):
  return {"x": jnp.float32(x), "slope": jnp.float32(slope)}


def check_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  "bad",
  [{"x": np.nan}, {"x": np.inf}, {"slope": np.nan}, {"slope": -np.inf}],
)
def test_a_nonfinite_step_moves_only_the_step_number(bad):
  start, step = build()
  guarded = jax.jit(skip_nonfinite(step), donate_argnums=0)
  key = jax.random.key(0)
  good, _ = guarded(start, batch(), key)
  before = jax.tree.map(np.asarray, good)
  after, metrics = guarded(good, batch(**bad), key)
  assert float(metrics["skipped"]) == 1.0
  assert np.isfinite(metrics["loss"]) == ("slope" in bad)
  assert int(after.step) == int(before.step) + 1
  check_same(after.replace(step=before.step), before)
  # What follows is the step that this number and these weights give.
  expected, _ = jax.jit(step)(before.replace(step=after.step), batch(2.0), key)
  resumed, metrics = guarded(after, batch(2.0), key)
  assert float(metrics["skipped"]) == 0.0
  check_same(resumed, expected)


def test_finite_steps_are_untouched_bit_for_bit():
  start, step = build()
  guarded, plain = jax.jit(skip_nonfinite(step)), jax.jit(step)
  a = b = start
  for i in range(5):
    a, kept = guarded(a, batch(i), jax.random.key(1))
    b, metrics = plain(b, batch(i), jax.random.key(1))
    check_same({k: v for k, v in kept.items() if k != "skipped"}, metrics)
  check_same(a, b)


def feed(health, losses, first=1):
  for i, loss in enumerate(losses, first):
    skipped = float(not np.isfinite(loss))
    metrics = {"loss": loss, "grad_norm": 1.0, "skipped": skipped}
    metrics = {k: jnp.float32(v) for k, v in metrics.items()}
    health.watch(i, metrics, {"a": {"b": np.full(3, i)}, "x": np.arange(i)})
  return health


def test_a_lost_run_stops_with_its_batch(tmp_path):
  health = Health(str(tmp_path), 3, 0.0)
  feed(health, [1.0, np.nan, np.inf, 1.0, np.nan, np.nan])
  health.settle()
  assert health.skipped == 4
  with pytest.raises(InputError, match="3 steps in a row") as error:
    feed(health, [np.nan], first=7)
    health.settle()
  path = tmp_path / "nonfinite_batch_7.npz"
  assert str(path) in str(error.value) and "loss nan" in str(error.value)
  saved = np.load(path)
  assert set(saved) == {"a/b", "x"}
  np.testing.assert_array_equal(saved["a/b"], np.full(3, 7))
  np.testing.assert_array_equal(saved["x"], np.arange(7))
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_limits(tmp_path):
  health = feed(Health(str(tmp_path), 0, 0.0), [np.nan] * 30)
  health.settle()
  assert health.skipped == 30
  # A full disk must not hide why the run stopped.
  with pytest.raises(InputError, match="could not be saved"):
    feed(Health(str(tmp_path / "nowhere"), 1, 0.0), [np.nan] * 4)


def test_steps_are_judged_two_steps_late(tmp_path):
  health = Health(str(tmp_path), 0, 0.0)
  counts = []
  for i in range(1, 6):
    feed(health, [np.nan], first=i)
    counts.append(health.skipped)
  assert counts == [0, 0, 1, 2, 3]
  health.settle()
  assert health.skipped == 5


def test_spikes_are_losses_above_the_running_median(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *a: seen.append(text % a)
  )
  rng = np.random.default_rng(0)
  losses = np.exp(rng.normal(size=300)).astype(np.float32)
  health = feed(Health(str(tmp_path), 0, 2.5), losses)
  health.settle()
  spikes = []
  for i in range(20, 300):
    window = map(float, losses[max(0, i - 101) : i])
    spikes += [i] * bool(losses[i] > 2.5 * statistics.median(window))
  assert health.spikes == len(spikes) > 10
  named = [int(line.split("step ")[1].split(":")[0]) - 1 for line in seen]
  assert named == spikes
  off = feed(Health(str(tmp_path), 0, 0.0), losses)
  off.settle()
  assert off.spikes == 0


@pytest.mark.parametrize("cut", [1, 10, 33, 49])
def test_a_resumed_run_counts_on(cut, tmp_path):
  rng = np.random.default_rng(1)
  losses = np.exp(rng.normal(size=50)).astype(np.float32)
  losses[[3, 32, 33, 40]] = np.nan
  whole = feed(Health(str(tmp_path), 4, 2.0), losses)
  first = feed(Health(str(tmp_path), 4, 2.0), losses[:cut])
  first.settle()
  saved = json.loads(json.dumps(first.record()))
  second = feed(Health(str(tmp_path), 4, 2.0, saved), losses[cut:], cut + 1)
  whole.settle()
  second.settle()
  assert second.record() == whole.record()
  assert whole.skipped == 4 and whole.spikes > 0


def test_a_row_of_skipped_steps_goes_on_after_a_restart(tmp_path):
  first = feed(Health(str(tmp_path), 3, 0.0), [1.0, np.nan, np.nan])
  first.settle()
  second = Health(str(tmp_path), 3, 0.0, first.record())
  feed(second, [np.nan], 4)
  with pytest.raises(InputError, match="3 steps in a row"):
    second.settle()
