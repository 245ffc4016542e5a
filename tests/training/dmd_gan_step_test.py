# SPDX-License-Identifier: Apache-2.0
"""The GAN head in the step: what it trains, what it leaves alone."""

import dataclasses
import functools
import types

import dmd_toy
import dmd_workdir
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from qi2_jax.conditioning.conditioner import encode_images
from qi2_jax.errors import InputError
from qi2_jax.flow import path
from qi2_jax.models import mmdit, vae
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import (
  adapter,
  build,
  dmd_gan,
  dmd_plan,
  dmd_state,
  dmd_step,
  dmd_task,
  program,
  steps,
)

KEY = jax.random.key(3)
GROUP, RATIO, WIDTH = 6, 2, 16
GAN = dmd_gan.GanConfig(weight=0.5, fake_weight=0.3)
MODEL = mmdit.MMDiT(tiny_models.MMDIT)


def hidden(params, x, sigma_B, condition):
  """`dmd_toy.apply` with what is before its last layer."""
  angle = sigma_B[:, None] * jnp.exp(jnp.linspace(0.0, 3.0, 8))[None]
  h = jnp.concatenate([x[:, 0], jnp.sin(angle), jnp.cos(angle)], axis=-1)
  for layer in params[:-1]:
    h = jax.nn.silu(h @ layer["w"] + layer["b"])
  return dmd_toy.apply(params, x, sigma_B, condition), h[:, None]


NETS = dataclasses.replace(dmd_toy.NETS, hidden=hidden)


@functools.cache
def model(seed=0):
  params = dmd_toy.init(jax.random.key(seed), width=WIDTH)
  last = 0.3 * jax.random.normal(jax.random.key(9 + seed), (WIDTH, 2))
  return [*params[:-1], params[-1] | {"w": last}]


@functools.cache
def trained_head():
  """A head whose last layer is not zero."""
  return jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(jax.random.key(5), x.shape),
    dmd_gan.new_head(WIDTH),
  )


def rows(size=GROUP):
  keys = jax.random.split(jax.random.key(7), 3)
  return {
    "condition": jax.random.normal(keys[0], (size, 2)),
    "negative": jax.random.normal(keys[1], (size, 2)),
    "category_B": jnp.arange(size) % 2,
    "target_BNZ": 1.0 + jax.random.normal(keys[2], (size, 1, 2)),
  }


def one_step(gan, fake_rate=0.1):
  config = dmd_toy.config(ratio=RATIO, guidance=2.0, gan=gan)
  txs = optax.sgd(0.1), optax.sgd(fake_rate)
  head = functools.partial(dmd_gan.new_head, WIDTH) if gan else None
  start = dmd_state.create(model(), model(), *txs, head)
  step = dmd_step.make_step(config, NETS, *txs, 0.5)
  features = rows(GROUP * (RATIO + 1))
  features[steps.FROZEN] = {dmd_step.TEACHERS: [model()]}
  return start, *jax.jit(step)(start, features, KEY)


def norm(tree) -> float:
  return float(optax.global_norm(tree))


def gap(a, b) -> float:
  return norm(jax.tree.map(jnp.subtract, a, b))


def test_the_students_term_moves_nothing_but_the_student():
  config = dmd_toy.config(guidance=2.0, gan=GAN)
  x0 = jax.random.normal(jax.random.key(1), (GROUP, 1, 2))
  condition, keys = rows()["condition"], dmd_step.draws(KEY)

  def term(params, head, x0):
    return dmd_gan.student_loss(
      config, hidden, params, head, x0, condition, keys
    )[0]

  grads = jax.jit(jax.grad(term, (0, 1, 2)))(model(), trained_head(), x0)
  assert norm(grads[:2]) == 0.0 and norm(grads[2]) > 1e-3

  def whole(trained, fake, head, frozen):
    return dmd_step.student_loss(
      config, NETS, trained, fake, frozen, rows(), keys, head
    )[0]

  frozen = {dmd_step.TEACHERS: [model()]}
  given = model(), model(1), trained_head(), frozen
  grads = jax.jit(jax.grad(whole, (0, 1, 2, 3)))(*given)
  assert norm(grads[0]) > 1e-3 and norm(grads[1:]) == 0.0
  without = jax.jit(jax.grad(whole))(model(), model(1), None, frozen)
  assert gap(grads[0], without) > 1e-3


