# SPDX-License-Identifier: Apache-2.0
"""The recipe of a VAE run from its config, with its frozen networks."""

import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.interop import dinov2 as dinov2_files
from qi2_jax.interop import lpips as lpips_files
from qi2_jax.models import dinov2, lpips, vae, vae_sharding
from qi2_jax.parallel import distributed
from qi2_jax.parallel.sharding import on_mesh, tree_shardings
from qi2_jax.training import build, optimizer, vae_loss, vae_state, vae_step
from qi2_jax.training.vae_step import Recipe


def is_plain(config) -> bool:
  """Whether a run minimises a constant L1 over all parameters.

  It then needs no step of its own. Configs of older runs have no `loss`.
  """
  loss = config.get("loss")
  if loss is None:
    return True
  others = any(vae_loss.used(loss, n) for n in ("lpips", "align", "kl"))
  values = [value for n in ("l1", "smoothing") for _, value in loss[n]]
  constant = set(map(float, values)) == {1.0}
  return constant and not others and config.trainable == "all"


def _lpips_shape(config) -> lpips.LPIPSConfig:
  return lpips.LPIPSConfig(
    widths=tuple(config.widths), dtype=jnp.dtype(config.dtype)
  )


def _dinov2_shape(config) -> dinov2.DINOv2Config:
  """Of the preset, cut after the layer."""
  whole = build.preset(dinov2.PRESETS, config.preset, "dinov2")
  return dinov2.upto(whole, config.layer)


def _lpips(config) -> tuple[lpips.LPIPS, dict]:
  """The network of `config.lpips`."""
  shape = _lpips_shape(config)
  if config.random_features:
    return lpips_files.random_features(jax.random.key(1), config=shape)
  if not (config.vgg and config.linear):
    raise InputError(
      "config.loss.lpips is above 0 and needs two local files: pass "
      "--config.lpips.vgg (torchvision's vgg16) and --config.lpips.linear "
      "(of the lpips package), or set --config.lpips.random_features=True "
      "for a test, or --config.loss.lpips='((0, 0.0),)'."
    )
  return lpips_files.load(config.vgg, config.linear, config=shape)


def _dinov2(config) -> tuple[dinov2.DINOv2, dict]:
  """The network of `config.dinov2`, cut after its layer."""
  dtype = jnp.dtype(config.dtype)
  if config.path and not config.random_features:
    return dinov2_files.load(config.path, layer=config.layer, dtype=dtype)
  if not config.random_features:
    raise InputError(
      "config.loss.align is above 0 and needs a local DINOv2 folder: pass "
      "--config.dinov2.path, or set --config.dinov2.random_features=True for "
      "a test, or --config.loss.align='((0, 0.0),)'."
    )
  return dinov2_files.random_features(jax.random.key(2), _dinov2_shape(config))


def _placed(params, rules, mesh):
  whole = distributed.to_host(params)
  return jax.device_put(whole, tree_shardings(whole, rules, mesh))


def check(config) -> None:
  """Raises InputError for a recipe that contradicts itself."""
  vae_state.check_part(config.trainable)
  vae_loss.schedules(config.loss)
  if config.trainable == "decoder" and any(
    vae_loss.used(config.loss, n) for n in ("align", "kl")
  ):
    raise InputError(
      "config.trainable=decoder leaves the latents as they are, so alignment "
      "and KL teach nothing; set config.loss.align and config.loss.kl to 0."
    )


def check_rows(config, factor: int, mesh) -> None:
  """Raises InputError unless every bucket's rows divide over the mesh."""
  groups = [config.data.buckets]
  groups += [r.buckets for r in config.data.resolutions.values()]
  for height, _ in (bucket for group in groups for bucket in group):
    vae_sharding.check_rows(height, factor, mesh.shape[vae_sharding.AXIS])


def recipe(config, module: vae.VAE, mesh) -> tuple[Recipe, dict]:
  """Modules and schedules of a run, and the frozen parameters on the mesh.

  Args:
    config: of the run.
    module: the VAE.
    mesh: where the parameters go.

  Raises:
    InputError: the recipe contradicts itself, or a network's files are
      missing or of another network.
  """
  check(config)
  check_rows(config, module.config.factor, mesh)
  frozen, perceptual, semantic = {}, None, None
  if vae_loss.used(config.loss, "lpips"):
    perceptual, params = _lpips(config.lpips)
    frozen["lpips"] = _placed(params, lpips.SHARDING_RULES, mesh)
  if vae_loss.used(config.loss, "align"):
    semantic, params = _dinov2(config.dinov2)
    frozen["dinov2"] = _placed(params, dinov2.SHARDING_RULES, mesh)
  return _assembled(config, module, perceptual, semantic), frozen


def planned_recipe(config, module: vae.VAE, mesh) -> tuple[Recipe, dict]:
  """`recipe` without files: the frozen parameters are abstract.

  DINOv2 has the shape of `config.dinov2.preset`, whatever the path says.

  Raises:
    InputError: the recipe contradicts itself.
  """
  check(config)
  check_rows(config, module.config.factor, mesh)
  frozen, perceptual, semantic = {}, None, None
  if vae_loss.used(config.loss, "lpips"):
    perceptual = lpips.LPIPS(_lpips_shape(config.lpips))
    params = jax.eval_shape(
      lambda: lpips.init_params(perceptual, jax.random.key(0))
    )
    frozen["lpips"] = on_mesh(params, lpips.SHARDING_RULES, mesh)
  if vae_loss.used(config.loss, "align"):
    semantic = dinov2.DINOv2(_dinov2_shape(config.dinov2))
    params = dinov2_files.abstract_params(semantic)
    frozen["dinov2"] = on_mesh(params, dinov2.SHARDING_RULES, mesh)
  return _assembled(config, module, perceptual, semantic), frozen


def _assembled(config, module: vae.VAE, perceptual, semantic) -> Recipe:
  nets = vae_loss.Networks(
    vae=module, lpips=perceptual, dinov2=semantic,
    smoothing=config.l1_smoothing, background=config.loss.background,
    kl=vae_loss.used(config.loss, "kl"), remat=module.config.remat,
  )  # fmt: skip
  return Recipe(
    nets, vae_loss.schedules(config.loss), config.trainable,
    config.loss.adaptive,
  )  # fmt: skip


def training(config, made: Recipe):
  """`(params -> state, step)` of a recipe, see `task.Task`."""
  tx = optimizer.create(config.optimizer, config.num_steps)

  def projection():
    if made.nets.dinov2 is None:
      return {}
    key = jax.random.fold_in(jax.random.key(config.seed), 0xA119)
    width = made.nets.dinov2.config.width
    return vae_state.new_projection(key, made.nets.vae.config.z_dim, width)

  start = vae_state.creator(tx, made.part, projection)
  step = vae_step.make_step(
    made, tx, config.ema_decay, config.optimizer.accumulate
  )
  return start, step
