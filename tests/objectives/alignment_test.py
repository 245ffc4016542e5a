# SPDX-License-Identifier: Apache-2.0
"""VA-VAE's alignment against torch, and the other VAE losses."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from qi2_jax.errors import InputError
from qi2_jax.models.vae import VAE, identity_stats, init_variables
from qi2_jax.objectives import alignment, vae

MARGINS = [(0.0, 0.0), (0.5, 0.25)]


@pytest.fixture
def pair():
  rng = np.random.default_rng(0)
  z, f = rng.normal(size=(2, 3, 4, 5, 7)).astype(np.float32)
  # Half of the tokens agree, so that both sides of the margins occur.
  z[:, :2] = f[:, :2] + 0.3 * z[:, :2]
  return z, f


def their_terms(torch, z_BND, f_BND, cosine, distance):
  """Both losses per example, as VA-VAE's paper and code have them."""
  functional = torch.nn.functional
  similar = functional.cosine_similarity(z_BND, f_BND, dim=-1)
  first = functional.relu(1 - cosine - similar).mean(1)
  z, f = (functional.normalize(x, dim=-1) for x in (z_BND, f_BND))
  gap = z @ z.transpose(1, 2) - f @ f.transpose(1, 2)
  return first, functional.relu(gap.abs() - distance).mean((1, 2))


@pytest.mark.parametrize("cosine, distance", MARGINS)
def test_losses_and_gradients_equal_torch(cosine, distance, pair):
  torch = pytest.importorskip("torch")
  z, f = (torch.tensor(x.reshape(3, 20, 7)) for x in pair)
  z.requires_grad_()
  theirs = their_terms(torch, z, f, cosine, distance)
  functions = (alignment.marginal_cosine, alignment.marginal_distance)
  for function, their, margin in zip(functions, theirs, (cosine, distance)):
    (gradient,) = torch.autograd.grad(their.sum(), z)
    gradient = gradient.numpy().reshape(pair[0].shape)
    ours = jax.jit(function)(*pair, margin)
    assert ours.shape == (3,) and ours.dtype == jnp.float32
    assert np.abs(ours - their.detach().numpy()).max() <= 1e-6
    _, pull = jax.vjp(function, *pair, margin)
    mine = pull(jnp.ones(3))[0]
    assert np.abs(mine - gradient).max() <= 1e-6
    assert np.abs(gradient).max() > 1e-2


def test_a_margin_forgives_what_is_within_it(pair):
  z, f = pair
  assert (alignment.marginal_cosine(f, f, 0.0) < 1e-6).all()
  np.testing.assert_array_equal(alignment.marginal_cosine(f, f, 0.1), 0)
  np.testing.assert_array_equal(alignment.marginal_distance(z, f, 2.0), 0)
  # A rotation leaves distances as they are, and no cosine.
  turned = jnp.roll(f, 1, axis=-1)
  assert (alignment.marginal_distance(turned, f, 0.0) < 1e-6).all()
  assert (alignment.marginal_cosine(turned, f, 0.0) > 0.5).all()


def test_losses_are_fp32_under_bf16_and_finite_at_dead_tokens(pair):
  f = jnp.asarray(pair[1], jnp.bfloat16)
  z = jnp.zeros_like(f)
  for loss in (alignment.marginal_cosine, alignment.marginal_distance):
    value, gradient = jax.value_and_grad(
      lambda z, loss=loss: loss(z, f, 0.0).sum()
    )(z)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    np.testing.assert_array_equal(gradient, z)


def torch_network(torch, seed=0):
  """Encoder body, last convolution, 1x1 head, decoder and projection."""
  generator = torch.Generator().manual_seed(seed)
  conv = lambda i, o, k, **kw: torch.nn.Conv2d(  # noqa: E731
    i, o, k, padding=k // 2, **kw
  )
  parts = {
    "body": conv(3, 6, 3), "out": conv(6, 8, 3), "head": conv(8, 8, 1),
    "decode": conv(4, 3, 3), "project": conv(4, 7, 1, bias=False),
  }  # fmt: skip
  with torch.no_grad():
    for part in parts.values():
      for p in part.parameters():
        p.copy_(0.3 * torch.randn(p.shape, generator=generator))
  return parts


class Flax(nn.Module):
  """The same encoder."""

  @nn.compact
  def __call__(self, x):
    x = nn.silu(nn.Conv(6, (3, 3), padding=1, name="body")(x))
    x = nn.Conv(8, (3, 3), padding=1, name="out")(x)
    return nn.Conv(8, (1, 1), name="head")(x)[..., :4]


