# SPDX-License-Identifier: Apache-2.0
"""The same work for diffusers and for qi2_jax, on the same random weights.

Random diffusers modules are built and their weights go through the tables in
`qi2_jax.interop` into ours. Nothing is downloaded.
"""

import dataclasses
from collections.abc import Callable

import diffusers
import jax
import numpy as np
import torch
from diffusers.models.transformers.transformer_qwenimage21 import (
  QwenImage21KVCache,
)

from qi2_jax.conditioning.layout import build_layout
from qi2_jax.flow import sampler, schedules
from qi2_jax.interop import mapping
from qi2_jax.interop import mmdit as mmdit_table
from qi2_jax.interop import vae as vae_table
from qi2_jax.models.condition import Conditioning
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig, init_params
from qi2_jax.models.vae import VAE, VAEConfig, identity_stats, init_variables

HEAD_DIM = 128
ROPE_AXES = (16, 56, 56)
LATENT_CHANNELS = 64


@dataclasses.dataclass(frozen=True)
class Case:
  """One piece of work, done by both sides.

  Attributes:
    name: what is done, with its size.
    theirs: runs diffusers, returns its output as numpy.
    ours: runs qi2_jax, returns its output as numpy.
  """

  name: str
  theirs: Callable[[], np.ndarray]
  ours: Callable[[], np.ndarray]


def randomise(model, seed: int):
  """Fills every parameter with noise that keeps activations at O(1)."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      norm = "norm" in name or "gamma" in name
      fan_in = p[0].numel() if p.ndim > 1 else 25
      p.copy_(p + 0.2 * noise if norm else noise / fan_in**0.5)
  return model.eval()


def state_dict(model) -> dict:
  """Tensors of a torch module as numpy, by name."""
  return {k: v.numpy() for k, v in model.state_dict().items()}


def mmdit_pair(values):
  """`(torch transformer, our MMDiT, our params)` with equal weights."""
  heads = values.width // HEAD_DIM
  theirs = diffusers.QwenImage21Transformer2DModel(
    in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
    num_layers=values.layers, attention_head_dim=HEAD_DIM,
    num_attention_heads=heads, context_in_dim=values.width,
    axes_dims_rope=ROPE_AXES,
  )  # fmt: skip
  randomise(theirs, 0)
  ours = MMDiT(
    MMDiTConfig(
      latent_channels=LATENT_CHANNELS, num_layers=values.layers,
      num_heads=heads, head_dim=HEAD_DIM, context_dim=values.width,
      rope_axes=ROPE_AXES, remat="none",
    )
  )  # fmt: skip
  abstract = jax.eval_shape(lambda: init_params(ours, jax.random.key(0)))
  params = mapping.import_tree(state_dict(theirs), abstract, mmdit_table.table)
  return theirs, ours, params


def vae_pair(values):
  """`(torch VAE, our VAE, our variables)` with equal weights."""
  width, z = values.vae_width, LATENT_CHANNELS
  theirs = diffusers.AutoencoderKLQwenImage21(
    base_dim=width * 2 // 3, decoder_base_dim=width, z_dim=z,
    latents_mean=[0.0] * z, latents_std=[1.0] * z,
  )  # fmt: skip
  randomise(theirs, 1)
  ours = VAE(
    VAEConfig(base_dim=width * 2 // 3, decoder_base_dim=width, z_dim=z)
  )
  shapes = jax.eval_shape(lambda: init_variables(ours, jax.random.key(0)))
  merged = vae_table.merge(shapes["params"], shapes["carried"])
  tree = mapping.import_tree(state_dict(theirs), merged, vae_table.table)
  params, carried = vae_table.split(tree)
  variables = {
    "params": params, "carried": carried, "latent_stats": identity_stats(z)
  }  # fmt: skip
  return theirs, ours, variables


def random_inputs(values, batch: int = 1) -> dict:
  """Random prompt states, latents and noise, the same for both sides."""
  side = values.size // 16
  rng = np.random.default_rng(0)
  latents = (batch, side * side, LATENT_CHANNELS)
  return {
    "grid": (side, side),
    "text": rng.normal(size=(batch, values.text, values.width)).astype("f4"),
    "noise": rng.normal(size=latents).astype("f4"),
    "image": rng.normal(size=latents).astype("f4"),
    "sigma": rng.uniform(0.1, 0.9, batch).astype("f4"),
  }


def condition(inputs, device):
  """Our conditioning of the prompts, on `device`."""
  batch, length, _ = inputs["text"].shape
  layout = build_layout([False] * length, (), inputs["grid"], length)
  layout = jax.tree.map(
    lambda x: np.repeat(np.asarray(x)[None], batch, axis=0), layout
  )
  none = np.zeros((batch, 0, LATENT_CHANNELS), "f4")
  return jax.device_put(Conditioning(inputs["text"], none, layout), device)


def their_condition(text, grid) -> dict:
  """The arguments of diffusers' transformer that a batch has in common."""
  batch, length, _ = text.shape
  slots = [False] * length + [True] * (grid[0] * grid[1] // 4)
  return {
    "encoder_hidden_states": text,
    "img_shapes": [[(1, *grid)]] * batch,
    "img_mask": torch.tensor([slots] * batch, device=text.device),
    "return_dict": False,
  }


def mmdit_cases(values, device, torch_device) -> list[Case]:
  """One forward pass, and sampling with the prefix cache."""
  theirs, model, params = mmdit_pair(values)
  theirs = theirs.to(torch_device)
  inputs = random_inputs(values)
  cond = condition(inputs, device)
  params = jax.device_put(params, device)
  noise = jax.device_put(inputs["noise"], device)
  tokens = noise.shape[1]
  shift = schedules.ShiftConfig()
  sigmas = schedules.sampling_sigmas(values.steps, tokens, shift)
  sigma = jax.device_put(np.full(1, 0.7, "f4"), device)
  forward = jax.jit(lambda p, x, s, c: model.apply({"params": p}, x, s, c))
  denoise = jax.jit(
    lambda p, x, c: sampler.sample(model, {"params": p}, x, sigmas, c)
  )
  place = lambda x: torch.as_tensor(x).to(torch_device)  # noqa: E731
  text, x0 = place(inputs["text"]), place(inputs["noise"])
  fixed = their_condition(text, inputs["grid"])

  def their_forward():
    with torch.inference_mode():
      out = theirs(hidden_states=x0, timestep=place([0.7]), **fixed)[0]
      return out[:, -tokens:].cpu().numpy()

  size = f"{values.text} + {tokens} tokens"
  return [
    Case(
      f"MMDiT forward, {size}", their_forward,
      lambda: np.asarray(forward(params, noise, sigma, cond)),
    ),
    Case(
      f"{values.steps}-step sampling, {size}",
      lambda: their_sampling(theirs, x0, values.steps, shift, fixed),
      lambda: np.asarray(denoise(params, noise, cond)),
    ),
  ]  # fmt: skip


def their_sampling(transformer, x, steps, shift, fixed):
  """The denoising loop of `QwenImage21Pipeline`, with its KV cache."""
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
    use_dynamic_shifting=True, base_shift=shift.base_shift,
    max_shift=shift.max_shift, base_image_seq_len=shift.base_tokens,
    max_image_seq_len=shift.max_tokens, shift_terminal=shift.terminal,
  )  # fmt: skip
  scheduler.set_timesteps(
    sigmas=np.linspace(1.0, 1 / steps, steps), device=x.device,
    mu=schedules.shift_mu(x.shape[1], shift),
  )  # fmt: skip
  scheduler.set_begin_index(0)
  layers = len(transformer.transformer_blocks)
  cache = QwenImage21KVCache(layers)
  with torch.inference_mode():
    for i, t in enumerate(scheduler.timesteps):
      v = transformer(
        hidden_states=x, timestep=t.expand(1) / 1000, kv_cache=cache,
        kv_cache_mode="cached" if i else "extract", **fixed,
      )[0]  # fmt: skip
      v = v[:, -x.shape[1] :]
      x = scheduler.step(v, t, x, return_dict=False)[0]
  return x.cpu().numpy()