def test_the_heads_loss_trains_head_and_fake_score_and_no_student():
  """Its value is flow matching plus the losses, written out."""
  config, keys = dmd_toy.config(gan=GAN), dmd_step.draws(KEY)
  x0 = jax.random.normal(jax.random.key(1), (GROUP, 1, 2))

  def loss(params, head, x0, config=config):
    return dmd_gan.fake_loss(config, hidden, params, head, x0, rows(), keys)

  given = model(), trained_head(), x0
  grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
  grads, metrics = grad(*given)
  assert norm(grads[1]) > 1e-3 and norm(grads[2]) == 0.0
  condition = rows()["condition"]
  matching = functools.partial(dmd_step.fake_loss, config, NETS)
  given_rest = x0, condition, keys
  value, alone = jax.value_and_grad(matching)(model(), *given_rest)
  assert gap(grads[0], alone) > 1e-3  # the head's loss reaches it, too
  assert metrics["fake_loss"] == pytest.approx(float(value), rel=1e-6)
  total = float(loss(*given)[0])
  expected = float(value) + 0.3 * float(metrics["d_loss"])
  assert total == pytest.approx(expected, rel=1e-6)
  assert metrics["d_real"] != metrics["d_fake"]


def test_the_head_sees_images_and_samples_with_the_same_noise_levels():
  seen = []

  def spy(params, x, t_B, condition):
    seen.append((x, t_B))
    return hidden(params, x, t_B, condition)

  x0 = jnp.full((GROUP, 1, 2), 5.0)
  keys, given = dmd_step.draws(KEY), rows()
  dmd_gan.fake_loss(
    dmd_toy.config(gan=GAN), spy, model(), trained_head(), x0, given, keys
  )
  (samples, t_B), (images, other_B) = seen
  np.testing.assert_array_equal(t_B, other_B)
  t = t_B[:, None, None]
  noises = [
    (x - (1.0 - t) * clean) / t
    for x, clean in ((samples, x0), (images, given["target_BNZ"]))
  ]
  for noise in noises:
    assert np.abs(noise).max() < 5.0
  assert np.abs(noises[0] - noises[1]).max() > 0.1
  # The fake score is trained at the very sample that is judged.
  eps = jax.random.normal(keys["eps"], x0.shape)
  np.testing.assert_allclose(samples, path.interpolate(x0, eps, t_B))


def test_a_fresh_head_does_not_move_the_student():
  """It starts at logit 0, so the first student step is DMD's."""
  _, off, _ = one_step(None, fake_rate=0.0)
  start, on, metrics = one_step(GAN, fake_rate=0.0)
  assert gap(on.params, off.params) < 1e-6 < gap(on.params, start.params)
  assert metrics["d_loss"] == pytest.approx(2 * np.log(2), rel=1e-6)
  assert metrics["gan_loss"] == pytest.approx(np.log(2), rel=1e-6)
  start, on, metrics = one_step(GAN)
  _, off, _ = one_step(None)
  assert gap(on.params, off.params) > 1e-6
  for name in (dmd_gan.SCORE, dmd_gan.HEAD):
    assert gap(on.fake[name], start.fake[name]) > 1e-4
  assert {"d_real", "d_fake_accuracy", "fake_loss"} <= metrics.keys()


