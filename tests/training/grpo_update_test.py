# SPDX-License-Identifier: Apache-2.0
"""Rollout and update of Flow-GRPO on a tiny random MMDiT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from qi2_jax.errors import InputError
from qi2_jax.flow import sampler, schedules, sde
from qi2_jax.models import lora, mmdit
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.objectives import flow_grpo
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import (
  adapter,
  grpo_loss,
  grpo_task,
  program,
  rollout,
  rollout_encode,
  state,
  steps,
)

# The cache needs a prefix that does not see the noise level.
CONFIG = dataclasses.replace(
  tiny_models.MMDIT, attention="block_causal", condition_time="zero"
)
MODULE = MMDiT(CONFIG)
PROMPTS, GROUP = 4, 4
KEY = jax.random.key(5)


def how(**fields) -> rollout.RolloutConfig:
  given = {
    "group": GROUP, "steps": 6, "guidance": 3.0, "hybrid": "frozen_uncond",
    "kernel": sde.Kernel("flow", 0.7), "window": 2, "window_low": 0,
    "window_high": 4, "shared_noise": False,
    "shift": schedules.ShiftConfig(),
  }  # fmt: skip
  return rollout.RolloutConfig(**given | fields)


@functools.cache
def params():
  return tiny_models.mmdit_params(MODULE)


def conditions(seed=0):
  make = functools.partial(
    tiny_models.conditioning, CONFIG, words=(4, 7, 3, 5), length=12,
    target=(2, 2),
  )  # fmt: skip
  return make(seed=seed), make(seed=seed + 1)


def identity(trained):
  return trained


def made(config, trained=None, key=KEY):
  """Features of a rollout with made-up advantages."""
  run = rollout.program(config, MODULE, identity)
  walk, own = run(trained or params(), *conditions(), key)
  count = PROMPTS * config.group
  rng = np.random.default_rng(0)
  rows = rollout.features(walk, own) | {
    "advantage_B": jnp.asarray(rng.normal(size=count), jnp.float32),
    "weight_B": jnp.ones(count),
    grpo_loss.LOG: {"reward_x": jnp.arange(count) * 1.0},
  }
  return walk, rows


@pytest.mark.parametrize("hybrid", ["frozen_uncond", "full", "none"])
def test_rollout_and_update_have_one_log_probability(hybrid):
  """max |log ratio| < 1e-6 before the first update, with the prefix cache."""
  config = how(hybrid=hybrid)
  _, rows = made(config)
  found = scored(config, params(), rows)
  gap = found.log_prob_B - jnp.ravel(rows["log_probs_BW"])
  assert np.abs(gap).max() < 1e-6
  assert ("cached_BWNZ" in rows) == (hybrid != "none")
  assert ("negative" in rows) == (hybrid == "full")
  assert (rollout.PROBE in rows) == (hybrid == "frozen_uncond")


def test_the_cache_changes_no_trajectory():
  config, (cond, negative) = how(), conditions()
  noise = tiny_models.noise(CONFIG, PROMPTS, (2, 2))
  sigmas = schedules.sampling_sigmas(6, 4, None)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def walk(cached, kernel):
    v = rollout.velocity(config, MODULE, params(), cond, negative, cached)
    return sde.walk(v, noise, sigmas, kernel, 1, 3, KEY)

  walks = [walk(cached, config.kernel) for cached in (True, False)]
  for a, b in zip(*map(jax.tree.leaves, walks)):
    np.testing.assert_allclose(a, b, atol=2e-5)
  # A walk without noise is the sampler's.
  quiet = walk(True, sde.Kernel("flow", 0.0))
  plain = jax.jit(functools.partial(sampler.sample, MODULE))(
    {"params": params()}, noise, sigmas, cond, negative, 3.0
  )
  np.testing.assert_allclose(quiet.x0, plain, atol=2e-5)


def test_images_of_a_prompt_may_share_their_noise():
  for shared in (False, True):
    noise = rollout.starting_noise(how(shared_noise=shared), KEY, 3, (2, 2))
    noise = noise.reshape(3, GROUP, -1)
    assert np.array_equal(noise[0, 0], noise[0, 1]) == shared
    assert not np.array_equal(noise[0], noise[1])


@functools.partial(jax.jit, static_argnums=0)
def scored(config, trained, rows):
  return grpo_loss.score(config, MODULE, trained, rows)


def update(config, surrogate, rows, updates=1, accumulate=1, rate=1e-2):
  """State after one step of gradient descent, and metrics."""
  tx = optax.sgd(rate)
  loss = grpo_loss.loss(surrogate, config, MODULE)
  step = grpo_loss.make_step(
    loss, tx, 0.5, accumulate, updates,
    lambda trained, r: grpo_loss.score(config, MODULE, trained, r),
  )  # fmt: skip
  return jax.jit(step)(state.create(params(), tx), rows, KEY)


def test_the_first_update_follows_the_advantages():
  config, surrogate = how(), flow_grpo.GrpoConfig()
  _, rows = made(config)
  new, metrics = update(config, surrogate, rows)
  assert metrics["clipped"] == 0 and metrics["rollout_gap"] < 1e-6
  assert metrics["reward_x"] == 7.5 and int(new.step) == 1
  before, after = (
    scored(config, p, rows).log_prob_B.reshape(-1, 2)
    for p in (params(), new.params)
  )
  change = np.asarray((after - before).mean(axis=1))
  assert np.mean(change * np.asarray(rows["advantage_B"])) > 0
  # Rows without weight count for nothing.
  muted, quiet = update(
    config, surrogate, rows | {"weight_B": jnp.zeros(PROMPTS * GROUP)}
  )
  assert quiet["grad_norm"] == 0 and metrics["grad_norm"] > 0
  np.testing.assert_array_equal(
    *(jax.tree.leaves(t)[0] for t in (muted.params, params()))
  )


def unconditional(trained, rows, base=None, factors=None):
  """Velocity of the first trained state of every prompt's first image."""
  params = trained if base is None else lora.merge(base, factors)
  first = slice(None, None, GROUP)
  return MODULE.apply(
    {"params": params}, rows["states_BWNZ"][first, 0],
    rows["sigmas_BW"][first, 0], conditions()[1],
  )  # fmt: skip


