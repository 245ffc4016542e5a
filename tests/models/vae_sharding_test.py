# SPDX-License-Identifier: Apache-2.0
"""Rows over `seq`: outputs and gradients are those of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from qi2_jax.errors import InputError
from qi2_jax.models import lpips, vae, vae_sharding
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh

# One row of latents a shard at seq=4: the smallest there can be.
ROWS, COLUMNS, BATCH = 4, 3, 4
CONFIG = dataclasses.replace(
  tiny_models.VAE, patch_size=1, base_dim=4, decoder_base_dim=4,
  dim_mult=(1, 1), temporal_downsample=(True,),
)  # fmt: skip
MODULE = vae.VAE(CONFIG)
MESHES = [
  {"data": 2, "seq": 4},
  pytest.param({"fsdp": 2, "seq": 2, "data": 2}, marks=pytest.mark.slow),
]


@functools.cache
def problem():
  shapes = jax.eval_shape(
    lambda: vae.init_variables(MODULE, jax.random.key(0))
  )["params"]
  ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
  stats = {
    "mean": jnp.linspace(-1, 1, CONFIG.z_dim),
    "std": jnp.linspace(1, 2, CONFIG.z_dim),
  }
  rng = np.random.default_rng(0)
  side = CONFIG.factor
  image = rng.uniform(-1, 1, (BATCH, ROWS * side, COLUMNS * side, 3))
  return tiny_models.randomise(ones), stats, image.astype(np.float32)


def loss(apply, params, image):
  """Uses every output of both directions; no pixel counts like another."""
  _, stats, _ = problem()
  variables = {"params": params, "latent_stats": stats}
  mean, logvar = apply(variables, image, "moments")
  out = apply(variables, mean, "decode_raw")
  weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
  total = jnp.mean(weights * out) + jnp.mean(jnp.sin(mean) * logvar)
  return total, (mean, logvar, out)


@functools.cache
def whole():
  params, _, image = problem()
  plain = lambda v, x, m: MODULE.apply(v, x, method=m)  # noqa: E731
  grad = jax.value_and_grad(
    functools.partial(loss, plain), argnums=(0, 1), has_aux=True
  )
  return jax.device_get(jax.jit(grad)(params, image))


@pytest.mark.parametrize("spec", MESHES, ids=str)
def test_outputs_and_gradients_equal_one_device(spec):
  mesh = create_mesh(spec)
  params, _, image = problem()
  places = sharding.tree_shardings(params, vae.SHARDING_RULES, mesh)
  params = jax.device_put(params, places)
  image = sharding.put_batch(image, mesh)

  def apply(variables, x, method):
    return vae_sharding.sharded_apply(MODULE, mesh, variables, x, method)

  grad = jax.value_and_grad(
    functools.partial(loss, apply), argnums=(0, 1), has_aux=True
  )
  with jax.set_mesh(mesh):
    (value, outs), grads = jax.jit(grad)(params, image)
  (expected, their_outs), their_grads = whole()
  assert outs[2].sharding.spec[1] == "seq"
  for ours, theirs in zip(outs, their_outs):
    assert tiny_models.relative(ours, theirs) <= 1e-5
  assert value == pytest.approx(float(expected), rel=1e-4)
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  for (path, a), b in zip(leaves, jax.tree.leaves(their_grads)):
    assert np.abs(b).max() > 0, path
    assert tiny_models.relative(a, b) <= 2e-4, path


def test_normalised_latents_and_images_too():
  params, stats, image = problem()
  variables = {"params": params, "latent_stats": stats}
  mesh = create_mesh({"data": 2, "seq": 4})
  x = image
  for method in ("encode", "decode"):
    ours = jax.jit(
      lambda v, x, m=method: vae_sharding.sharded_apply(MODULE, mesh, v, x, m)
    )(variables, x)
    theirs = jax.jit(
      lambda v, x, m=method: MODULE.apply(v, x, method=m)
    )(variables, x)  # fmt: skip
    assert tiny_models.relative(ours, theirs) <= 1e-5
    x = theirs


def test_lpips_and_its_gradient_equal_one_device():
  """Pooling included; one row of the last stage a shard."""
  net = lpips.LPIPS(lpips.LPIPSConfig((4, 6, 6), (1, 2, 1)))
  params = jax.jit(lambda: lpips.init_params(net, jax.random.key(0)))()
  rng = np.random.default_rng(0)
  a, b = rng.uniform(-1, 1, (2, BATCH, 16, 12, 3)).astype(np.float32)
  mesh = create_mesh({"data": 2, "seq": 4})
  weights = jnp.arange(1.0, 1.0 + BATCH)

  def total(run):
    return jax.jit(jax.value_and_grad(lambda a: (weights * run(a)).sum()))

  run = functools.partial(vae_sharding.sharded_distance, net, mesh, params)
  compiled = total(lambda a: run(a, b)).lower(a).compile()
  value, gradient = compiled(a)
  expected, theirs = total(lambda a: net.apply({"params": params}, a, b))(a)
  assert value == pytest.approx(float(expected), rel=1e-5)
  assert tiny_models.relative(gradient, theirs) <= 1e-4
  # Of two of four images, all 16 rows of the first stage.
  assert "[2,16,12,4]" not in compiled.as_text()
  with pytest.raises(InputError, match="18 rows do not divide"):
    run(jnp.zeros((2, 18, 12, 3)), jnp.zeros((2, 18, 12, 3)))


def test_no_device_holds_a_whole_map():
  """The compiled program gathers latents, never maps of the full height."""
  mesh = create_mesh({"data": 2, "seq": 4})
  params, stats, image = problem()
  variables = {"params": params, "latent_stats": stats}
  run = jax.jit(
    lambda v, x: vae_sharding.sharded_apply(MODULE, mesh, v, x, "moments")
  )
  text = run.lower(variables, image).compile().as_text()
  height = ROWS * CONFIG.factor
  whole_maps = f",{height},{COLUMNS * CONFIG.factor},{CONFIG.base_dim}]"
  assert whole_maps not in text
  local = f",{height // 4},{COLUMNS * CONFIG.factor},{CONFIG.base_dim}]"
  assert local in text
  assert "collective-permute" in text


def test_rows_that_do_not_divide_are_named():
  mesh = create_mesh({"data": 2, "seq": 4})
  params, stats, _ = problem()
  variables = {"params": params, "latent_stats": stats}
  apply = functools.partial(
    vae_sharding.sharded_apply, MODULE, mesh, variables
  )  # fmt: skip
  with pytest.raises(InputError, match="multiples of 8"):
    apply(jnp.zeros((2, 12, 8, 3)), "moments")
  with pytest.raises(InputError, match="multiples of 4"):
    apply(jnp.zeros((2, 6, 2, 4)), "decode")
  with pytest.raises(ValueError, match="no sharded form"):
    apply(jnp.zeros((2, 16, 8, 3)), "__call__")