def test_the_gan_term_alone_pulls_the_student_to_the_data():
  """A student that is a mean, and no score gradient at all."""
  config = dmd_toy.config(gan=dmd_gan.GanConfig(1.0, 1.0))
  mean, size = jnp.asarray([[1.0, -0.5]]), 128
  txs = optax.adam(0.02, b1=0.0, b2=0.99), optax.adam(2e-3, b1=0.0, b2=0.99)
  fake = {
    dmd_gan.SCORE: dmd_toy.init(KEY, 32), dmd_gan.HEAD: dmd_gan.new_head(32),
  }  # fmt: skip
  student = jnp.asarray([[-1.0, 1.0]])
  nothing = jnp.zeros((size, 2))

  def sample(centre, key):
    return centre[None] + 0.3 * jax.random.normal(key, (size, 1, 2))

  def judged(fake, student, key):
    ours, theirs, key = jax.random.split(key, 3)
    given = {"condition": nothing, "target_BNZ": sample(mean, theirs)}
    return dmd_gan.fake_loss(
      config, hidden, *dmd_gan.parts(config, fake), sample(student, ours),
      given, dmd_step.draws(key),
    )[0]  # fmt: skip

  def pulled(student, fake, key):
    ours, key = jax.random.split(key)
    return dmd_gan.student_loss(
      config, hidden, *dmd_gan.parts(config, fake), sample(student, ours),
      nothing, dmd_step.draws(key),
    )[0]  # fmt: skip

  def one(carry, key):
    student, fake, states = carry
    grads = jax.grad(judged)(fake, student, key)
    updates, second = txs[1].update(grads, states[1], fake)
    fake = optax.apply_updates(fake, updates)
    grads = jax.grad(pulled)(student, fake, key)
    updates, first = txs[0].update(grads, states[0], student)
    student = optax.apply_updates(student, updates)
    return (student, fake, (first, second)), student

  start = student, fake, (txs[0].init(student), txs[1].init(fake))
  keys = jax.random.split(KEY, 400)
  _, walk = jax.jit(lambda: jax.lax.scan(one, start, keys))()
  before, after = (
    float(jnp.linalg.norm(x - mean)) for x in (student, walk[-100:].mean(0))
  )
  assert before > 2.0 and after < 0.3


def tiny(**fields):
  return dmd_workdir.config(**fields)


ON = {"dmd.gan.weight": 0.5, "dmd.gan.fake_weight": 0.3}


def abstract(config, mesh):
  start, _ = dmd_task.training(config, MODEL)
  return program.abstract_state(
    adapter.trained(MODEL, None), start, dmd_task.rules(None), mesh
  )


def places(state):
  return {
    sharding.path_name(p): (x.shape, x.sharding.spec)
    for p, x in jax.tree_util.tree_leaves_with_path(state)
  }


def test_without_weight_the_state_is_that_of_a_run_without_gan():
  """And with it the head is all that is new, a copy on every device."""
  mesh = create_mesh({"fsdp": 4, "tensor": 2})
  older = tiny()
  with older.unlocked():
    del older.dmd.gan
  off, before = (abstract(c, mesh) for c in (tiny(), older))
  assert jax.tree.structure(off) == jax.tree.structure(before)
  assert places(off) == places(before)
  assert dmd_task.settings(tiny()).gan is None
  assert dmd_task.settings(tiny(**ON)).gan == GAN
  plain, on = places(off), places(abstract(tiny(**ON), mesh))
  heads = {name for name in on if "/head/" in name}
  assert len(heads) == 3 * 4  # parameters and two moments
  assert all(not any(on[name][1]) for name in heads)
  rest = {n.replace("/score/", "/"): on[n] for n in on.keys() - heads}
  assert rest == plain


@pytest.mark.parametrize("weight, fake_weight", [(-1.0, 0.3), (1.0, 0.0)])
def test_weights_without_meaning_are_refused(weight, fake_weight):
  fields = {"dmd.gan.weight": weight, "dmd.gan.fake_weight": fake_weight}
  with pytest.raises(InputError, match="must be above 0"):
    dmd_task.settings(tiny(**fields))


def test_targets_are_encoded_or_taken_from_the_cache():
  autoencoder = build.new_vae(tiny().vae)
  variables = jax.jit(lambda k: vae.init_variables(autoencoder, k))(KEY)
  models = types.SimpleNamespace(
    vae=autoencoder, frozen=types.SimpleNamespace(vae=variables)
  )
  transform = dmd_gan.transform(lambda sample, rng: {"prompt": np.ones(3)})
  encode = dmd_gan.encoder(models, lambda batch: {"seen": set(batch)})
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (32, 32, 4), np.uint8)

  def features(sample):
    made = transform(sample, rng)
    return encode(jax.tree.map(lambda x: x[None], made))

  pixels = features({"image": image, "caption": "a cat"})
  assert pixels["seen"] == {"prompt"}
  expected = encode_images(autoencoder, variables, image[None])
  expected = np.asarray(expected).reshape(1, -1, expected.shape[-1])
  np.testing.assert_allclose(pixels["target_BNZ"], expected, atol=1e-5)
  latents = jnp.asarray(expected[0], jnp.bfloat16)
  cached = features({"latents": np.asarray(latents), "caption": "a cat"})
  assert cached["target_BNZ"].dtype == jnp.float32
  np.testing.assert_array_equal(cached["target_BNZ"][0], latents)
  with pytest.raises(InputError, match="the data has prompts only"):
    transform({"caption": "a cat"}, rng)


