# SPDX-License-Identifier: Apache-2.0
"""The VAE's step against plain differentiation of its total loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from qi2_jax.models import vae
from qi2_jax.models.dinov2 import DINOv2, DINOv2Config
from qi2_jax.models.dinov2 import init_params as init_dinov2
from qi2_jax.models.lpips import LPIPS, LPIPSConfig
from qi2_jax.models.lpips import init_params as init_lpips
from qi2_jax.objectives.vae import piecewise_linear
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import steps, vae_loss, vae_state, vae_step

BATCH, SIDE = 8, 32
KEY = jax.random.key(0)
VAE = dataclasses.replace(
  tiny_models.VAE, image_channels=4, dim_mult=(1, 1),
  temporal_downsample=(True,),
)  # fmt: skip
NETS = vae_loss.Networks(
  vae=vae.VAE(VAE), lpips=LPIPS(LPIPSConfig((4, 6), (1, 1))),
  dinov2=DINOv2(DINOv2Config(
    num_layers=1, width=8, num_heads=2, mlp_width=8, patch_size=4, side=2,
  )),
  smoothing=0.1, background=1.0, kl=True, remat=False,
)  # fmt: skip
# Values at step 0 in the middle of a line, so that the schedules count.
VALUES = {
  "l1": 0.7, "lpips": 0.4, "align": 0.3, "kl": 0.05, "margin_cosine": 0.1,
  "margin_distance": 0.05, "smoothing": 0.8,
}  # fmt: skip
SCHEDULES = {
  n: piecewise_linear(((-10, v - 0.01), (10, v + 0.01)))
  for n, v in VALUES.items()
}
RECIPE = vae_step.Recipe(NETS, SCHEDULES, "all", True)


@functools.cache
def problem():
  """Parameters of all networks, none zero, and a batch of RGBA images."""
  shapes = jax.eval_shape(lambda: vae.init_variables(NETS.vae, KEY))["params"]
  ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
  # Decoded values of a sane size keep the losses off their flat parts.
  params = jax.tree.map(lambda x: 0.7 * x, tiny_models.randomise(ones))
  frozen = {
    "lpips": jax.jit(lambda: init_lpips(NETS.lpips, KEY))(),
    "dinov2": jax.jit(lambda: init_dinov2(NETS.dinov2, KEY))(),
  }
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (BATCH, SIDE, SIDE, 4)).astype(np.float32)
  return params, frozen, image


def fresh(recipe, tx):
  def projection():
    if recipe.nets.dinov2 is None:
      return {}
    return vae_state.new_projection(KEY, VAE.z_dim, 8)

  make = vae_state.creator(tx, recipe.part, projection)
  return make(problem()[0])


@functools.cache
def one_step(part="all", accumulate=1, spec=()):
  """State and metrics after one step; the optimizer keeps the gradient."""
  recipe = dataclasses.replace(RECIPE, part=part)
  return run_step(recipe, accumulate, spec)


def run_step(recipe, accumulate=1, spec=()):
  _, frozen, image = problem()
  tx = optax.trace(0.0)
  mesh = create_mesh(dict(spec), jax.devices()[: 8 if spec else 1])
  state = fresh(recipe, tx)
  places = sharding.tree_shardings(state, vae_state.SHARDING_RULES, mesh)
  state = jax.device_put(state, places)
  features = sharding.put_batch({"image": image}, mesh)
  features[steps.FROZEN] = jax.device_put(
    frozen, jax.NamedSharding(mesh, jax.P())
  )
  step = vae_step.make_step(recipe, tx, 0.9, accumulate)
  with jax.set_mesh(mesh):
    return jax.device_get(
      jax.jit(step, out_shardings=(places, None))(state, features, KEY)
    )


def plain_losses(params, projection):
  """Both losses written out, as one function of all that is trained."""
  _, frozen, image = problem()
  stats = vae.identity_stats(VAE.z_dim)
  variables = {"params": params, "latent_stats": stats}
  out, mean, logvar = NETS.vae.apply(variables, image)

  def over_white(x):
    alpha = (x[..., 3:] + 1) / 2
    return x[..., :3] * alpha + (1 - alpha)

  bottom = NETS.smoothing * VALUES["smoothing"]
  error = jnp.sqrt((out - image) ** 2 + bottom**2) - bottom
  perceptual = NETS.lpips.apply(
    {"params": frozen["lpips"]}, over_white(out), over_white(image)
  )
  divergence = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar)
  rec = (
    VALUES["l1"] * error.mean() + VALUES["lpips"] * perceptual.mean()
    + VALUES["kl"] * divergence.mean()
  )  # fmt: skip
  target = vae_loss.features(NETS, frozen, image, mean.shape[1:3])
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  z = unit(mean @ projection["projection_ZD"]).reshape(BATCH, -1, 8)
  f = unit(target).reshape(BATCH, -1, 8)
  cosine = jax.nn.relu(1 - VALUES["margin_cosine"] - (z * f).sum(-1)).mean()
  gap = jnp.abs(z @ z.swapaxes(1, 2) - f @ f.swapaxes(1, 2))
  return rec, cosine + jax.nn.relu(gap - VALUES["margin_distance"]).mean()


@functools.cache
def plain_gradients():
  """`(loss, weight, gradients)` with a full backward pass for each loss."""
  projection = fresh(RECIPE, optax.trace(0.0)).projection

  @jax.jit
  def run(params, projection):
    (rec, align), pull = jax.vjp(plain_losses, params, projection)
    of_rec, of_align = pull((1.0, 0.0)), pull((0.0, 1.0))
    norms = [
      jnp.linalg.norm(g[0]["encoder"]["conv_out"]["kernel"].reshape(-1))
      for g in (of_rec, of_align)
    ]
    weight = VALUES["align"] * norms[0] / (norms[1] + 1e-4)
    total = jax.tree.map(lambda r, a: r + weight * a, of_rec, of_align)
    return rec + weight * align, weight, total

  return jax.device_get(run(problem()[0], projection))


def gradients(state):
  return state.opt_state.trace


def assert_close(ours, theirs, tolerance):
  theirs_leaves = jax.tree.leaves(theirs)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(ours), theirs_leaves, strict=True
  ):
    assert tiny_models.relative(a, b) <= tolerance, path


def test_gradient_and_weight_are_those_of_the_total_loss():
  state, metrics = one_step()
  loss, weight, (params, projection) = plain_gradients()
  assert metrics["align_weight"] == pytest.approx(weight, rel=1e-5)
  assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
  assert_close(
    gradients(state), {"vae": params, "projection": projection}, 2e-4
  )
  assert state.step == 1
  assert {"l1", "lpips", "kl", "psnr", "align_cosine"} <= metrics.keys()
  # The alignment is a visible part of the encoder's gradient.
  assert weight > 1e-3


def test_accumulation_gives_the_weight_and_gradient_of_the_whole_batch():
  whole, metrics = one_step()
  state, found = one_step(accumulate=4)
  assert_close(gradients(state), gradients(whole), 1e-4)
  for name in ("loss", "align_weight", "grad_norm", "l1", "align_distance"):
    assert found[name] == pytest.approx(metrics[name], rel=1e-4), name


def test_eight_devices_give_what_one_gives():
  whole, metrics = one_step()
  # With a seq axis the VAE's rows are split, see models/vae_sharding.py.
  spec = (("data", 2), ("fsdp", 2), ("seq", 2))
  state, found = one_step(accumulate=2, spec=spec)
  assert_close(gradients(state), gradients(whole), 1e-4)
  for name in ("loss", "align_weight"):
    assert found[name] == pytest.approx(metrics[name], rel=1e-4), name


def test_l1_alone_splits_rows_too():
  """Its gradient is that of the loss, and no device holds a whole map."""
  params, _, image = problem()
  # Tall, so that no shard and its halo are as high as the whole.
  image = np.concatenate([image, 0.5 * image], axis=1)
  loss = vae_loss.plain_l1(NETS.vae, smoothing=0.2)

  def plain(params):
    stats = vae.identity_stats(VAE.z_dim)
    variables = {"params": params, "latent_stats": stats}
    out, _, _ = NETS.vae.apply(variables, image)
    return (jnp.sqrt((out - image) ** 2 + 0.2**2) - 0.2).mean()

  expected, theirs = jax.jit(jax.value_and_grad(plain))(params)
  mesh = create_mesh({"data": 2, "fsdp": 2, "seq": 2})
  places = sharding.tree_shardings(params, vae.SHARDING_RULES, mesh)
  batch = sharding.put_batch({"image": image}, mesh)
  with jax.set_mesh(mesh):
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = grad.lower(jax.device_put(params, places), batch, KEY).compile()
    (value, _), ours = compiled(jax.device_put(params, places), batch, KEY)
  assert value == pytest.approx(float(expected), rel=1e-5)
  assert_close(jax.device_get(ours), jax.device_get(theirs), 1e-4)
  side = SIDE // VAE.patch_size
  assert f",{2 * side},{side},{VAE.base_dim}]" not in compiled.as_text()


@pytest.mark.parametrize("part", ["decoder", "middle"])
def test_only_the_part_moves_and_has_moments(part):
  recipe = dataclasses.replace(RECIPE, part=part)
  if part == "decoder":
    nets = dataclasses.replace(NETS, lpips=None, dinov2=None, kl=False)
    recipe = dataclasses.replace(recipe, nets=nets)
    state, _ = run_step(recipe)
  else:
    state, _ = one_step(part)
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  names = {sharding.path_name(path) for path, _ in leaves}
  moved = {
    sharding.path_name(path)
    for (path, new), old in zip(leaves, jax.tree.leaves(problem()[0]))
    if np.abs(new - old).max() > 0
  }
  prefixes = {
    "decoder": ("decoder/", "post_quant_conv/"),
    "middle": (
      "encoder/mid/", "encoder/norm_out/", "encoder/conv_out/", "quant_conv/",
      "post_quant_conv/", "decoder/conv_in/", "decoder/mid/",
    ),
  }  # fmt: skip
  assert moved == {n for n in names if n.startswith(prefixes[part])}
  adam = optax.adam(1e-3)
  moments = jax.tree.leaves(fresh(recipe, adam).opt_state[0].mu["vae"])
  assert len(moments) == len(moved) < len(names)


def test_the_middle_has_the_gradient_of_the_whole():
  """Freezing layers changes nothing about the others."""
  whole = gradients(one_step()[0])["vae"]
  part, _ = vae_state.split(whole, "middle")
  ours = gradients(one_step("middle")[0])["vae"]
  assert_close(ours, part, 1e-4)


def test_split_and_merge_are_inverse():
  params = problem()[0]
  for part in vae_state.PARTS:
    trained, rest = vae_state.split(params, part)
    assert vae_state.merge(trained, rest) == params
    assert len(jax.tree.leaves(trained)) > 0


@pytest.mark.slow
def test_remat_changes_no_gradient():
  module = vae.VAE(dataclasses.replace(VAE, remat=True))
  nets = dataclasses.replace(NETS, vae=module, remat=True)
  recipe = dataclasses.replace(RECIPE, nets=nets)
  assert_close(gradients(run_step(recipe)[0]), gradients(one_step()[0]), 1e-4)


@pytest.mark.slow
def test_bf16_keeps_parameters_and_losses_fp32():
  module = vae.VAE(dataclasses.replace(VAE, dtype=jnp.bfloat16))
  nets = dataclasses.replace(NETS, vae=module, lpips=None, kl=False)
  recipe = dataclasses.replace(RECIPE, nets=nets)
  state, metrics = run_step(recipe, accumulate=2)
  assert metrics["loss"].dtype == np.float32
  assert metrics["psnr"] == pytest.approx(one_step()[1]["psnr"], rel=0.02)
  dtypes = {x.dtype for x in jax.tree.leaves((state.params, state.opt_state))}
  assert dtypes == {np.dtype(np.float32)}


def test_the_schedule_follows_the_step_of_the_state():
  """And without the adaptive weight, the schedule is all of it."""
  schedules = SCHEDULES | {"l1": piecewise_linear(((0, 0.0), (4, 4.0)))}
  nets = dataclasses.replace(NETS, lpips=None, kl=False)
  recipe = vae_step.Recipe(nets, schedules, "all", adaptive=False)
  _, frozen, image = problem()
  tx = optax.sgd(0.0)
  step = jax.jit(vae_step.make_step(recipe, tx, 0.9))
  state = fresh(recipe, tx)
  for i in range(3):
    state, m = step(state, {"image": image, steps.FROZEN: frozen}, KEY)
    m = {name: float(value) for name, value in m.items()}
    strength = 0.3 + 0.001 * i
    semantic = m["align_cosine"] + m["align_distance"]
    assert m["align_weight"] == pytest.approx(strength, rel=1e-5)
    expected = i * m["l1"] + strength * semantic
    assert m["loss"] == pytest.approx(expected, rel=1e-5)
