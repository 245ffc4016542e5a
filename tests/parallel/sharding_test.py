# SPDX-License-Identifier: Apache-2.0
"""Parameter rules, activation constraints and host batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from qi2_jax.errors import InputError
from qi2_jax.models import mmdit, vae
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import state

RULES = ((r"(.*/)?a/kernel", ("fsdp", "tensor")), (r"(.*/)?b", ()))


@pytest.fixture(scope="module")
def mesh():
  return create_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def abstract_state(params):
  """A whole train state: parameters, EMA, both Adam moments."""
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return jax.eval_shape(lambda p: state.create(p, optimizer), params)


def mmdit_params(name):
  model = mmdit.MMDiT(mmdit.PRESETS[name])
  return jax.eval_shape(lambda: mmdit.init_params(model, jax.random.key(0)))


def vae_params(name):
  config = vae.PRESETS[name]
  image = jnp.zeros((1, 32, 32, config.image_channels))
  return jax.eval_shape(vae.VAE(config).init, jax.random.key(0), image)[
    "params"
  ]


MODELS = [("mmdit", name) for name in mmdit.PRESETS]
MODELS += [("vae", name) for name in vae.PRESETS]


@pytest.mark.parametrize("kind, name", MODELS)
def test_every_array_of_a_train_state_has_a_rule(kind, name, mesh):
  params = {"mmdit": mmdit_params, "vae": vae_params}[kind](name)
  rules = {"mmdit": mmdit, "vae": vae}[kind].SHARDING_RULES
  whole = abstract_state(params)
  found = sharding.tree_shardings(whole, rules, mesh)
  # Moments and EMA lie where their parameter lies.
  adam = found.opt_state[1][0]
  assert found.params == found.ema == adam.mu == adam.nu
  sizes = jax.tree.map(
    lambda a, s: (a.size, np.prod(s.shard_shape(a.shape))), params,
    found.params,
  )  # fmt: skip
  pairs = jax.tree.leaves(sizes, is_leaf=lambda x: isinstance(x, tuple))
  total = sum(whole for whole, _ in pairs)
  per_device = sum(part for _, part in pairs)
  # Nothing large is replicated: fsdp alone halves, with tensor it quarters.
  assert per_device <= (0.35 if kind == "mmdit" else 0.55) * total


def test_an_unknown_parameter_is_named(mesh):
  with pytest.raises(InputError, match=r"no sharding rule .* c/kernel"):
    sharding.tree_shardings({"c": {"kernel": jnp.ones((4, 4))}}, RULES, mesh)
  with pytest.raises(InputError, match="has 2 axes but parameter a/kernel"):
    sharding.spec_for("a/kernel", (4,), RULES, mesh)


def test_rules_match_whole_names_in_order(mesh):
  assert sharding.spec_for("b", (4, 4), RULES, mesh) == P(None, None)
  assert sharding.spec_for("x/y/b", (4,), RULES, mesh) == P(None)
  with pytest.raises(InputError):
    sharding.spec_for("xb", (4,), RULES, mesh)
  rules = ((r"a/.*", ("tensor",)), *RULES)
  assert sharding.spec_for("a/kernel", (4, 4), rules, mesh) == P(None, "tensor")


def test_specs_are_right_aligned_and_fitted(mesh):
  spec = lambda *shape: sharding.spec_for("a/kernel", shape, RULES, mesh)  # noqa: E731
  assert spec(4, 6) == P("fsdp", "tensor")
  assert spec(32, 4, 6) == P(None, "fsdp", "tensor")
  assert spec(3, 6) == P(None, "tensor")


def test_scalars_are_replicated(mesh):
  found = sharding.tree_shardings({"count": jnp.zeros(())}, (), mesh)
  assert found["count"].spec == P()


@pytest.mark.parametrize("inside", [True, False])
def test_a_misspelt_activation_axis_raises(inside, mesh):
  x = jnp.ones((4, 4))
  with jax.set_mesh(mesh if inside else create_mesh({}, jax.devices()[:1])):
    with pytest.raises(KeyError, match="batsh"):
      sharding.constrain(x, "batsh", None)
  with pytest.raises(KeyError, match="batsh"):
    sharding.constrain(x, "batsh", None)
  with pytest.raises(ValueError, match="1 axis names"):
    sharding.constrain(x, "batch")


def test_constrain_is_the_identity_without_a_mesh():
  x = jnp.ones((8, 4))
  assert sharding.constrain(x, "batch", None) is x


@pytest.mark.parametrize("shape, axes, spec", [
  ((8, 6, 4, 5), ("batch", "tokens", "heads", None),
   P(("data", "fsdp"), "seq", "tensor")),
  ((8, 6, 3, 5), ("batch", "tokens", "heads", None), P(("data", "fsdp"))),
  ((6, 6, 4, 5), ("batch", None, "heads", None), P("data", None, "tensor")),
])  # fmt: skip
def test_constrain_places_activations(shape, axes, spec, mesh):
  x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: sharding.constrain(x, *axes))(x)
  assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), x.ndim)
  np.testing.assert_array_equal(y, x)


def test_batches_are_split_over_data_and_fsdp(mesh):
  batch = {"x": np.arange(24.0).reshape(8, 3), "n": (np.arange(8),)}
  placed = sharding.put_batch(batch, mesh)
  np.testing.assert_array_equal(placed["x"], batch["x"])
  np.testing.assert_array_equal(placed["n"][0], batch["n"][0])
  rows = {shard.data.shape for shard in placed["x"].addressable_shards}
  assert rows == {(2, 3)}


def test_a_batch_that_does_not_divide_is_refused(mesh):
  sharding.check_batch(8, mesh)
  with pytest.raises(InputError, match="batch size 6 does not divide"):
    sharding.check_batch(6, mesh)
