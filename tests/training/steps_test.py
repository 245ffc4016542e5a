# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation: k microbatches are one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from qi2_jax.errors import InputError
from qi2_jax.flow.schedules import ShiftConfig
from qi2_jax.models import mmdit
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import state, steps

BATCH, TARGET = 8, (4, 4)
KEY = jax.random.key(3)
MODEL = mmdit.MMDiT(tiny_models.MMDIT)
LOSS = steps.flow_matching_loss(
  MODEL, logit_mean=0.0, logit_std=1.0, shift=ShiftConfig()
)


@functools.cache
def problem():
  """Parameters and a batch whose rows all differ."""
  batch = {
    "latents_BNZ": tiny_models.noise(tiny_models.MMDIT, BATCH, TARGET, seed=4),
    "condition": tiny_models.conditioning(
      tiny_models.MMDIT, words=(1, 4, 2, 6, 3, 5, 1, 2), references=((4, 2),),
      target=TARGET, length=12,
    ),
  }  # fmt: skip
  return tiny_models.mmdit_params(MODEL), batch


@functools.cache
def one_step(accumulate, spec=()):
  """State and metrics after one step; sgd, so the update is the gradient."""
  params, batch = problem()
  mesh = create_mesh(dict(spec), jax.devices()[: 8 if spec else 1])
  tx = optax.sgd(1.0)
  start = state.create(params, tx)
  places = sharding.tree_shardings(start, mmdit.SHARDING_RULES, mesh)
  start = jax.device_put(start, places)
  batch = sharding.put_batch(jax.tree.map(np.asarray, batch), mesh)
  step = steps.make_step(LOSS, tx, 0.9, accumulate)
  with jax.set_mesh(mesh):
    step = jax.jit(step, out_shardings=(places, None))
    return jax.device_get(step(start, batch, KEY))


def assert_same_step(one, other):
  for key, value in one[1].items():
    assert other[1][key] == pytest.approx(value, rel=1e-5), key
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(one[0]), jax.tree.leaves(other[0])
  ):
    assert a.dtype == b.dtype
    assert tiny_models.relative(b, a) <= 1e-5, path


@pytest.mark.parametrize("accumulate", [2, 8])
def testmicrobatches_equal_one_batch(accumulate):
  assert_same_step(one_step(1), one_step(accumulate))


def test_accumulation_on_a_mesh_equals_one_device():
  spec = (("data", 2), ("fsdp", 2), ("tensor", 2))
  assert_same_step(one_step(1), one_step(2, spec))


def test_splitting_sends_no_row_elsewhere():
  mesh = create_mesh({"data": 2, "fsdp": 4})
  x = sharding.put_batch(np.arange(48.0).reshape(24, 2), mesh)
  with jax.set_mesh(mesh):
    split = jax.jit(lambda x: steps.microbatches(x, 3)).lower(x).compile()
    text, parts = split.as_text(), split(x)
  collectives = ("all-to-all", "all-gather", "collective-permute")
  assert not any(kind in text for kind in collectives)
  assert parts.sharding.spec[1] == ("data", "fsdp")


def test_a_microbatch_is_every_kth_row():
  x = jnp.arange(24.0).reshape(12, 2)
  parts = steps.microbatches(x, 3)
  assert parts.shape == (3, 4, 2)
  for i in range(3):
    np.testing.assert_array_equal(parts[i], x[i::3])


def test_noise_is_drawn_once_for_the_batch():
  """Each microbatch sees its own rows of the same draw."""
  _, batch = problem()
  drawn = LOSS.draw(batch, KEY)
  assert drawn["sigma_B"].shape == (BATCH,)
  assert len(np.unique(drawn["sigma_B"])) == BATCH
  assert drawn["noise_BNZ"].shape == batch["latents_BNZ"].shape
  seen = []

  def mean(params, part):
    jax.debug.callback(lambda s: seen.append(np.asarray(s)), part["sigma_B"])
    return jnp.sum(params["w"] ** 2), {}

  spy = steps.Loss(LOSS.draw, mean)
  tx = optax.sgd(0.1)
  start = state.create({"w": jnp.ones(3)}, tx)
  step = steps.make_step(spy, tx, 0.9, 4)
  jax.block_until_ready(jax.jit(step)(start, batch, KEY))
  jax.effects_barrier()
  expected = LOSS.draw(batch, jax.random.fold_in(KEY, 0))["sigma_B"]
  assert len(seen) == 4
  np.testing.assert_allclose(
    np.sort(np.concatenate(seen)), np.sort(expected), rtol=1e-6
  )


def test_what_is_frozen_is_not_split():
  def mean(params, batch):
    assert batch[steps.FROZEN].shape == (1, 3)
    error = params["w"] - batch["x"] * batch[steps.FROZEN]
    return jnp.mean(error**2), {}

  loss = steps.Loss(lambda batch, key: batch, mean)
  tx = optax.sgd(0.1)
  batch = {
    "x": jnp.arange(6.0).reshape(6, 1),
    steps.FROZEN: jnp.asarray([[1.0, 2.0, 3.0]]),
  }
  start = {"w": jnp.ones((1, 3))}
  results = [
    steps.make_step(loss, tx, 0.9, k)(state.create(start, tx), batch, KEY)
    for k in (1, 3)
  ]
  for a, b in zip(*map(jax.tree.leaves, results)):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_gradients_add_up_in_fp32():
  """bf16 partial sums would lose the small microbatches."""
  values = jnp.asarray([256.0] + [1.0] * 7)
  loss = steps.Loss(
    lambda batch, key: batch,
    lambda p, batch: (jnp.sum(p * jnp.mean(batch["x"]).astype(p.dtype)), {}),
  )
  *_, grads = steps._accumulated(
    loss, jnp.zeros(2, jnp.bfloat16), {"x": values}, 8
  )
  assert grads.dtype == jnp.float32
  np.testing.assert_array_equal(grads, np.full(2, 263 / 8, np.float32))


@pytest.mark.parametrize(
  "batch, accumulate, message",
  [
    (16, 3, "cannot be split into 3 microbatches"),
    (16, 0, "cannot be split into 0 microbatches"),
    (16, 4, r"16 / 4 = 4 examples does not divide over data x fsdp = 8"),
    (12, 1, "batch size 12 does not divide"),
  ],
)
def test_bad_batches_are_refused(batch, accumulate, message):
  mesh = create_mesh({"data": 2, "fsdp": 4})
  with pytest.raises(InputError, match=message):
    steps.check_batch(batch, accumulate, mesh)
  steps.check_batch(16, 2, mesh)
