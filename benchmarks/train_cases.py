# SPDX-License-Identifier: Apache-2.0
"""The same training step for diffusers and for qi2_jax.

Flow matching on one fixed batch: velocity, mean squared error, gradient,
clipping by the global norm, AdamW. Weights, moments and gradients are fp32 on
both sides; with bf16 the forward pass computes in it (torch: autocast).

Shapes: B batch, N target tokens, Z latent channels.
"""

import copy
import dataclasses
from collections.abc import Callable

import diffusers_cases
import jax
import jax.numpy as jnp
import optax
import torch

from qi2_jax.models import mmdit_flops
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.training import build, steps

# The optimizer of experiments/common.py, without its warm-up.
B1, B2, EPS, DECAY, CLIP = 0.9, 0.95, 1e-8, 0.001, 1.0


@dataclasses.dataclass(frozen=True)
class Race:
  """Both sides, ready to run.

  Attributes:
    steps: by name, a function that runs one step and returns its loss and
      the norm of its gradient as floats, when all of it is done.
    kernel: attention kernel of ours.
    flops: model FLOPs of one step, without recomputation.
    parameters: number of them.
  """

  steps: dict[str, Callable[[], tuple[float, float]]]
  kernel: str
  flops: float
  parameters: int


def their_step(model, inputs, values, device: str, compiled: bool) -> Callable:
  """One training step of diffusers' transformer in PyTorch."""
  place = lambda name: torch.as_tensor(inputs[name]).to(device)  # noqa: E731
  model = copy.deepcopy(model).to(device).train()
  if values.remat:
    model.enable_gradient_checkpointing()
  parameters = list(model.parameters())
  adam = torch.optim.AdamW(
    parameters, lr=values.learning_rate, betas=(B1, B2), eps=EPS,
    weight_decay=DECAY, fused=device != "cpu",
  )  # fmt: skip
  x0, noise, sigma = place("image"), place("noise"), place("sigma")
  fixed = diffusers_cases.their_condition(place("text"), inputs["grid"])
  forward = torch.compile(model) if compiled else model
  level = sigma[:, None, None]
  noisy = (1 - level) * x0 + level * noise
  half = values.dtype == "bfloat16"

  def step():
    with torch.autocast(device, torch.bfloat16, enabled=half):
      out = forward(hidden_states=noisy, timestep=sigma, **fixed)[0]
    v = out[:, -x0.shape[1] :].float()
    loss = torch.square(v - (noise - x0)).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    adam.step()
    adam.zero_grad(set_to_none=True)
    done = float(loss.detach()), float(norm)
    if device != "cpu":
      torch.cuda.synchronize()
    return done

  return step


def our_step(model: MMDiT, params, inputs, values, device) -> Callable:
  """One training step of qi2_jax: the loss and optimizer of its stages."""
  loss_fn = steps.flow_matching_loss(
    model, logit_mean=0.0, logit_std=1.0, shift=None
  )
  tx = optax.chain(
    optax.clip_by_global_norm(CLIP),
    optax.adamw(values.learning_rate, B1, B2, EPS, weight_decay=DECAY),
  )
  batch = {
    "latents_BNZ": inputs["image"], "noise_BNZ": inputs["noise"],
    "sigma_B": inputs["sigma"],
  }  # fmt: skip
  batch = jax.device_put(batch, device)
  batch["condition"] = diffusers_cases.condition(inputs, device)
  # Copies: these are donated, and torch may hold the originals.
  params = jax.tree.map(lambda x: jnp.array(x, device=device), params)
  state = [params, jax.jit(tx.init)(params)]

  def update(params, moments, batch):
    grad_fn = jax.value_and_grad(loss_fn.mean, has_aux=True)
    (loss, _), grads = grad_fn(params, batch)
    updates, moments = tx.update(grads, moments, params)
    norm = optax.global_norm(grads)
    return optax.apply_updates(params, updates), moments, (loss, norm)

  update = jax.jit(update, donate_argnums=(0, 1))

  def step():
    *state[:], out = update(*state, batch)
    jax.block_until_ready(state)
    return tuple(float(x) for x in out)

  return step


def race(values, device, torch_device: str) -> Race:
  """Builds both sides from the same random weights.

  Args:
    values: flags: size, text, batch, layers, width, dtype, remat,
      learning_rate, torch_compile.
    device: of JAX.
    torch_device: of PyTorch.
  """
  theirs, ours, params = diffusers_cases.mmdit_pair(values)
  config = dataclasses.replace(
    ours.config, dtype=jnp.dtype(values.dtype),
    remat="full" if values.remat else "none",
  )  # fmt: skip
  config = build.with_kernel(config, platform=device.platform)
  inputs = diffusers_cases.random_inputs(values, values.batch)
  tokens = mmdit_flops.Tokens(
    target=inputs["noise"].shape[1], text=values.text, references=0,
    prefix=values.text,
  )  # fmt: skip
  found = {
    "diffusers": their_step(theirs, inputs, values, torch_device, False),
    "ours": our_step(MMDiT(config), params, inputs, values, device),
  }
  if values.torch_compile:
    found["diffusers compiled"] = their_step(
      theirs, inputs, values, torch_device, True
    )
  return Race(
    found, config.kernel,
    mmdit_flops.step_flops(config, tokens, values.batch).model,
    sum(p.numel() for p in theirs.parameters()),
  )  # fmt: skip
