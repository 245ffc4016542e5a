# SPDX-License-Identifier: Apache-2.0
"""The two losses of the VAE's recipe and their schedules.

    total = l1 L1 + lpips LPIPS + kl KL + align w (cosine + distance)

with L1 (or its smooth form) on all channels, LPIPS and alignment on RGB over
a flat background, and VA-VAE's adaptive weight w. Every factor and margin is
a schedule in steps. The posterior mean is decoded, without noise, so `kl` is
a penalty on the moments and no variational bound; it is off by default.

Shapes: B batch, H, W pixels, C channels, h, w latents, Z latent channels, D
width of the features.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.models import dinov2 as dinov2_model
from qi2_jax.models import vae_sharding
from qi2_jax.models.dinov2 import DINOv2
from qi2_jax.models.lpips import LPIPS
from qi2_jax.models.vae import VAE, identity_stats
from qi2_jax.objectives import alignment, vae
from qi2_jax.training import steps

SCHEDULES = (
  "l1", "smoothing", "lpips", "align", "kl", "margin_cosine",
  "margin_distance",
)  # fmt: skip
# A width of 0 has no gradient at zero error; a tenth of a grey level does.
_NARROWEST = 1e-3


@dataclasses.dataclass(frozen=True)
class Networks:
  """The modules of the losses; a module is None where its weight stays 0.

  Attributes:
    vae: what is trained.
    lpips: frozen, its parameters are features under `FROZEN`.
    dinov2: likewise, cut after the layer that latents align to.
    smoothing: width of the L1's round bottom, which its schedule multiplies;
      0 for plain L1 throughout.
    background: grey level in [-1, 1] behind RGBA.
    kl: whether the KL is ever weighed.
    remat: recompute LPIPS in the backward pass.
  """

  vae: VAE
  lpips: LPIPS | None
  dinov2: DINOv2 | None
  smoothing: float
  background: float
  kl: bool
  remat: bool


def schedules(config) -> dict[str, Callable]:
  """`config.loss` as functions of the step.

  Raises:
    InputError: a schedule is malformed; the sentence names it.
  """
  out = {}
  for name in SCHEDULES:
    try:
      out[name] = vae.piecewise_linear(config[name])
    except (InputError, TypeError, ValueError) as error:
      raise InputError(
        f"config.loss.{name}={config[name]!r}: {error} Write "
        "((step, value), ...)."
      ) from error
    if min(value for _, value in config[name]) < 0:
      raise InputError(
        f"config.loss.{name}={config[name]!r} has a negative value; use 0 to "
        "switch a term off."
      )
  return out


def used(config, name: str) -> bool:
  """Whether a schedule of `config.loss` is ever above zero."""
  return any(value > 0 for _, value in config[name])


def encode(nets: Networks, params, image_BHWC) -> tuple[jax.Array, jax.Array]:
  """Posterior mean and log variance in fp32, `[B, h, w, Z]` each."""
  mean, logvar = _apply(nets.vae, params, image_BHWC, "moments")
  return mean.astype(jnp.float32), logvar.astype(jnp.float32)


def _row_mesh():
  """The mesh in use if its seq axis splits rows, else None."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if mesh.shape.get(vae_sharding.AXIS, 1) > 1 else None


def _apply(module: VAE, params, x, method: str):
  """One direction of the VAE; a mesh with a seq axis splits its rows."""
  stats = identity_stats(module.config.z_dim)
  variables = {"params": params, "latent_stats": stats}
  if mesh := _row_mesh():
    return vae_sharding.sharded_apply(module, mesh, variables, x, method)
  return module.apply(variables, x, method=method)


def _psnr(out_BHWC, image_BHWC) -> jax.Array:
  """Of the whole batch, clamped to [-1, 1], in dB."""
  mse = jnp.mean(jnp.square(jnp.clip(out_BHWC, -1, 1) - image_BHWC))
  return 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10))


