# SPDX-License-Identifier: Apache-2.0
"""The training step of the VAE's recipe.

The encoder's gradient is linear in the gradient at the latents. So both
losses are differentiated to the latents, VA-VAE's weight comes from their
pull through the last convolution alone, and the encoder is traversed once
with the weighted sum. Under accumulation the weight is that of the whole
batch: the parts run first to their latents' gradients, and then the encoder
runs again, for one more of its forward passes.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qi2_jax.objectives.alignment import adaptive_weight
from qi2_jax.training import steps, vae_loss, vae_state
from qi2_jax.training.state import ema_update
from qi2_jax.training.vae_loss import Networks
from qi2_jax.training.vae_state import VaeState


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What the step does.

  Attributes:
    nets: the modules.
    schedules: by name, `step -> value`.
    part: key of `vae_state.PARTS`.
    adaptive: VA-VAE's weight on the alignment; else its schedule is all.
  """

  nets: Networks
  schedules: dict[str, Callable]
  part: str
  adaptive: bool


@dataclasses.dataclass(frozen=True)
class _Problem:
  """One step's constants: all but the rows of the batch."""

  recipe: Recipe
  values: dict
  trained: dict
  rest: dict
  projection: dict
  frozen: dict

  def encode(self, image):
    """Moments, and the pull of their gradients back to `trained`."""

    def run(trained):
      params = vae_state.merge(trained, self.rest)
      return vae_loss.encode(self.recipe.nets, params, image)

    return jax.vjp(run, self.trained)


def _kernel(gradients: dict) -> jax.Array:
  return gradients["encoder"]["conv_out"]["kernel"]


def _to_latents(problem: _Problem, image, moments, pull) -> dict:
  """Everything up to the gradients at the latents.

  Returns:
    `sums`: what is averaged over parts: gradients and metrics. `rows`:
    gradients at the moments, with a row per example.
  """
  p = problem
  nets = p.recipe.nets

  def rec(trained, moments):
    params = vae_state.merge(trained, p.rest)
    return vae_loss.reconstruction(
      nets, p.frozen, p.values, params, moments, image
    )

  (loss, metrics), (direct, at_moments) = jax.value_and_grad(
    rec, argnums=(0, 1), has_aux=True
  )(p.trained, moments)
  sums = {"rec": loss, "metrics": metrics, "direct": direct}
  rows = {"rec": at_moments}
  if nets.dinov2 is None:
    return {"sums": sums, "rows": rows}
  (align, parts), (projection, at_mean) = jax.value_and_grad(
    lambda w, z: vae_loss.semantic(nets, p.frozen, p.values, w, z, image),
    argnums=(0, 1), has_aux=True,
  )(p.projection, moments[0])  # fmt: skip
  sums["metrics"] = metrics | parts
  sums |= {"align": align, "projection": projection}
  rows["align"] = (at_mean, jnp.zeros_like(moments[1]))
  if p.recipe.adaptive:
    sums["kernels"] = {n: _kernel(pull(rows[n])[0]) for n in rows}
  return {"sums": sums, "rows": rows}


def _weight(problem: _Problem, sums: dict) -> jax.Array:
  """The factor of the alignment loss."""
  strength = problem.values["align"]
  if not problem.recipe.adaptive:
    return strength
  kernels = sums["kernels"]
  return strength * adaptive_weight(
    lambda g: g, kernels["rec"], kernels["align"]
  )


def _at_moments(rows: dict, weight) -> tuple[jax.Array, jax.Array]:
  if "align" not in rows:
    return rows["rec"]
  return jax.tree.map(lambda r, a: r + weight * a, rows["rec"], rows["align"])


def _float(tree):
  return jax.tree.map(lambda g: g.astype(jnp.float32), tree)


def _mean_scan(one: Callable, parts, count: int):
  """`(mean of the first result, stacked second results)` of `one(part)`."""
  abstract, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
  zero = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), abstract)

  def body(total, part):
    sums, rows = one(part)
    return jax.tree.map(lambda t, s: t + s, total, _float(sums)), rows

  total, rows = jax.lax.scan(body, zero, parts)
  return jax.tree.map(lambda t: t / count, total), rows


def _gradients(problem: _Problem, image, accumulate: int):
  """`(gradients of trained, sums, weight)` of the whole batch."""
  weigh = problem.recipe.nets.dinov2 is not None
  if accumulate == 1:
    moments, pull = problem.encode(image)
    out = _to_latents(problem, image, moments, pull)
    weight = _weight(problem, out["sums"]) if weigh else 0.0
    indirect = pull(_at_moments(out["rows"], weight))[0]
    sums = out["sums"]
  else:
    parts = steps.microbatches(image, accumulate)

    def first(part):
      out = _to_latents(problem, part, *problem.encode(part))
      return out["sums"], out["rows"]

    sums, rows = _mean_scan(first, parts, accumulate)
    weight = _weight(problem, sums) if weigh else 0.0

    def second(part):
      image, rows = part
      _, pull = problem.encode(image)
      return pull(_at_moments(rows, weight))[0], ()

    indirect, _ = _mean_scan(second, (parts, rows), accumulate)
  add = lambda a, b: a.astype(jnp.float32) + b.astype(jnp.float32)  # noqa: E731
  return jax.tree.map(add, indirect, sums["direct"]), sums, weight


def make_step(
  recipe: Recipe, optimizer: optax.GradientTransformation, ema_decay: float,
  accumulate: int = 1,
):  # fmt: skip
  """Losses, gradients, optimizer and EMA.

  Args:
    recipe: see `Recipe`.
    optimizer: of the trained parameters and the projection.
    ema_decay: of the averaged parameters.
    accumulate: microbatches of a batch; the result is that of the whole.

  Returns:
    `step(state, features, key) -> (state, metrics)` on `VaeState`; features
    are `image` and, under `FROZEN`, parameters of the frozen networks.
  """

  def step(state: VaeState, features, key):
    del key  # The posterior mean needs no noise.
    values = {n: f(state.step) for n, f in recipe.schedules.items()}
    trained, rest = vae_state.split(state.params, recipe.part)
    problem = _Problem(
      recipe, values, trained, rest, state.projection,
      features.get(steps.FROZEN, {}),
    )  # fmt: skip
    gradient, sums, weight = _gradients(problem, features["image"], accumulate)
    grads = {"vae": gradient, "projection": {}}
    metrics = dict(sums["metrics"])
    loss = sums["rec"]
    if "align" in sums:
      grads["projection"] = jax.tree.map(
        lambda g: weight * g, sums["projection"]
      )
      metrics["align_weight"] = weight
      loss = loss + weight * sums["align"]
    old = {"vae": trained, "projection": state.projection}
    updates, opt_state = optimizer.update(grads, state.opt_state, old)
    new = optax.apply_updates(old, updates)
    params = vae_state.merge(new["vae"], rest)
    metrics |= {
      "loss": loss,
      "grad_norm": optax.global_norm(grads),
      "update_norm": optax.global_norm(updates),
      "param_norm": optax.global_norm(params),
    }
    # An average of equal numbers is rounded: what is not trained stays out.
    ema_trained, ema_rest = vae_state.split(state.ema, recipe.part)
    ema = vae_state.merge(
      ema_update(ema_trained, new["vae"], state.step, ema_decay), ema_rest
    )
    return VaeState(
      state.step + 1, params, ema, opt_state, new["projection"]
    ), metrics

  return step