def distance(new, old):
  """Root mean square of the change over that of the old, mean over rows."""
  axes = (1, 2)
  moved = np.sqrt(np.mean(np.square(np.asarray(new) - old), axis=axes))
  return np.mean(moved / np.sqrt(np.mean(np.square(old), axis=axes)))


def test_the_drift_of_the_unconditional_branch_is_logged():
  """Where it is frozen in the loss its weights move all the same."""
  config, surrogate = how(), flow_grpo.GrpoConfig()
  _, rows = made(config)
  loss = grpo_loss.loss(surrogate, config, MODULE)
  step = grpo_loss.with_drift(
    steps.make_step(loss, optax.sgd(1e-2), 0.5), MODULE,
    lambda trained, features: trained,
  )  # fmt: skip
  start = state.create(params(), optax.sgd(1e-2))
  new, metrics = jax.jit(step)(start, rows, KEY)
  before, after = (unconditional(p, rows) for p in (params(), new.params))
  # The rollout's own velocity of those states, up to rounding.
  cached = rows["cached_BWNZ"][::GROUP, 0]
  np.testing.assert_allclose(before, cached, atol=2e-5)
  expected = distance(after, before)
  assert expected > 1e-3
  np.testing.assert_allclose(metrics["uncond_drift"], expected, rtol=1e-3)
  assert "uncond_drift_base" not in metrics
  # The update is what it would be unwatched.
  plain, quiet = update(config, surrogate, rows)
  assert "uncond_drift" not in quiet
  for a, b in zip(*map(jax.tree.leaves, (new.params, plain.params))):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_a_lora_drifts_from_its_base():
  config, surrogate = how(), flow_grpo.GrpoConfig()
  lora_config = adapter.LoraConfig(2, 4.0, lora.DEFAULT_TARGETS)
  base, tx = params(), optax.sgd(3e-2)
  _, rows = made(config)
  loss = adapter.lora_loss(
    grpo_loss.loss(surrogate, config, MODULE), lora_config
  )
  policy = grpo_task.policy(lora_config)
  step = jax.jit(
    grpo_loss.with_drift(
      steps.make_step(loss, tx, 0.5), MODULE,
      lambda trained, features: policy((trained, features[steps.FROZEN])),
    )
  )  # fmt: skip
  factors = adapter.init_factors(lora_config, base, KEY)
  # The factors' change shows from the second update on: b starts at 0.
  train_state, found = state.create(factors, tx), []
  for _ in range(3):
    train_state, metrics = step(train_state, rows | {steps.FROZEN: base}, KEY)
    found.append(metrics)
  assert found[0]["uncond_drift"] > 0
  np.testing.assert_allclose(
    found[0]["uncond_drift"], found[0]["uncond_drift_base"], rtol=1e-4
  )
  last = found[-1]
  merged = adapter.to_lora(lora_config, train_state.params)
  expected = distance(
    unconditional(None, rows, base, merged), unconditional(base, rows)
  )
  np.testing.assert_allclose(last["uncond_drift_base"], expected, rtol=1e-2)
  assert last["uncond_drift_base"] > 1.5 * last["uncond_drift"]


