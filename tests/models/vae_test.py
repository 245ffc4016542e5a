# SPDX-License-Identifier: Apache-2.0
"""The VAE: size, shortcuts, norms, shapes, precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from qi2_jax.models import vae as vae_lib
from qi2_jax.models import vae_blocks
from qi2_jax.models.vae import PRESETS, VAE

TINY = tiny_models.VAE


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def abstract(config):
  side = 2 * config.factor
  image = jnp.zeros((1, side, side, config.image_channels))
  return jax.eval_shape(VAE(config).init, jax.random.key(0), image)


def count(variables, *parts):
  return sum(
    leaf.size
    for collection in ("params", "carried")
    for part in parts
    for leaf in jax.tree.leaves(variables.get(collection, {}).get(part, {}))
  )


def test_the_full_preset_has_the_reported_size():
  shapes = abstract(PRESETS["qwen_image_2_1"])
  encoder = count(shapes, "encoder", "quant_conv")
  decoder = count(shapes, "decoder", "post_quant_conv")
  assert round(encoder / 1e6, 2) == 78.69
  assert round(decoder / 1e6, 2) == 259.05
  assert round(sum(x.size for x in jax.tree.leaves(shapes["carried"])) / 1e6,
               2) == 6.75  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_f16_and_keeps_shapes(name):
  config = PRESETS[name]
  assert config.factor == 16
  image = jnp.zeros((2, 32, 64, config.image_channels))
  out, mean, logvar = jax.eval_shape(
    lambda: VAE(config).init_with_output(jax.random.key(0), image)
  )[0]
  assert out.shape == image.shape
  assert mean.shape == logvar.shape == (2, 2, 4, config.z_dim)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_inverts_patchify(patch):
  x = normal(2, 8, 12, 3)
  folded = vae_blocks.patchify(x, patch)
  assert folded.shape == (2, 8 // patch, 12 // patch, 3 * patch**2)
  np.testing.assert_array_equal(vae_blocks.unpatchify(folded, patch), x)
  # Folding moves pixels within their own patch only.
  np.testing.assert_array_equal(
    vae_blocks.patchify(x[:, :patch], patch), folded[:, :1]
  )


def pooled(x):
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def nearest(x):
  return x.repeat(2, axis=1).repeat(2, axis=2)


def test_shortcuts_down_have_their_closed_forms():
  x = np.asarray(normal(2, 4, 6, 8))
  down = vae_blocks.average_down
  np.testing.assert_allclose(
    down(x, 8, space=2, time=1), pooled(x), atol=1e-6
  )  # level 0
  out = np.asarray(down(x, 16, space=2, time=2))  # levels 1, 2, 3
  np.testing.assert_array_equal(out[..., 0::2], 0 * pooled(x))
  np.testing.assert_allclose(out[..., 1::2], pooled(x), atol=1e-6)
  np.testing.assert_array_equal(down(x, 8, space=1, time=1), x)  # level 4


def test_shortcuts_up_have_their_closed_forms():
  x = np.asarray(normal(2, 3, 5, 8))
  up = vae_blocks.duplicate_up
  np.testing.assert_array_equal(up(x, 8, time=2), nearest(x))  # levels 0, 1
  np.testing.assert_array_equal(
    up(x, 4, time=2), nearest(x[..., 1::2])
  )  # level 2
  out = np.asarray(up(x, 4, time=1))  # level 3
  np.testing.assert_array_equal(out[:, 0::2], x[..., 0::2].repeat(2, axis=2))
  np.testing.assert_array_equal(out[:, 1::2], x[..., 1::2].repeat(2, axis=2))


def test_channel_norm_has_length_root_c():
  x, gamma = normal(2, 3, 3, 16), 1 + 0.1 * normal(16, seed=1)
  out = vae_blocks.channel_norm(x, gamma)
  length = jnp.linalg.norm(out / gamma[None, None, None], axis=-1)
  np.testing.assert_allclose(length, np.full((2, 3, 3), 4.0), rtol=1e-5)
  scaled = vae_blocks.channel_norm(1e3 * x, gamma)
  np.testing.assert_allclose(scaled, out, rtol=1e-4)


def test_channel_norm_equals_torch():
  torch = pytest.importorskip("torch")
  x, gamma = normal(2, 3, 3, 16), 1 + 0.1 * normal(16, seed=1)
  unit = torch.nn.functional.normalize(torch.tensor(np.asarray(x)), dim=-1)
  expected = unit * 4.0 * torch.tensor(np.asarray(gamma))
  np.testing.assert_allclose(
    vae_blocks.channel_norm(x, gamma), expected.numpy(), atol=1e-5
  )


def test_channel_norm_has_a_finite_gradient_at_zero():
  zero = jnp.zeros((1, 1, 1, 8))
  value, grad = jax.value_and_grad(
    lambda x: vae_blocks.channel_norm(x, jnp.ones(8)).sum()
  )(zero)
  assert value == 0 and np.isfinite(grad).all()


@pytest.fixture(scope="module")
def variables():
  shapes = abstract(TINY)
  ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes["params"])
  stats = {"mean": normal(4, seed=2), "std": 1 + jnp.arange(4.0)}
  return {"params": tiny_models.randomise(ones), "latent_stats": stats}


def test_normalise_is_inverted_and_standardises():
  z = 3 * normal(4, 5, 6, 4) + 2
  mean, std = z.mean(axis=(0, 1, 2)), z.std(axis=(0, 1, 2))
  unit = vae_lib.normalise(z, mean, std)
  np.testing.assert_allclose(unit.mean(axis=(0, 1, 2)), np.zeros(4), atol=1e-5)
  np.testing.assert_allclose(unit.std(axis=(0, 1, 2)), np.ones(4), rtol=1e-5)
  np.testing.assert_allclose(vae_lib.denormalise(unit, mean, std), z, atol=1e-5)


def test_both_directions_use_the_statistics(variables):
  model = VAE(TINY)
  x = 0.5 * normal(1, 32, 48, 3)

  @jax.jit
  def ends(variables):
    whole, mean, _ = model.apply(variables, x)
    latents = model.apply(variables, x, method="encode")
    return (
      whole,
      mean,
      latents,
      model.apply(variables, latents, method="decode"),
    )

  whole, mean, latents, decoded = ends(variables)
  stats = variables["latent_stats"]
  np.testing.assert_allclose(
    latents, vae_lib.normalise(mean, **{f"{k}_Z": v for k, v in stats.items()}),
    atol=1e-5,
  )  # fmt: skip
  np.testing.assert_allclose(decoded, jnp.clip(whole, -1, 1), atol=1e-4)
  assert np.abs(whole).max() > 1, "the clip was not exercised"


def test_every_parameter_is_reached(variables):
  x = 0.5 * normal(1, 32, 48, 3)
  weights = normal(1, 32, 48, 3, seed=5)

  def loss(params):
    out, mean, logvar = VAE(TINY).apply({**variables, "params": params}, x)
    return (out * weights).sum() + (logvar**2).sum() + mean.sum()

  grads = jax.jit(jax.grad(loss))(variables["params"])
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0, path


def test_every_residual_block_of_a_level_is_recomputed():
  """One by one: a level at full resolution would hold all of them at once."""
  whole = PRESETS["tiny"]
  config = dataclasses.replace(whole, remat=True)
  shapes = abstract(config)
  assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
    lambda x: x.shape, abstract(whole)
  )
  image = jnp.zeros((1, 32, 32, config.image_channels))
  run = jax.make_jaxpr(VAE(config).apply)(shapes, image)
  names = [eqn.primitive.name for eqn in run.eqns]
  levels, blocks = len(config.dim_mult), config.num_res_blocks
  assert names.count("remat2") == levels * (blocks + blocks + 1)


def test_unused_temporal_kernels_are_no_parameters():
  config = dataclasses.replace(TINY, carry_temporal=True)
  carried = abstract(config)["carried"]
  assert jax.tree.leaves(carried)
  plain = jax.tree.map(lambda a: a.shape, abstract(TINY)["params"])
  assert jax.tree.map(lambda a: a.shape, abstract(config)["params"]) == plain


def test_bf16_compute_stays_close(variables):
  x = 0.5 * normal(1, 32, 48, 3)
  run = jax.jit(
    lambda config: VAE(config).apply(variables, x)[0], static_argnums=0
  )
  exact = run(TINY)
  out = run(dataclasses.replace(TINY, dtype=jnp.bfloat16)).astype(jnp.float32)
  error = float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))
  assert 1e-4 < error < 0.05