def to_flax(part):
  """A torch convolution's parameters in Flax's layout."""
  out = {"kernel": part.weight.detach().numpy().transpose(2, 3, 1, 0)}
  if part.bias is not None:
    out["bias"] = part.bias.detach().numpy()
  return out


def their_step(torch, parts, image, features, margins):
  """VA-VAE: weight of two full backward passes, gradient of the total."""
  x, f = (torch.tensor(t).permute(0, 3, 1, 2) for t in (image, features))
  hidden = torch.nn.functional.silu(parts["body"](x))
  z = parts["head"](parts["out"](hidden))[:, :4]
  rec = (parts["decode"](z) - x).abs().sum() / len(x)
  tokens = [t.flatten(2).transpose(1, 2) for t in (parts["project"](z), f)]
  align = sum(t.mean() for t in their_terms(torch, *tokens, *margins))
  kernel = parts["out"].weight
  norms = [
    torch.autograd.grad(loss, kernel, retain_graph=True)[0].norm()
    for loss in (rec, align)
  ]
  weight = torch.clamp(norms[0] / (norms[1] + 1e-4), 0.0, 1e8).detach()
  (rec + 0.5 * weight * align).backward()
  gradients = {k: parts[k].weight.grad for k in ("body", "out")}
  return weight.item(), {
    k: g.numpy().transpose(2, 3, 1, 0) for k, g in gradients.items()
  }


def our_step(parts, image, features, margins):
  """The same with one backward pass through decoder and encoder each."""
  params = {k: to_flax(parts[k]) for k in ("body", "out", "head")}
  decode = nn.Conv(3, (3, 3), padding=1)
  project = nn.Dense(7, use_bias=False)
  kernel = to_flax(parts["project"])["kernel"][0, 0]

  def reconstruction(z):
    out = decode.apply({"params": to_flax(parts["decode"])}, z)
    return jnp.abs(out - image).sum() / len(image)

  def aligned(z):
    z = project.apply({"params": {"kernel": kernel}}, z)
    cosine = alignment.marginal_cosine(z, features, margins[0])
    distance = alignment.marginal_distance(z, features, margins[1])
    return jnp.mean(cosine + distance)

  @jax.jit
  def step(params):
    z, pull = jax.vjp(lambda p: Flax().apply({"params": p}, image), params)
    rec, align = jax.grad(reconstruction)(z), jax.grad(aligned)(z)
    weight = alignment.adaptive_weight(
      lambda g: pull(g)[0]["out"]["kernel"], rec, align
    )
    return weight, pull(rec + 0.5 * weight * align)[0]

  return step(params)


@pytest.mark.parametrize("margins", MARGINS)
def test_weight_and_total_gradient_equal_torch(margins):
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (2, 5, 6, 3)).astype(np.float32)
  features = rng.normal(size=(2, 5, 6, 7)).astype(np.float32)
  parts = torch_network(torch)
  theirs, their_grads = their_step(torch, parts, image, features, margins)
  ours, our_grads = our_step(parts, image, features, margins)
  assert theirs > 10
  assert abs(ours - theirs) <= 1e-6 * theirs
  for name, gradient in their_grads.items():
    error = tiny_models.relative(our_grads[name]["kernel"], gradient)
    assert error <= 2e-6, name


def test_the_weight_is_clipped_and_carries_no_gradient():
  ones = jnp.ones((3, 4))
  same = lambda g: g  # noqa: E731
  weigh = lambda r, a: alignment.adaptive_weight(same, r, a)  # noqa: E731
  norm = 12**0.5
  np.testing.assert_allclose(weigh(ones, 0 * ones), norm / 1e-4, rtol=1e-6)
  np.testing.assert_allclose(weigh(1e6 * ones, 0 * ones), 1e8)
  assert weigh(0 * ones, ones) == 0
  gradients = jax.grad(weigh, (0, 1))(ones, ones)
  np.testing.assert_array_equal(gradients, jnp.zeros((2, 3, 4)))


def test_the_weight_costs_no_second_pass_through_our_encoder():
  model = VAE(dataclasses.replace(
    tiny_models.VAE, dim_mult=(1, 1), temporal_downsample=(False,)
  ))  # fmt: skip
  variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
  side = 2 * model.config.factor
  image = np.random.default_rng(0).normal(size=(1, side, side, 3))
  stats = identity_stats(model.config.z_dim)

  def encode(params):
    return model.apply({"params": params, "latent_stats": stats}, image,
                       method="moments")[0]  # fmt: skip

  def backward(params, first, second):
    _, pull = jax.vjp(encode, params)
    return pull(first + second)[0]["encoder"]

  def weighted(params, first, second):
    _, pull = jax.vjp(encode, params)
    weight = alignment.adaptive_weight(
      lambda g: pull(g)[0]["encoder"]["conv_out"]["kernel"], first, second
    )
    return pull(first + weight * second)[0]["encoder"]

  z = jax.eval_shape(encode, variables["params"])

  def flops(step):
    lowered = jax.jit(step).lower(variables["params"], z, z)
    return lowered.compile().cost_analysis()["flops"]

  assert flops(weighted) < 1.1 * flops(backward)