def vae_cases(values, device, torch_device) -> list[Case]:
  """Decoding and encoding of one image by the full-structure VAE."""
  theirs, vae, variables = vae_pair(values)
  theirs = theirs.to(torch_device)
  variables = jax.device_put(variables, device)
  side = values.size // 16
  rng = np.random.default_rng(2)
  z = rng.normal(size=(1, side, side, LATENT_CHANNELS)).astype("f4")
  image = rng.uniform(-1, 1, (1, values.size, values.size, 4)).astype("f4")

  def channels_first(x):
    return torch.tensor(x.transpose(0, 3, 1, 2)[:, :, None]).to(torch_device)

  z_torch, image_torch = channels_first(z), channels_first(image)
  z, image = jax.device_put((z, image), device)
  apply = jax.jit(vae.apply, static_argnames="method")

  def their_decode():
    with torch.inference_mode():
      out = theirs.decode(z_torch).sample[:, :, 0]
      return out.permute(0, 2, 3, 1).cpu().numpy()

  def their_encode():
    with torch.inference_mode():
      out = theirs.encode(image_torch).latent_dist.mean[:, :, 0]
      return out.permute(0, 2, 3, 1).cpu().numpy()

  return [
    Case(
      f"VAE decode, {values.size} px", their_decode,
      lambda: np.asarray(apply(variables, z, method="decode")),
    ),
    Case(
      f"VAE encode, {values.size} px", their_encode,
      lambda: np.asarray(apply(variables, image, method="encode")),
    ),
  ]  # fmt: skip
