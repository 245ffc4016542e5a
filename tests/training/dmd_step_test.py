# SPDX-License-Identifier: Apache-2.0
"""One step of distillation: who moves, when, and what the gradient sees."""

import functools

import dmd_toy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qi2_jax.flow import backward_simulation
from qi2_jax.objectives import dmd
from qi2_jax.training import checkpoints, dmd_state, dmd_step, health, steps

KEY = jax.random.key(3)
GROUP, RATIO = 6, 3


@functools.cache
def teachers():
  """Two networks whose heads are not zero."""
  out = []
  for seed in (0, 1):
    params = dmd_toy.init(jax.random.key(seed), width=16)
    head = 0.3 * jax.random.normal(jax.random.key(9 + seed), (16, 2))
    out.append([*params[:-1], params[-1] | {"w": head}])
  return out


def batch(count=1, groups=RATIO + 1):
  """Rows that all differ."""
  size = GROUP * groups
  features = dmd_toy.features(size, teachers()[:count])
  keys = jax.random.split(jax.random.key(7))
  return features | {
    "condition": jax.random.normal(keys[0], (size, 2)),
    "negative": jax.random.normal(keys[1], (size, 2)),
    "category_B": jnp.arange(size) % 2,
  }


def one_step(rate=0.1, fake_rate=0.1, features=None, **fields):
  """State before and after a step of plain gradient descent, and metrics."""
  config = dmd_toy.config(ratio=RATIO, guidance=2.0, **fields)
  txs = optax.sgd(rate), optax.sgd(fake_rate)
  start = dmd_state.create(teachers()[0], teachers()[0], *txs)
  step = dmd_step.make_step(config, dmd_toy.NETS, *txs, 0.5)
  features = batch() if features is None else features
  return start, *jax.jit(step)(start, features, KEY)


def same(a, b) -> bool:
  return all(
    np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)))
  )


def close(a, b, **tolerance):
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_allclose(x, y, **{"rtol": 1e-4, "atol": 1e-6} | tolerance)


