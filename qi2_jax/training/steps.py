# SPDX-License-Identifier: Apache-2.0
"""Step functions: `step(state, batch, key) -> (state, metrics)`.

Pure and jittable; the loop donates the state. A step works on features, not
on pixels: a task's `encode` turns a host batch into them on the same mesh.
Every array of the features has a leading axis of B examples, except what is
under `FROZEN`: parameters that the loss needs and does not train.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qi2_jax.errors import InputError
from qi2_jax.flow import path, schedules
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.objectives import flow_matching
from qi2_jax.parallel import sharding
from qi2_jax.training.state import TrainState, ema_update

FROZEN = "frozen"


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss in two halves, called as `loss(params, batch, key)`.

  All randomness is drawn for the whole batch and only then may the batch be
  split, so that a result does not depend on the number of parts.

  Attributes:
    draw: `(batch, key) -> batch` with random arrays added, one row each.
    mean: `(params, batch) -> (mean over the rows, metrics)`.
  """

  draw: Callable[..., dict]
  mean: Callable[..., tuple[jax.Array, dict]]

  def __call__(self, params, batch, key) -> tuple[jax.Array, dict]:
    """The loss of a batch and its metrics, both scalars."""
    return self.mean(params, self.draw(batch, key))


def check_batch(batch_size: int, accumulate: int, mesh) -> None:
  """Raises InputError unless every microbatch fills the mesh.

  Args:
    batch_size: of the whole batch, on all devices.
    accumulate: number of microbatches, `config.optimizer.accumulate`.
    mesh: its data and fsdp axes split a microbatch.
  """
  if accumulate < 1 or batch_size % accumulate:
    raise InputError(
      f"a batch of {batch_size} cannot be split into {accumulate} "
      "microbatches; change config.data.batch_size or "
      "config.optimizer.accumulate."
    )
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  if accumulate > 1 and batch_size // accumulate % shards:
    raise InputError(
      f"a microbatch of {batch_size} / {accumulate} = "
      f"{batch_size // accumulate} examples does not divide over data x fsdp "
      f"= {shards} devices; lower config.optimizer.accumulate."
    )
  sharding.check_batch(batch_size, mesh)


def rows_of(features: dict) -> tuple[dict, dict]:
  """Splits features into `(arrays with rows, the FROZEN entry if any)`."""
  frozen = {k: v for k, v in features.items() if k == FROZEN}
  return {k: v for k, v in features.items() if k != FROZEN}, frozen


def make_step(loss_fn: Loss, optimizer, ema_decay: float, accumulate: int = 1):
  """Gradient, optimizer and EMA around a loss.

  Args:
    loss_fn: a `Loss`; any `(params, batch, key) -> (scalar, metrics)` will
      do without accumulation.
    optimizer: an optax transformation.
    ema_decay: of the averaged parameters.
    accumulate: microbatches that a batch is split into. They run one after
      the other; their mean gradient is that of the whole batch.

  Returns:
    `step(state, batch, key) -> (state, metrics)`.
  """

  def step(state: TrainState, batch, key):
    key = jax.random.fold_in(key, state.step)
    if accumulate == 1:
      grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
      (loss, metrics), grads = grad_fn(state.params, batch, key)
    else:
      batch = loss_fn.draw(batch, key)
      loss, metrics, grads = _accumulated(
        loss_fn, state.params, batch, accumulate
      )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = TrainState(
      step=state.step + 1,
      params=params,
      ema=ema_update(state.ema, params, state.step, ema_decay),
      opt_state=opt_state,
    )
    metrics = {
      "loss": loss,
      "grad_norm": optax.global_norm(grads),
      "update_norm": optax.global_norm(updates),
      "param_norm": optax.global_norm(params),
      **metrics,
    }
    return new, metrics

  return step


def microbatches(x: jax.Array, count: int) -> jax.Array:
  """`[B, ...]` to `[count, B / count, ...]`; part i has rows i, i + count, ...

  A device that holds neighbouring rows has a share of every part that way,
  and no row moves.
  """
  parts = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
  return sharding.constrain(parts, None, "batch", *[None] * (x.ndim - 1))


def _accumulated(loss_fn: Loss, params, batch, count: int):
  """Loss, metrics and fp32 gradients, averaged over `count` microbatches.

  A metric is the mean of the microbatches' values, also where the whole
  batch would give another one (psnr).
  """
  rows, frozen = rows_of(batch)
  parts = jax.tree.map(lambda x: microbatches(x, count), rows)
  grad_fn = jax.value_and_grad(loss_fn.mean, has_aux=True)

  def one(total, part):
    (loss, metrics), grads = grad_fn(params, part | frozen)
    total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
    return total, (loss, metrics)

  zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  total, values = jax.lax.scan(one, zero, parts)
  loss, metrics = jax.tree.map(lambda v: v.mean(axis=0), values)
  return loss, metrics, jax.tree.map(lambda t: t / count, total)


def flow_matching_loss(
  model: MMDiT, *, logit_mean: float, logit_std: float,
  shift: schedules.ShiftConfig | None,
) -> Loss:  # fmt: skip
  """Flow-matching loss of `flow_task` features.

  Args:
    model: the velocity network.
    logit_mean: mean of the logit-normal noise levels.
    logit_std: standard deviation of the same.
    shift: resolution-dependent shift of the levels, or None.

  Returns:
    The loss of batches with `latents_BNZ` and `condition`.
  """

  def draw(batch, key):
    shape = size, tokens, _ = batch["latents_BNZ"].shape
    key_sigma, key_noise = jax.random.split(key)
    sigma = schedules.training_sigmas(
      key_sigma, size, tokens, mean=logit_mean, std=logit_std,
      shift_config=shift,
    )  # fmt: skip
    eps = jax.random.normal(key_noise, shape)
    return batch | {"sigma_B": sigma, "noise_BNZ": eps}

  def mean(params, batch):
    x0, eps = batch["latents_BNZ"], batch["noise_BNZ"]
    sigma = batch["sigma_B"]
    x = path.interpolate(x0, eps, sigma)
    v = model.apply({"params": params}, x, sigma, batch["condition"])
    per_example = flow_matching.velocity_mse(v, path.velocity(x0, eps))
    return per_example.mean(), {"sigma": sigma.mean()}

  return Loss(draw, mean)