def test_pooling_averages_cells():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 8, 6, 3)).astype(np.float32)
  blocks = x.reshape(2, 4, 2, 2, 3, 3).mean(axis=(2, 4))
  np.testing.assert_allclose(alignment.pool_grid(x, (4, 2)), blocks, atol=1e-6)
  np.testing.assert_array_equal(alignment.pool_grid(x, (8, 6)), x)
  # Three cells into two: the middle one belongs to both halves.
  np.testing.assert_allclose(
    alignment.pooling_matrix(2, 3), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]],
    rtol=1e-6,
  )  # fmt: skip
  for size, side in ((5, 13), (32, 90)):
    matrix = alignment.pooling_matrix(size, side)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(matrix.sum(0), size / side, rtol=1e-5)


@pytest.mark.parametrize("size, grid", [
  ((16, 16), (16, 16)), ((32, 20), (32, 20)), ((128, 128), (32, 32)),
  ((96, 168), (18, 32)), ((200, 1), (32, 1)),
])  # fmt: skip
def test_aligned_grid_keeps_the_aspect_ratio(size, grid):
  assert alignment.aligned_grid(*size) == grid


def test_wrong_shapes_are_named():
  grid = lambda h, w, d: jnp.zeros((1, h, w, d))  # noqa: E731
  for loss in (alignment.marginal_cosine, alignment.marginal_distance):
    with pytest.raises(InputError, match="must have one shape"):
      loss(grid(2, 3, 4), grid(3, 2, 4), 0.0)
    with pytest.raises(InputError, match="33 x 2 token grid"):
      loss(grid(33, 2, 4), grid(33, 2, 4), 0.0)
  with pytest.raises(InputError, match="finer grid 3 x 1"):
    alignment.pool_grid(grid(2, 3, 4), (3, 1))


def test_schedules_are_lines_between_points_inside_jit():
  schedule = vae.piecewise_linear(((100, 0.5), (300, 0.1), (400, 0.0)))
  steps = [0, 100, 150, 300, 375, 10**6]
  ours = [jax.jit(schedule)(jnp.int32(s)) for s in steps]
  np.testing.assert_allclose(ours, [0.5, 0.5, 0.4, 0.1, 0.025, 0], atol=1e-7)
  assert ours[0].dtype == jnp.float32 and ours[0].shape == ()
  assert vae.piecewise_linear([(0, 2)])(7) == 2


@pytest.mark.parametrize("points, message", [
  ((), "non-empty"), (((0, 1, 2),), "pairs"),
  (((5, 1.0), (5, 2.0)), "increase strictly"),
  (((0, float("nan")),), "finite"),
])  # fmt: skip
def test_wrong_schedules_are_named(points, message):
  with pytest.raises(InputError, match=message):
    vae.piecewise_linear(points)


def test_kl_equals_torch():
  torch = pytest.importorskip("torch")
  mean, logvar = np.random.default_rng(0).normal(size=(2, 3, 2, 4, 5))
  normal = torch.distributions.Normal
  theirs = torch.distributions.kl_divergence(
    normal(torch.tensor(mean), torch.tensor(np.exp(logvar / 2))), normal(0, 1)
  )
  np.testing.assert_allclose(
    vae.kl(jnp.asarray(mean), jnp.asarray(logvar)),
    theirs.mean((1, 2, 3)),
    rtol=1e-5,
  )


def test_alpha_is_laid_over_the_background():
  rgb = jnp.asarray([0.5, -0.25, -1.0])
  image = jnp.stack([jnp.append(rgb, a) for a in (-1.0, 0.0, 1.0)])[:, None]
  out = vae.over_background(image[None], 1.0)[0, :, 0]
  np.testing.assert_allclose(out, [jnp.ones(3), (rgb + 1) / 2, rgb])
  plain = image[None, ..., :3]
  np.testing.assert_array_equal(vae.over_background(plain, 1.0), plain)
  with pytest.raises(InputError, match="5 channels"):
    vae.over_background(jnp.zeros((1, 2, 2, 5)), 1.0)