def plain_l1(module: VAE, *, smoothing: float) -> steps.Loss:
  """L1 alone of batches with `image` `[B, H, W, C]` in [-1, 1].

  Args:
    module: the VAE; trained on posterior means, without sampling or KL.
    smoothing: width of the round bottom of the L1, 0 for plain L1.
  """

  def draw(batch, key):
    del key  # The posterior mean needs no noise.
    return batch

  def mean(params, batch):
    image = batch["image"]
    moments, _ = _apply(module, params, image, "moments")
    out = _apply(module, params, moments, "decode_raw")
    loss = vae.smooth_l1(out, image, smoothing).mean()
    return loss, {"psnr": _psnr(out, image)}

  return steps.Loss(draw, mean)


def reconstruction(
  nets: Networks, frozen: dict, values: dict, params, moments, image_BHWC
) -> tuple[jax.Array, dict]:
  """Loss of the decoded mean, and its parts.

  Args:
    nets: see `Networks`.
    frozen: parameters by network.
    values: of the schedules at this step.
    params: of the VAE.
    moments: of `encode`.
    image_BHWC: in [-1, 1].

  Returns:
    `(fp32 scalar, metrics)`.
  """
  mean, logvar = moments
  out = _apply(nets.vae, params, mean, "decode_raw").astype(jnp.float32)
  width = nets.smoothing
  if width:
    width = jnp.maximum(width * values["smoothing"], _NARROWEST)
  l1 = vae.smooth_l1(out, image_BHWC, width).mean()
  metrics = {"l1": l1, "psnr": _psnr(out, image_BHWC)}
  total = values["l1"] * l1
  if nets.lpips is not None:
    perceptual = _lpips(nets, frozen["lpips"], out, image_BHWC)
    total += values["lpips"] * perceptual
    metrics["lpips"] = perceptual
  if nets.kl:
    divergence = vae.kl(mean, logvar).mean()
    total += values["kl"] * divergence
    metrics["kl"] = divergence
  return total, metrics


def _lpips(nets: Networks, params, out_BHWC, image_BHWC) -> jax.Array:
  def distance(out, image):
    a, b = (vae.over_background(x, nets.background) for x in (out, image))
    if mesh := _row_mesh():
      return vae_sharding.sharded_distance(
        nets.lpips, mesh, params, a, b
      ).mean()  # fmt: skip
    return nets.lpips.apply({"params": params}, a, b).mean()

  if nets.remat:
    distance = jax.checkpoint(distance)
  return distance(out_BHWC, image_BHWC)


def features(nets: Networks, frozen: dict, image_BHWC, grid) -> jax.Array:
  """What latents align to, on their token grid: fp32 `[B, *grid, D]`."""
  rgb = vae.over_background(image_BHWC, nets.background)
  patch = nets.dinov2.config.patch_size
  view = dinov2_model.preprocess(rgb, grid, patch)
  out = nets.dinov2.apply({"params": frozen["dinov2"]}, view)
  return jax.lax.stop_gradient(out.astype(jnp.float32))


def semantic(
  nets: Networks, frozen: dict, values: dict, projection: dict, mean_BhwZ,
  image_BHWC,
) -> tuple[jax.Array, dict]:  # fmt: skip
  """Unweighted alignment loss, and its parts.

  The grid has at most 32 x 32 tokens, 448 px of DINOv2; larger latents are
  pooled to it and larger images shrunk.

  Args:
    nets: see `Networks`.
    frozen: parameters by network.
    values: of the schedules at this step.
    projection: of the state.
    mean_BhwZ: latents.
    image_BHWC: in [-1, 1].

  Returns:
    `(fp32 scalar, metrics)`.
  """
  grid = alignment.aligned_grid(*mean_BhwZ.shape[1:3])
  target = features(nets, frozen, image_BHWC, grid)
  pooled = alignment.pool_grid(mean_BhwZ, grid)
  projected = pooled @ projection["projection_ZD"]
  cosine = alignment.marginal_cosine(
    projected, target, values["margin_cosine"]
  ).mean()
  distance = alignment.marginal_distance(
    projected, target, values["margin_distance"]
  ).mean()
  return cosine + distance, {
    "align_cosine": cosine, "align_distance": distance,
  }  # fmt: skip
