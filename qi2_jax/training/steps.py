# SPDX-License-Identifier: Apache-2.0
"""Step functions: `step(state, batch, key) -> (state, metrics)`.

Pure and jittable; the loop donates the state. A step works on features, not
on pixels: a task's `encode` turns a host batch into them on the same mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qi2_jax.flow import path, schedules
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.models.vae import VAE, identity_stats
from qi2_jax.objectives import flow_matching
from qi2_jax.objectives import vae as vae_loss
from qi2_jax.training.state import TrainState, ema_update

Loss = Callable[..., tuple[jax.Array, dict]]


def make_step(loss_fn: Loss, optimizer, ema_decay: float):
  """Gradient, optimizer and EMA around `loss_fn(params, batch, key)`."""

  def step(state: TrainState, batch, key):
    key = jax.random.fold_in(key, state.step)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, metrics), grads = grad_fn(state.params, batch, key)
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


def flow_matching_loss(
  model: MMDiT, *, logit_mean: float, logit_std: float,
  shift: schedules.ShiftConfig | None,
) -> Loss:  # fmt: skip
  """Flow-matching loss of `tasks.flow_task` features.

  Args:
    model: the velocity network.
    logit_mean: mean of the logit-normal noise levels.
    logit_std: standard deviation of the same.
    shift: resolution-dependent shift of the levels, or None.

  Returns:
    `loss(params, batch, key) -> (scalar, metrics)`; batch has `latents_BNZ`
    and `condition`.
  """

  def loss_fn(params, batch, key):
    x0 = batch["latents_BNZ"]
    size, tokens, _ = x0.shape
    key_sigma, key_noise = jax.random.split(key)
    sigma = schedules.training_sigmas(
      key_sigma, size, tokens, mean=logit_mean, std=logit_std,
      shift_config=shift,
    )  # fmt: skip
    eps = jax.random.normal(key_noise, x0.shape)
    x = path.interpolate(x0, eps, sigma)
    v = model.apply({"params": params}, x, sigma, batch["condition"])
    per_example = flow_matching.velocity_mse(v, path.velocity(x0, eps))
    return per_example.mean(), {"sigma": sigma.mean()}

  return loss_fn


def vae_loss_fn(model: VAE, *, smoothing: float) -> Loss:
  """Reconstruction loss of batches with `image` `[B, H, W, C]` in [-1, 1].

  Args:
    model: the VAE; trained on posterior means, without sampling or KL.
    smoothing: width of the quadratic bottom of the L1, 0 for plain L1.
  """

  def loss_fn(params, batch, key):
    del key  # The posterior mean needs no noise.
    image = batch["image"]
    stats = identity_stats(model.config.z_dim)
    variables = {"params": params, "latent_stats": stats}
    reconstruction, _, _ = model.apply(variables, image)
    loss = vae_loss.smooth_l1(reconstruction, image, smoothing).mean()
    mse = jnp.mean(jnp.square(jnp.clip(reconstruction, -1, 1) - image))
    psnr = 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10))
    return loss, {"psnr": psnr}

  return loss_fn