def test_parts_of_a_batch_join_in_order():
  """Part i has every second prompt from i on; probes have one row each."""
  group, prompts = 3, 4
  image = np.arange(prompts * group)
  parts = [
    {
      "x_B": jnp.asarray(image.reshape(prompts, group)[i::2].ravel()),
      rollout.PROBE: {"sigma_P": jnp.arange(prompts)[i::2]},
    }
    for i in range(2)
  ]
  whole = rollout_encode._joined(parts, group)
  np.testing.assert_array_equal(whole["x_B"], image)
  np.testing.assert_array_equal(
    whole[rollout.PROBE]["sigma_P"], np.arange(prompts)
  )


@pytest.mark.slow
def test_microbatches_have_the_same_update():
  config, surrogate = how(), flow_grpo.GrpoConfig(guard=True)
  _, rows = made(config)
  whole, parts = (
    update(config, surrogate, rows, accumulate=n)[0].params for n in (1, 4)
  )
  for a, b in zip(*map(jax.tree.leaves, (whole, parts))):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_several_updates_leave_the_old_policy_where_it_was():
  config = how()
  surrogate = flow_grpo.GrpoConfig(clip=1e-5)
  _, rows = made(config)
  new, metrics = update(config, surrogate, rows, updates=2)
  # The second part meets a moved policy: its ratio is not 1 any more.
  assert int(new.step) == 1 and metrics["clipped"] > 0.1
  assert metrics["log_ratio_abs"] > 1e-6
  old = scored(config, params(), rows)
  kept = grpo_loss.old_fields(old, PROMPTS * GROUP)
  again = grpo_loss._old(rows | kept, old)
  np.testing.assert_array_equal(again.mean, old.mean)
  np.testing.assert_array_equal(again.log_prob_B, old.log_prob_B)


@pytest.mark.slow
def test_the_penalty_pulls_to_the_reference():
  config = how()
  surrogate = flow_grpo.GrpoConfig(kl_weight=1.0, kl="gaussian")
  _, rows = made(config)
  other = tiny_models.mmdit_params(MODULE, seed=3)
  found = scored(config, other, rows)
  fields = grpo_loss.old_fields(found, PROMPTS * GROUP)
  rows |= {"reference_BWNZ": fields["old_mean_BWNZ"],
           "advantage_B": jnp.zeros(PROMPTS * GROUP)}  # fmt: skip
  new, metrics = update(config, surrogate, rows, rate=1e-4)
  loss = grpo_loss.loss(surrogate, config, MODULE)
  after = jax.jit(loss.mean)(new.params, rows)[1]["kl"]
  assert metrics["kl"] > 0 and after < metrics["kl"]
  np.testing.assert_allclose(metrics["loss"], metrics["kl"], rtol=1e-5)


@pytest.mark.slow
def test_sharded_is_unsharded():
  config, surrogate = how(), flow_grpo.GrpoConfig()
  _, rows = made(config)
  single, single_metrics = update(config, surrogate, rows)
  mesh = create_mesh({"data": 2, "fsdp": 2, "seq": 1, "tensor": 2})
  place = sharding.tree_shardings(params(), mmdit.SHARDING_RULES, mesh)
  with jax.set_mesh(mesh):
    split = jax.device_put(params(), place)
    by_batch = sharding.batch_sharding(mesh)
    run = rollout.program(config, MODULE, identity)
    cond = jax.device_put(conditions(), by_batch)
    walk, own = run(split, *cond, KEY)
    other = rollout.features(walk, own)
    for name in ("advantage_B", "weight_B"):
      other[name] = rollout.to_rows(np.asarray(rows[name]), mesh)
    other[grpo_loss.LOG] = jax.device_put(rows[grpo_loss.LOG], by_batch)
    tx = optax.sgd(1e-2)
    step = steps.make_step(
      grpo_loss.loss(surrogate, config, MODULE), tx, 0.5
    )  # fmt: skip
    start = jax.device_put(
      state.create(split, tx),
      sharding.tree_shardings(
        state.create(params(), tx), mmdit.SHARDING_RULES, mesh
      ),
    )
    jitted = program.jit_step(step, program.shardings_of(start), mesh)
    new, metrics = jitted(start, other, KEY)
  for name in ("states_BWNZ", "log_probs_BW", "cached_BWNZ"):
    np.testing.assert_allclose(other[name], rows[name], atol=2e-5)
  for name in ("loss", "grad_norm", "reward_x"):
    np.testing.assert_allclose(
      metrics[name], single_metrics[name], rtol=1e-4, atol=1e-5
    )
  for a, b in zip(*map(jax.tree.leaves, (new.params, single.params))):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"group": 1}, "at least 2"),
    ({"window_high": 6}, "does not fit"),
    ({"hybrid": "both"}, "use one of"),
    ({"kernel": sde.Kernel("flow", 0.0)}, "above 0"),
  ],
)
def test_bad_rollouts_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    how(**fields)
