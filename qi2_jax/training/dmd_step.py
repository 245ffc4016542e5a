# SPDX-License-Identifier: Apache-2.0
"""One step of distillation: updates of the fake score, then of the student.

TTUR (two time-scale update rule; Yin et al. 2024, arXiv 2405.14867, section
4.2): the fake score must follow the student, so it is updated `ratio` times
as often. All of it is one step of one program: a scan over the updates of the
fake score, then the student's. Unlike a branch on the step number, every
metric exists at every step, a step counts one update of the student as papers
do, prompts of both tasks meet both phases whatever the ratio is, and a
non-finite update of either model undoes the step as a whole.

A batch holds `ratio + 1` groups, each used once: the last is the student's.

Shapes: B examples of one group, N tokens, Z channels, M teachers, K student
steps, C categories.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qi2_jax.flow import backward_simulation, path, sampler
from qi2_jax.objectives import dmd, flow_matching
from qi2_jax.training import dmd_gan, dmd_state, steps
from qi2_jax.training.dmd_draws import draws, noisy, normal
from qi2_jax.training.dmd_state import DmdState
from qi2_jax.training.state import ema_update

# Names of the frozen parameters in the features.
TEACHERS, BASE = "teachers", "base"


@dataclasses.dataclass(frozen=True)
class Networks:
  """How parameters become velocities.

  Attributes:
    apply: `(params, x_BNZ, sigma_B, condition) -> v_BNZ`, differentiable.
    rollout: `(params, condition) -> ((x, sigma scalar) -> v)`, for several
      steps at one condition; what they share is computed once.
    student: `(trained, frozen) -> params` of the student: itself, or a base
      with the trained factors beside its kernels.
    shape: `condition -> (B, N, Z)` of the samples.
    hidden: like `apply`, with the last hidden states `[B, N, D]` behind the
      velocity; for a GAN head.
  """

  apply: Callable
  rollout: Callable
  student: Callable
  shape: Callable
  hidden: Callable | None = None


@dataclasses.dataclass(frozen=True)
class DmdConfig:
  """What is distilled and how.

  Attributes:
    sigmas: the student's noise levels without the final 0.
    step_weights: how often each step is the one that is trained, relative to
      the others. The fake score learns the mixture of all steps' samples;
      only those of the last step are images, so the more it counts the more
      the mixture is what has to match the teacher.
    guidance: scale of the real score, `u + w (c - u)`.
    times: p(t) of the compared scores.
    fake_times: p(t) of the fake score's own training.
    weight: see `objectives.dmd.gradient`.
    decoupled: guidance at a cleaner noise level of its own.
    sampler: between two steps of the student: `euler`, as the exported model
      is sampled, or `renoise`.
    ratio: updates of the fake score per update of the student.
    teacher_weights_MKC: see `objectives.dmd.teacher_weights`.
    gan: of a run with a GAN head.
  """

  sigmas: tuple[float, ...]
  step_weights: tuple[float, ...]
  guidance: float
  times: dmd.Times
  fake_times: dmd.Times
  weight: str
  decoupled: bool
  sampler: str
  ratio: int
  teacher_weights_MKC: np.ndarray
  gan: dmd_gan.GanConfig | None = None


def add(base, difference):
  """A model that is stored as its difference from another, in fp32."""
  return jax.tree.map(
    lambda b, d: b.astype(jnp.float32) + d, base, difference
  )  # fmt: skip


def student_sample(
  config: DmdConfig, nets: Networks, params, condition, keys
):  # fmt: skip
  """A clean sample of the student at a random step of its grid.

  The gradient goes through that step alone.

  Args:
    config: see `DmdConfig`.
    nets: see `Networks`.
    params: of the student.
    condition: of B prompts.
    keys: see `dmd_draws.draws`.

  Returns:
    `(x0_BNZ, number of the step)`. One step serves the whole group, so that
    the steps before it need not be computed for all.
  """
  chances = jnp.log(jnp.asarray(config.step_weights, jnp.float32))
  stop = jax.random.categorical(keys["stop"], chances)
  sigmas = jnp.asarray([*config.sigmas, 0.0], jnp.float32)
  velocity = nets.rollout(jax.lax.stop_gradient(params), condition)
  x = backward_simulation.state_at(
    velocity, normal(keys["noise"], nets.shape(condition)), sigmas, stop,
    keys["renoise"] if config.sampler == "renoise" else None,
  )  # fmt: skip
  sigma_B = jnp.broadcast_to(sigmas[stop], (x.shape[0],))
  v = nets.apply(params, x, sigma_B, condition)
  return path.data_from_velocity(x, v.astype(jnp.float32), sigma_B), stop


def fake_loss(
  config: DmdConfig, nets: Networks, params, x0, condition, keys
):  # fmt: skip
  """Flow matching of the fake score on samples of the student, no guidance.

  Args:
    config: see `DmdConfig`.
    nets: see `Networks`.
    params: of the fake score.
    x0: clean samples `[B, N, Z]`.
    condition: of their prompts.
    keys: see `dmd_draws.draws`.
  """
  x0 = jax.lax.stop_gradient(x0)
  t_B = dmd.draw_times(keys["times"], x0.shape[0], config.fake_times)
  x_t, eps = noisy(x0, t_B, keys["eps"])
  v = nets.apply(params, x_t, t_B, condition)
  return flow_matching.velocity_mse(v, path.velocity(x0, eps)).mean()


@dataclasses.dataclass(frozen=True)
class Scores:
  """The models that judge a group of samples.

  Attributes:
    nets: see `Networks`.
    fake: parameters of the fake score.
    teachers: parameters of each teacher.
    weights_MB: of each teacher for each sample.
    rows: `condition` and `negative` of the samples.
  """

  nets: Networks
  fake: dict
  teachers: list
  weights_MB: jax.Array
  rows: dict

  def velocity_fake(self, x_t, t_B):
    """Of the fake score."""
    return self.nets.apply(self.fake, x_t, t_B, self.rows["condition"])

  def velocity_real(self, x_t, t_B, condition=None):
    """Of the mixed teachers; for the prompts unless told otherwise."""
    if condition is None:
      condition = self.rows["condition"]
    each = [self.nets.apply(p, x_t, t_B, condition) for p in self.teachers]
    return dmd.mix(each, self.weights_MB)

  def both_branches(self, x_t, t_B):
    """Of the mixed teachers for prompts and for empty prompts: `[2, ...]`.

    One after the other through one compiled body: joining them along the
    batch would move rows between devices.
    """
    pair = jax.tree.map(
      lambda a, b: jnp.stack([a, b]), self.rows["condition"],
      self.rows["negative"],
    )  # fmt: skip
    return jax.lax.map(lambda c: self.velocity_real(x_t, t_B, c), pair)


def score_gradient(config: DmdConfig, scores: Scores, x0, stop, keys):
  """The gradient of DMD at samples of the student.

  Args:
    config: see `DmdConfig`.
    scores: who compares.
    x0: clean samples `[B, N, Z]`.
    stop: the step of the student that made them.
    keys: see `dmd_draws.draws`.

  Returns:
    `(gradient, t_B, mean squared difference of fake and real velocity [B])`.
  """
  batch = x0.shape[0]
  t_B = dmd.draw_times(keys["times"], batch, config.times)
  x_t, _ = noisy(x0, t_B, keys["eps"])
  fake = scores.velocity_fake(x_t, t_B)
  if not config.decoupled:
    c, u = scores.both_branches(x_t, t_B)
    real = sampler.guide(c, u, config.guidance)
    g = dmd.gradient(x0, x_t, t_B, fake, real, config.weight)
    return g, t_B, flow_matching.velocity_mse(fake, real)
  real = scores.velocity_real(x_t, t_B)
  # Cleaner than the state from which the student made the sample.
  level = jnp.asarray(config.sigmas, jnp.float32)[stop]
  other_B = level * dmd.draw_times(keys["other_times"], batch, config.times)
  other_B = jnp.maximum(other_B, config.times.low)
  x_other, _ = noisy(x0, other_B, keys["other_eps"])
  c, u = scores.both_branches(x_other, other_B)
  g = dmd.decoupled_gradient(
    x0, (t_B, fake, real), (x_other, other_B, c, u), config.guidance,
    config.weight,
  )  # fmt: skip
  return g, t_B, flow_matching.velocity_mse(fake, real)


def student_loss(
  config: DmdConfig, nets: Networks, trained, fake, frozen, rows, keys,
  head=None,
):  # fmt: skip
  """The student's loss on one group.

  Args:
    config: see `DmdConfig`.
    nets: see `Networks`.
    trained: what of the student is trained.
    fake: parameters of the fake score.
    frozen: `{TEACHERS: [params], BASE: params, if any}`.
    rows: `condition`, `negative` and `category_B` of the group.
    keys: see `dmd_draws.draws`.
    head: parameters of the GAN head, if there is one.

  Returns:
    `(mean loss, (t_B, mean squared velocity gap [B], metrics))`.
  """
  params = nets.student(trained, frozen)
  x0, stop = student_sample(config, nets, params, rows["condition"], keys)
  table_MC = jnp.asarray(config.teacher_weights_MKC)[:, stop]
  scores = Scores(
    nets, fake, frozen[TEACHERS], table_MC[:, rows["category_B"]], rows
  )
  g, t_B, gap_B = jax.lax.stop_gradient(
    score_gradient(config, scores, jax.lax.stop_gradient(x0), stop, keys)
  )
  loss, metrics = dmd.generator_loss(x0, g).mean(), {}
  if head is not None:
    term, metrics = dmd_gan.student_loss(
      config, nets.hidden, fake, head, x0, rows["condition"], keys
    )
    loss += term
  return loss, (t_B, gap_B, metrics)


def _update(tx, grads, opt_state, params):
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def train_fake(
  config: DmdConfig, nets: Networks, tx, state: DmdState, frozen, parts, keys
):  # fmt: skip
  """Updates the fake score once per group.

  Args:
    config: see `DmdConfig`.
    nets: see `Networks`.
    tx: optimizer of the fake score.
    state: of the run; its student is left alone.
    frozen: see `student_loss`.
    parts: rows with a leading axis of groups.
    keys: one per group.

  Returns:
    `((fake, its optimizer state), mean metrics)`.
  """
  student = nets.student(state.params, frozen)

  def one(carry, given):
    fake, opt_state = carry
    rows, keys = given[0], draws(given[1])
    x0, _ = student_sample(config, nets, student, rows["condition"], keys)

    def loss_fn(fake):
      difference, head = dmd_gan.parts(config, fake)
      params = add(frozen[TEACHERS][0], difference)
      if head is not None:
        return dmd_gan.fake_loss(
          config, nets.hidden, params, head, x0, rows, keys
        )
      return fake_loss(config, nets, params, x0, rows["condition"], keys), {}

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(fake)
    carry = _update(tx, grads, opt_state, fake)
    norm = optax.global_norm(grads)
    return carry, {"fake_loss": loss, "fake_grad_norm": norm, **metrics}

  start = state.fake, state.fake_opt_state
  carry, metrics = jax.lax.scan(one, start, (parts, keys))
  return carry, jax.tree.map(jnp.mean, metrics)


def make_step(
  config: DmdConfig, nets: Networks, tx: optax.GradientTransformation,
  fake_tx: optax.GradientTransformation, ema_decay: float,
):  # fmt: skip
  """The step of distillation.

  Args:
    config: see `DmdConfig`.
    nets: see `Networks`.
    tx: optimizer of the student.
    fake_tx: optimizer of the fake score.
    ema_decay: of the student's averaged parameters, per step.

  Returns:
    `step(state, features, key) -> (state, metrics)` for features with
    `condition`, `negative` (pytrees of B rows each), `category_B`, with a GAN
    head `target_BNZ` (latents of images) and, under `steps.FROZEN`, the frozen
    parameters (see `student_loss`).
  """

  def step(state: DmdState, features, key):
    rows, rest = steps.rows_of(features)
    frozen, groups = rest[steps.FROZEN], config.ratio + 1
    parts = jax.tree.map(lambda x: steps.microbatches(x, groups), rows)
    keys = jax.random.split(jax.random.fold_in(key, state.step), groups)
    first, last = (
      jax.tree.map(lambda x, at=at: x[at], (parts, keys))
      for at in (slice(0, -1), -1)
    )
    (fake, fake_opt_state), metrics = train_fake(
      config, nets, fake_tx, state, frozen, *first
    )

    def loss_fn(trained):
      difference, head = dmd_gan.parts(config, fake)
      params = add(frozen[TEACHERS][0], difference)
      return student_loss(
        config, nets, trained, params, frozen, last[0], draws(last[1]), head
      )

    (loss, (t_B, gap_B, more)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(state.params)
    params, opt_state = _update(tx, grads, state.opt_state, state.params)
    gap_2T, gaps = dmd_state.record_gap(state.gap_2T, t_B, gap_B)
    new = DmdState(
      step=state.step + 1, params=params,
      ema=ema_update(state.ema, params, state.step, ema_decay),
      opt_state=opt_state, fake=fake, fake_opt_state=fake_opt_state,
      gap_2T=gap_2T,
    )  # fmt: skip
    return new, metrics | more | {
      "loss": loss,
      "grad_norm": optax.global_norm(grads),
      "param_norm": optax.global_norm(params),
      **{f"gap_{i}": gap for i, gap in enumerate(gaps)},
    }

  return step