def mmdit_rows(size):
  def conditioning(words):
    return tiny_models.conditioning(
      tiny_models.MMDIT, words=words, references=((2, 2),), target=(2, 2),
      length=12,
    )  # fmt: skip

  shape = size, 4, tiny_models.MMDIT.latent_channels
  return {
    "condition": conditioning(tuple(1 + i % 5 for i in range(size))),
    "negative": conditioning((1,) * size),
    "category_B": np.arange(size, dtype=np.int32) % 2,
    "target_BNZ": np.random.default_rng(1).normal(size=shape),
  }


def test_hidden_states_are_those_of_the_target():
  """The velocity is the head of the model on them."""
  given, params = mmdit_rows(2), tiny_models.mmdit_params(MODEL)
  x = jnp.asarray(given["target_BNZ"], jnp.float32)
  sigma = jnp.asarray([0.3, 0.8])
  inputs = {"params": params}, x, sigma, given["condition"]
  hidden_of = jax.jit(dmd_task.networks(MODEL).hidden)
  v, h_BND = hidden_of(params, *inputs[1:])
  assert h_BND.shape == (2, 4, tiny_models.MMDIT.width)
  np.testing.assert_allclose(v, jax.jit(MODEL.apply)(*inputs), atol=1e-6)
  head = lambda m, h, s: m._head(h, m._rows(s)[1])  # noqa: E731
  again = MODEL.apply({"params": params}, h_BND, sigma, method=head)
  np.testing.assert_allclose(again, v, atol=1e-6)


def sharded_step(spec, count):
  config = tiny(**ON, **{"data.batch_size": 16})
  mesh = create_mesh(dict(spec), jax.devices()[:count])
  start, step = dmd_task.training(config, MODEL)
  params = tiny_models.mmdit_params(MODEL)
  state = start(jax.tree.map(jnp.copy, params))
  where = sharding.tree_shardings(state, dmd_task.rules(None), mesh)
  whole = sharding.tree_shardings(params, mmdit.SHARDING_RULES, mesh)
  given = jax.tree.map(np.asarray, mmdit_rows(16))
  given["target_BNZ"] = np.float32(given["target_BNZ"])
  features = sharding.put_batch(given, mesh)
  features[steps.FROZEN] = {"teachers": [jax.device_put(params, whole)]}
  with jax.set_mesh(mesh):
    jitted = program.jit_step(step, where, mesh)
    return jax.device_get(jitted(jax.device_put(state, where), features, KEY))


@pytest.mark.slow
def test_four_devices_make_the_step_of_one():
  one = sharded_step({"data": 1}, 1)
  other = sharded_step({"fsdp": 2, "tensor": 2}, 4)
  assert {"d_loss", "gan_loss", "d_real_accuracy"} <= one[1].keys()
  for name, value in one[1].items():
    assert other[1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
  for a, b in zip(*(jax.tree.leaves(s[0].fake["head"]) for s in (one, other))):
    # Adam without memory: where a gradient is rounding error so is its sign.
    assert np.isclose(a, b, rtol=1e-3, atol=1e-5).mean() > 0.95


@pytest.mark.slow
def test_the_plan_has_the_head_and_its_images():
  config = tiny(**ON, **{"data.batch_size": 16})
  config.data.buckets = ((32, 32),)
  mesh = create_mesh({"data": 2, "fsdp": 4})
  _, facts = dmd_plan.lower_step(config, mesh)
  config.dmd.gan.weight = 0.0
  _, without = dmd_plan.lower_step(config, mesh)
  assert facts == without  # the head is no part of the model
