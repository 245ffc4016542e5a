# SPDX-License-Identifier: Apache-2.0
"""The update of Flow-GRPO on the features of a rollout.

Shapes: B images, W trained steps of each, N tokens, Z channels, P prompts;
rows of steps have B W entries, image 0's first.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qi2_jax.models import lora, mmdit
from qi2_jax.objectives import flow_grpo
from qi2_jax.training import steps
from qi2_jax.training.rollout import PROBE, RolloutConfig
from qi2_jax.training.state import TrainState

# Rewards and the like, `{name: [B]}`; their means are logged.
LOG = "log"


def transitions(rows: dict) -> flow_grpo.Transition:
  """All trained steps of all images."""
  x, sigmas = rows["states_BWNZ"], rows["sigmas_BW"]
  flat = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
  return flow_grpo.Transition(
    flat(x[:, :-1]), flat(x[:, 1:]), flat(sigmas[:, :-1]), flat(sigmas[:, 1:])
  )


def per_step(tree, count: int):
  """Rows of images to rows of steps."""
  return jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), tree)


def score(
  rollout: RolloutConfig, module: mmdit.MMDiT, params, rows: dict
) -> flow_grpo.Scored:  # fmt: skip
  """Every trained step under `params`: the function of old and new alike.

  Args:
    rollout: how the rows were made.
    module: the network.
    params: its parameters; a LoRA may be attached.
    rows: features of the rollout.
  """
  at = transitions(rows)
  count = rows["sigmas_BW"].shape[1] - 1

  # Whoever attaches a LoRA opens `lora.beside_kernels`: twice would add it
  # twice.
  def apply(condition):
    return module.apply(
      {"params": params}, at.x, at.sigma_B, per_step(condition, count)
    )

  c = apply(rows["condition"])
  u = apply(rows["negative"]) if rollout.hybrid == "full" else None
  cached = rows.get("cached_BWNZ")
  if cached is not None:
    cached = cached.reshape(at.x.shape)
  v = flow_grpo.policy_velocity(rollout.hybrid, c, u, cached, rollout.guidance)
  return flow_grpo.score(rollout.kernel, v, at)


def old_fields(old: flow_grpo.Scored, batch: int) -> dict:
  """The old policy as features, so that they may be split and reordered."""
  split = lambda a: a.reshape(batch, -1, *a.shape[1:])  # noqa: E731
  return {
    "old_mean_BWNZ": split(old.mean), "old_log_prob_BW": split(old.log_prob_B),
  }  # fmt: skip


def _old(rows: dict, new: flow_grpo.Scored) -> flow_grpo.Scored:
  """The old policy of the rows; before any update it is the new one."""
  if "old_mean_BWNZ" not in rows:
    return jax.lax.stop_gradient(new)
  return flow_grpo.Scored(
    rows["old_mean_BWNZ"].reshape(new.mean.shape), new.std,
    jnp.ravel(rows["old_log_prob_BW"]),
  )  # fmt: skip


def loss(
  config: flow_grpo.GrpoConfig, rollout: RolloutConfig, module: mmdit.MMDiT
) -> steps.Loss:  # fmt: skip
  """The loss of features of a rollout with advantages.

  Args:
    config: of the surrogate.
    rollout: how the rows were made.
    module: the network.

  Returns:
    The loss of `rollout.features` with `advantage_B`, `weight_B` (see
    `advantages.row_weights`), `LOG` and, for a penalty, `reference_BWNZ`: the
    means of the reference model.
  """

  def mean(params, rows):
    new = score(rollout, module, params, rows)
    count = rows["sigmas_BW"].shape[1] - 1
    reference = None
    if config.kl_weight:
      means = rows["reference_BWNZ"].reshape(new.mean.shape)
      reference = new.replace(mean=means)
    each, metrics = flow_grpo.policy_loss(
      config, transitions(rows), new, _old(rows, new),
      per_step(rows["advantage_B"], count), reference,
    )  # fmt: skip
    weight = per_step(rows["weight_B"], count)
    gap = jnp.abs(new.log_prob_B - jnp.ravel(rows["log_probs_BW"]))
    metrics |= {"rollout_gap": gap}
    metrics = {k: jnp.mean(v) for k, v in metrics.items()}
    metrics |= {k: jnp.mean(v) for k, v in rows[LOG].items()}
    return jnp.mean(weight * each), metrics

  return steps.Loss(lambda rows, key: rows, mean)


def make_step(
  loss_fn: steps.Loss, optimizer: optax.GradientTransformation,
  ema_decay: float, accumulate: int, updates: int, old: Callable,
):  # fmt: skip
  """The step of a rollout: one update, or several on parts of it.

  Args:
    loss_fn: of the rows.
    optimizer: counts updates.
    ema_decay: per update.
    accumulate: see `steps.make_step`.
    updates: parts of a rollout; every group has images in each.
    old: `(trained, rows and frozen) -> Scored` of the policy before the
      first update; only used for several.

  Returns:
    `step(state, features, key) -> (state, metrics)`.
  """
  one = steps.make_step(loss_fn, optimizer, ema_decay, accumulate)
  if updates == 1:
    return one

  def step(state: TrainState, features, key):
    rows, frozen = steps.rows_of(features)
    before = jax.lax.stop_gradient(old(state.params, features))
    rows |= old_fields(before, len(rows["advantage_B"]))
    parts = jax.tree.map(lambda x: steps.microbatches(x, updates), rows)

    def update(state, part):
      return one(state, part | frozen, key)

    new, metrics = jax.lax.scan(update, state, parts)
    metrics = jax.tree.map(functools.partial(jnp.mean, axis=0), metrics)
    return new.replace(step=state.step + 1), metrics

  return step


def with_drift(step: Callable, module: mmdit.MMDiT, policy: Callable):
  """Logs how far a step moves the unconditional velocity at `PROBE`.

  Two forwards of one state per prompt, or three, none with a gradient. The
  velocity before the step is computed anew and not taken from the rollout,
  whose rounding in bf16 may be larger than what one step moves.

  Args:
    step: see `make_step`.
    module: the network.
    policy: `(trained, features) -> params`; a LoRA may be attached.

  Returns:
    The same signature; the features may hold `PROBE`, and the metrics then
    gain `uncond_drift`, by this step, and of a LoRA `uncond_drift_base`, from
    its base to now. See `flow_grpo.relative_drift`.
  """

  def velocity(params, probe):
    with lora.beside_kernels():
      return module.apply(
        {"params": params}, probe["x_PNZ"], probe["sigma_P"],
        probe["condition"],
      )  # fmt: skip

  def logged(state: TrainState, features, key):
    probe = features.get(PROBE)
    rest = {k: v for k, v in features.items() if k != PROBE}
    if probe is None:
      return step(state, rest, key)
    before = velocity(policy(state.params, rest), probe)
    new, metrics = step(state, rest, key)
    after = velocity(policy(new.params, rest), probe)
    since = {"uncond_drift": before}
    if steps.FROZEN in rest:
      since["uncond_drift_base"] = velocity(rest[steps.FROZEN], probe)
    drift = {
      name: jnp.mean(flow_grpo.relative_drift(after, v))
      for name, v in since.items()
    }
    return new, metrics | drift

  return logged