def test_the_fake_score_moves_first_and_the_student_meets_the_new_one():
  """The step against its parts, one after the other, written out."""
  config = dmd_toy.config(ratio=RATIO, guidance=2.0)
  features, nets, base = batch(), dmd_toy.NETS, teachers()[0]
  rows, rest = steps.rows_of(features)
  parts = jax.tree.map(lambda x: steps.microbatches(x, RATIO + 1), rows)
  keys = jax.random.split(jax.random.fold_in(KEY, 0), RATIO + 1)

  @jax.jit
  def fake_gradient(fake, part, key):
    draws = dmd_step.draws(key)
    x0, _ = dmd_step.student_sample(
      config, nets, base, part["condition"], draws
    )
    loss = lambda d: dmd_step.fake_loss(  # noqa: E731
      config, nets, dmd_step.add(base, d), x0, part["condition"], draws
    )
    return jax.value_and_grad(loss)(fake)

  @jax.jit
  def student_gradient(fake, part, key):
    return jax.grad(dmd_step.student_loss, argnums=2, has_aux=True)(
      config, nets, base, dmd_step.add(base, fake), rest[steps.FROZEN], part,
      dmd_step.draws(key),
    )[0]  # fmt: skip

  fake, losses = jax.tree.map(jnp.zeros_like, base), []
  for i in range(RATIO):
    part = jax.tree.map(lambda x, i=i: x[i], parts)
    loss, grads = fake_gradient(fake, part, keys[i])
    fake = jax.tree.map(lambda f, g: f - 0.1 * g, fake, grads)
    losses.append(float(loss))
  last = jax.tree.map(lambda x: x[RATIO], parts)
  grads = student_gradient(fake, last, keys[RATIO])
  _, new, metrics = one_step()
  close(new.fake, fake)
  close(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, base, grads))
  assert metrics["fake_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
  assert metrics["grad_norm"] == pytest.approx(
    float(optax.global_norm(grads)), rel=1e-4
  )
  assert int(new.step) == 1


def test_each_phase_leaves_the_other_model_alone():
  start, new, _ = one_step(rate=0.0)
  assert same(start.params, new.params) and not same(start.fake, new.fake)
  start, new, _ = one_step(fake_rate=0.0)
  assert same(start.fake, new.fake) and not same(start.params, new.params)
  # While they are equal the gap is that of guidance alone.
  _, new, _ = one_step(fake_rate=0.0, features=batch() | {
    "negative": batch()["condition"]})  # fmt: skip
  close(new.params, start.params, atol=1e-7)


def student_loss(trained, fake, frozen, config=None, **fields):
  config = config or dmd_toy.config(guidance=2.0, **fields)
  rows, _ = steps.rows_of(batch(len(frozen[dmd_step.TEACHERS]), groups=1))
  return dmd_step.student_loss(
    config, dmd_toy.NETS, trained, fake, frozen, rows, dmd_step.draws(KEY)
  )


@pytest.mark.parametrize("decoupled", [False, True])
def test_no_gradient_reaches_teachers_or_fake_score(decoupled):
  one, other = teachers()
  frozen = {dmd_step.TEACHERS: [one]}
  grads = jax.grad(student_loss, argnums=(0, 1, 2), has_aux=True)(
    one, other, frozen, decoupled=decoupled
  )[0]
  assert float(optax.global_norm(grads[0])) > 1e-3
  assert float(optax.global_norm(grads[1:])) == 0.0


@pytest.mark.parametrize("kind", ["euler", "renoise"])
def test_only_the_chosen_step_receives_gradient(kind):
  """A student with parameters of its own for every noise level."""
  levels = jnp.asarray(dmd_toy.SIGMAS)

  def apply(params, x, sigma_B, condition):
    at = jnp.argmin(jnp.abs(levels[None] - sigma_B[:, None]), axis=1)
    return params[at][:, None, None] * x + condition[:, None]

  def rollout(params, condition):
    return lambda x, s: apply(params, x, jnp.full((len(x),), s), condition)

  nets = dmd_step.Networks(apply, rollout, None, dmd_toy.NETS.shape)
  condition = batch(groups=1)["condition"]
  config = dmd_toy.config(sampler=kind)

  def loss(params, key):
    x0, stop = dmd_step.student_sample(
      config, nets, params, condition, dmd_step.draws(key)
    )
    return jnp.sum(x0**2), stop

  met = set()
  run = jax.jit(jax.grad(loss, has_aux=True))
  for i in range(24):
    grads, stop = run(jnp.asarray([0.2, 0.3, 0.4, 0.5]), jax.random.key(i))
    assert list(np.flatnonzero(grads)) == [int(stop)]
    met.add(int(stop))
  assert met == set(range(len(levels)))


def test_the_gradient_of_the_samples_is_the_written_formula():
  """With guidance on the real score only."""
  fake, teacher = teachers()
  rows, _ = steps.rows_of(batch(groups=1))
  config = dmd_toy.config(guidance=3.0)
  keys = dmd_step.draws(KEY)
  x0 = jax.random.normal(jax.random.key(1), (GROUP, 1, 2))
  scores = dmd_step.Scores(
    dmd_toy.NETS, fake, [teacher], jnp.ones((1, GROUP)), rows
  )
  g, t_B, gap_B = dmd_step.score_gradient(config, scores, x0, 0, keys)
  eps = jax.random.normal(keys["eps"], x0.shape)
  t = t_B[:, None, None]
  x_t = (1 - t) * x0 + t * eps
  c, u = (
    dmd_toy.apply(teacher, x_t, t_B, rows[name])
    for name in ("condition", "negative")
  )
  real = u + 3.0 * (c - u)
  v_fake = dmd_toy.apply(fake, x_t, t_B, rows["condition"])
  norm = jnp.mean(jnp.abs(x0 - (x_t - t * real)), axis=(1, 2), keepdims=True)
  np.testing.assert_allclose(g, t * (real - v_fake) / norm, rtol=1e-4)
  np.testing.assert_allclose(
    gap_B, jnp.mean((real - v_fake) ** 2, axis=(1, 2)), rtol=1e-4
  )


def test_decoupled_guidance_looks_at_a_cleaner_sample():
  seen = []

  def spy(params, x, sigma_B, condition):
    jax.debug.callback(lambda s: seen.append(np.asarray(s)), sigma_B)
    return dmd_toy.apply(params, x, sigma_B, condition)

  fake, teacher = teachers()
  rows, _ = steps.rows_of(batch(groups=1))
  nets = dmd_step.Networks(spy, None, None, None)
  scores = dmd_step.Scores(nets, fake, [teacher], jnp.ones((1, GROUP)), rows)
  x0 = jnp.zeros((GROUP, 1, 2))
  for stop, level in enumerate(dmd_toy.SIGMAS):
    seen.clear()
    out = dmd_step.score_gradient(
      dmd_toy.config(decoupled=True), scores, x0, stop, dmd_step.draws(KEY)
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert len(seen) == 4  # fake and teacher at one, both branches at another
    close(seen[0], seen[1])
    close(seen[2], seen[3])
    assert seen[2].max() < level and np.abs(seen[2] - seen[0]).max() > 0.05


def test_teachers_count_by_step_and_category():
  one, other = teachers()
  frozen = {dmd_step.TEACHERS: [one, other]}
  config = lambda table: dmd_toy.config(  # noqa: E731
    guidance=2.0, teacher_weights_MKC=np.asarray(table, np.float32)
  )
  all_first = [[[1.0, 1.0]] * 4, [[0.0, 0.0]] * 4]
  t2i_first = [[[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4]
  half = [[[0.5, 0.5]] * 4] * 2
  fake = jax.tree.map(lambda p: 0.5 * p, one)
  gap = lambda table, frozen=frozen: np.asarray(  # noqa: E731
    student_loss(one, fake, frozen, config(table))[1][1]
  )
  single = student_loss(
    one, fake, {dmd_step.TEACHERS: [one]}, config([[[1.0, 1.0]] * 4])
  )[1][1]
  np.testing.assert_allclose(gap(all_first), single, rtol=1e-5)
  mixed, edit = gap(t2i_first), np.arange(GROUP) % 2 == 1
  np.testing.assert_allclose(mixed[~edit], single[~edit], rtol=1e-5)
  assert np.abs(mixed - single)[edit].min() > 1e-5
  # By step: this group stands at one of them.
  condition = batch(groups=1)["condition"]
  _, stop = dmd_step.student_sample(
    config(half), dmd_toy.NETS, one, condition, dmd_step.draws(KEY)
  )
  table = np.asarray([[[1.0, 1.0]] * 4, [[0.0, 0.0]] * 4])
  table[:, stop] = 0.5
  np.testing.assert_allclose(gap(table), gap(half), rtol=1e-5)
  assert np.abs(gap(half) - single).max() > 1e-4


def test_one_program_for_both_phases_and_all_steps():
  config = dmd_toy.config(ratio=RATIO)
  txs = optax.adam(1e-3), optax.adam(1e-3)
  step = jax.jit(dmd_step.make_step(config, dmd_toy.NETS, *txs, 0.5))
  state = dmd_state.create(teachers()[0], teachers()[0], *txs)
  seen = set()
  for i in range(3):
    state, metrics = step(state, batch(), KEY)
    assert int(state.step) == i + 1
    seen.add(float(metrics["fake_loss"]))  # other noise at every step
  assert step._cache_size() == 1 and len(seen) == 3


def test_a_step_that_is_not_finite_changes_neither_model():
  config = dmd_toy.config(ratio=RATIO)
  txs = optax.adam(1e-3), optax.adam(1e-3)
  step = health.skip_nonfinite(
    dmd_step.make_step(config, dmd_toy.NETS, *txs, 0.5)
  )
  start = dmd_state.create(teachers()[0], teachers()[0], *txs)
  bad = batch()
  # A row that only an update of the fake score sees: row 0 is in group 0.
  bad["condition"] = bad["condition"].at[0].set(jnp.nan)
  new, metrics = jax.jit(step)(start, bad, KEY)
  assert metrics["skipped"] == 1.0 and int(new.step) == 1
  assert same(new.replace(step=start.step), start)
  new, metrics = jax.jit(step)(start, batch(), KEY)
  assert metrics["skipped"] == 0.0 and not same(new.fake, start.fake)


def test_resume_is_bit_identical(tmp_path):
  """Both models, both optimizers and the step, through a checkpoint."""
  config = dmd_toy.config(ratio=RATIO)
  txs = optax.adam(1e-2), optax.adam(1e-2)
  step = jax.jit(dmd_step.make_step(config, dmd_toy.NETS, *txs, 0.5))
  start = dmd_state.create(teachers()[0], teachers()[0], *txs)
  whole = [start]
  for _ in range(4):
    whole.append(step(whole[-1], batch(), KEY)[0])
  store = checkpoints.CheckpointStore(str(tmp_path))
  store.save(2, whole[2], {})
  store.close()
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), start
  )
  store = checkpoints.CheckpointStore(str(tmp_path), read_only=True)
  state, _ = store.restore_newest(abstract)
  store.close()
  for _ in range(2):
    state, _ = step(state, batch(), KEY)
  assert jax.tree.structure(state) == jax.tree.structure(whole[4])
  assert same(state, whole[4]) and not same(state, whole[3])


def test_gaps_are_kept_by_noise_level():
  gap, values = dmd_state.record_gap(
    jnp.zeros((2, 5)), jnp.asarray([0.1, 0.15, 0.95, 1.0]),
    jnp.asarray([1.0, 7.0, 4.0, 4.0]),
  )  # fmt: skip
  np.testing.assert_allclose(values, [2.0, 0.0, 0.0, 0.0, 2.0])
  _, later = dmd_state.record_gap(gap, jnp.asarray([0.5]), jnp.asarray([9.0]))
  np.testing.assert_allclose(later, [2.0, 0.0, 3.0, 0.0, 2.0], rtol=1e-5)


@functools.cache
def toy_teacher(count=4000):
  return dmd_toy.teacher(jax.random.key(0), count)


def test_four_steps_of_the_student_beat_four_of_the_teacher():
  """A short run with one seed; the long ones are marked slow."""
  teacher = toy_teacher(1000)
  before, _, _ = dmd_toy.judge(dmd_toy.few_steps(teacher))
  student = dmd_toy.distil(teacher, seed=0, count=150, group=64)
  distance, inside, _ = dmd_toy.judge(dmd_toy.few_steps(student))
  assert before > 0.06
  assert distance < before / 2 and inside >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_eight_gaussians_in_four_steps(seed):
  student = dmd_toy.distil(toy_teacher(), seed, count=1000)
  distance, inside, smallest = dmd_toy.judge(dmd_toy.few_steps(student))
  print(f"seed {seed}: {distance:.4f} {inside:.3f} {smallest:.2f}")
  assert distance <= 0.025 and inside >= 0.95 and smallest >= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("steps_", [1, 2, 8])
def test_other_grids(steps_):
  """Two steps need the last one trained more often: `step_weights`."""
  sigmas = backward_simulation.grid(steps_)
  student = dmd_toy.distil(
    toy_teacher(), 0, 1000, sigmas=sigmas,
    step_weights=(1.0,) * (steps_ - 1) + (4.0,),
    teacher_weights_MKC=np.ones((1, steps_, 2), np.float32),
  )  # fmt: skip
  x = dmd_toy.few_steps(student, sigmas)
  distance, inside, smallest = dmd_toy.judge(x)
  print(f"{steps_} steps: {distance:.4f} {inside:.3f} {smallest:.2f}")
  assert distance <= 0.025 and inside >= 0.95 and smallest >= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["sign", "no fake score"])
def test_broken_gradients_fail(mutant, monkeypatch):
  right = dmd.gradient

  def wrong(x0, x_t, t_B, v_fake, v_real, weight):
    if mutant == "sign":
      return -right(x0, x_t, t_B, v_fake, v_real, weight)
    own = (x_t - x0) / t_B[:, None, None]  # its clean estimate is x0 itself
    return right(x0, x_t, t_B, own, v_real, weight)

  monkeypatch.setattr(dmd, "gradient", wrong)
  student = dmd_toy.distil(toy_teacher(), seed=0, count=1000)
  assert dmd_toy.judge(dmd_toy.few_steps(student))[0] > 0.3


@pytest.mark.slow
def test_the_real_teacher_is_good_with_many_steps():
  """So that the student has something to learn."""
  x = dmd_toy.sample(toy_teacher(), jnp.linspace(1.0, 0.0, 41))
  distance, inside, _ = dmd_toy.judge(x)
  assert distance < 0.01 and inside > 0.98
