# SPDX-License-Identifier: Apache-2.0
"""The stages of DiffusionNFT and on-policy distillation on a tiny MMDiT."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from experiments import nft as nft_config
from experiments import opd as opd_config
from qi2_jax.errors import InputError
from qi2_jax.flow import sampler, schedules
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import (
  grpo_loss,
  nft_task,
  opd_task,
  rollout,
  state,
  steps,
)

MODULE = MMDiT(tiny_models.MMDIT)
KEY = jax.random.key(5)
HOW = rollout.OdeConfig(2, 4, False, schedules.ShiftConfig())


@functools.cache
def params(seed=0):
  return tiny_models.mmdit_params(MODULE, seed)


def condition(seed=0):
  return tiny_models.conditioning(
    tiny_models.MMDIT, length=9, target=(2, 2), seed=seed
  )


@functools.cache
def compiled(loss):
  tx = optax.sgd(1e-3)
  return tx, jax.jit(steps.make_step(loss, tx, 0.5))


def one_step(loss, rows, start=None):
  tx, step = compiled(loss)
  return step(state.create(start or params(), tx), rows, KEY)


@pytest.fixture(scope="module")
def walked():
  run = rollout.ode_program(HOW, MODULE, lambda trained: trained)
  return run(params(), condition(), KEY)


def test_the_walk_is_the_samplers(walked):
  walk, own = walked
  assert walk.states.shape == (4, 5, 4, 8) and walk.sigmas.shape == (4, 5)
  plain = jax.jit(functools.partial(sampler.sample, MODULE))(
    {"params": params()}, walk.states[:, 0], walk.sigmas[0], own
  )
  np.testing.assert_allclose(walk.x0, plain, atol=2e-5)
  np.testing.assert_allclose(walk.states[:, -1], walk.x0, atol=1e-6)


@pytest.fixture(scope="module")
def judged():
  """Features of a rollout of the old policy, with made-up advantages."""
  config = nft_config.get_config("smoke")
  config.rl.group, config.rl.levels = 2, 3
  run, finish = nft_task.rollouts(config, MODULE)
  tx = optax.sgd(1.0)
  # The trained policy is another one: it must not be asked.
  now = state.create(params(), tx).replace(params=params(3))
  x0, rows = run(now, condition(), None, KEY)
  rows = finish(now, rows, jax.random.key(1))
  return x0, rows | {
    "advantage_B": jnp.asarray([1.0, -1.0, 2.0, -2.0]),
    "weight_B": jnp.ones(4), grpo_loss.LOG: {"reward_x": jnp.ones(4)},
  }  # fmt: skip


def test_the_old_policy_makes_the_images_and_its_velocities(judged):
  x0, rows = judged
  np.testing.assert_array_equal(rows["x0_BNZ"], x0)
  run = rollout.ode_program(HOW, MODULE, lambda trained: trained)
  np.testing.assert_allclose(run(params(), condition(), KEY)[0].x0, x0)
  assert rows["times_BT"].shape == (4, 3)
  assert rows["noise_BTNZ"].shape == rows["old_BTNZ"].shape == (4, 3, 4, 8)
  old = nft_task.velocities(MODULE, params(), rows)
  np.testing.assert_allclose(
    jnp.ravel(old), jnp.ravel(rows["old_BTNZ"]), atol=2e-5
  )


def test_nft_follows_its_rewards(judged):
  _, rows = judged
  loss = nft_task.loss(MODULE, 1.0, 5.0)
  new, metrics = one_step(loss, rows)
  assert metrics["old_gap"] < 1e-9 and metrics["reward_x"] == 1
  assert metrics["grad_norm"] > 0
  # Neither good nor bad teaches nothing.
  level = rows | {"advantage_B": jnp.zeros(4)}
  assert one_step(loss, level)[1]["grad_norm"] < 1e-5
  # The velocity moves towards good images and away from bad ones.
  count = rows["times_BT"].shape[1]
  noise = rows["noise_BTNZ"].reshape(-1, 4, 8)
  target = noise - jnp.repeat(rows["x0_BNZ"], count, axis=0)
  gaps = [
    jnp.mean(jnp.square(nft_task.velocities(MODULE, p, rows) - target), (1, 2))
    for p in (params(), new.params)
  ]
  closer = gaps[0] - gaps[1]
  advantage = jnp.repeat(rows["advantage_B"], count)
  assert jnp.mean(closer * advantage) > 0


def test_the_student_follows_its_guided_teacher(walked):
  walk, own = walked
  rows = {"states_BWNZ": walk.states, "sigmas_BW": walk.sigmas,
          "condition": own}  # fmt: skip
  negative = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), condition(7))
  v = opd_task.teacher_velocities(
    params(3), rows, negative, jnp.float32(2.0), module=MODULE
  )
  assert v.shape == (4, 4, 4, 8)

  @jax.jit
  def guided(x, sigma):
    return sampler.guided_velocity(
      MODULE, {"params": params(3)}, own, negative, 2.0
    )(x, sigma)

  at = guided(walk.states[:, 2], walk.sigmas[0, 2])
  np.testing.assert_allclose(v[:, 2], at, atol=5e-5)
  loss = opd_task.loss(MODULE)
  rows |= {"teacher_BWNZ": v}
  new, metrics = one_step(loss, rows)
  assert one_step(loss, rows, new.params)[1]["loss"] < metrics["loss"]
  # A teacher that is the student has nothing to say.
  same = opd_task.teacher_velocities(
    params(), rows, negative, jnp.float32(1.0), module=MODULE
  )
  _, quiet = one_step(loss, rows | {"teacher_BWNZ": same})
  assert quiet["loss"] < 1e-8


MESH = {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1}


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"init": ""}, "needs a model"),
    ({"lora.rank": 2}, "this run trains a nft"),
    ({"rl.updates": 2}, "set it to 1"),
    ({"rl.beta": 0.0}, "beta > 0"),
  ],
)
def test_bad_runs_of_nft_are_refused(fields, message):
  config = nft_config.get_config("smoke")
  config.init = "somewhere"
  config.update_from_flattened_dict(fields)
  with pytest.raises(InputError, match=message):
    nft_task.check(config, create_mesh(MESH, jax.devices()[:1]))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"init": ""}, "needs a student"),
    ({"opd.teachers": ()}, "one workdir, or two"),
    ({"lora.rank": 2}, "this run trains a opd"),
  ],
)
def test_bad_runs_of_opd_are_refused(fields, message):
  config = opd_config.get_config("smoke")
  config.init, config.opd.teachers = "somewhere", ("somewhere",)
  config.update_from_flattened_dict(fields)
  with pytest.raises(InputError, match=message):
    opd_task.check(config)


@pytest.mark.parametrize("stage", [nft_config, opd_config])
def test_variants_build(stage):
  for name in ("qwen_image_2_1", "tiny", "smoke"):
    config = stage.get_config(name)
    assert config.sampling.guidance == 1.0
    assert json.loads(json.dumps(config.to_dict()))
  with pytest.raises(ValueError, match="use one of"):
    stage.get_config("nonsense")
