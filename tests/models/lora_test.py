# SPDX-License-Identifier: Apache-2.0
"""Adapters against plain matrix algebra, on one device and on eight."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from qi2_jax.errors import InputError
from qi2_jax.models import layers, lora, mmdit
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh

MODEL = mmdit.MMDiT(tiny_models.MMDIT)
EVERY_KERNEL = (r".*/kernel",)
KEY = jax.random.key(0)


def random_adapter(params, targets=lora.DEFAULT_TARGETS, rank=4, seed=5):
  """An adapter without zeros and with a scale of its own per layer."""
  made = lora.init(params, targets, rank, 6.0, KEY)
  factors = tiny_models.randomise(made.factors, seed)
  rng = np.random.default_rng(seed)
  scales = {}
  for name in made.scales:
    shape = (2,) if name.startswith("blocks/") else ()
    scales[name] = jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32)
  return lora.Lora(factors, scales)


@pytest.fixture(scope="module")
def params():
  return tiny_models.mmdit_params(MODEL)


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {sharding.path_name(path): leaf for path, leaf in leaves}


def test_fan_in_axes_are_those_the_modules_declare():
  declared = {}

  def spy(call, args, kwargs, context):
    if isinstance(context.module, layers.Einsum):
      path = "/".join((*context.module.path, "kernel"))
      declared[path] = tuple(context.module.fan_in)
    return call(*args, **kwargs)

  with nn.intercept_methods(spy):
    shapes = jax.eval_shape(lambda: mmdit.init_params(MODEL, KEY))
  assert declared.keys() == lora.kernels(shapes).keys()
  for path, axes in declared.items():
    assert axes == tuple(range(lora.num_inputs(path))), path


def test_a_fresh_adapter_is_pefts_default_and_changes_nothing(params):
  made = lora.init(params, lora.DEFAULT_TARGETS, 64, 32, KEY)
  assert len(made.factors) == 7
  for name, f in made.factors.items():
    layer, inputs, outputs = lora.split_shape(name, lora.kernels(params)[name])
    assert f["a"].shape == (*layer, *inputs, 64)
    assert f["b"].shape == (*layer, 64, *outputs)
    bound = np.prod(inputs) ** -0.5
    assert np.abs(f["a"]).max() <= bound
    # Uniform: variance is a third of the squared bound.
    assert np.isclose(np.std(f["a"]), bound / 3**0.5, rtol=0.05)
    assert made.scales[name] == 0.5
  a = [f["a"].ravel()[:64] for f in made.factors.values()]
  assert len(np.unique(np.concatenate(a))) == 7 * 64
  merged = lora.merge(params, made)
  for name, leaf in flat(merged).items():
    np.testing.assert_array_equal(leaf, flat(params)[name], err_msg=name)


@pytest.mark.parametrize("targets", [lora.DEFAULT_TARGETS, EVERY_KERNEL])
def test_merge_is_the_matrix_product_of_every_layer(params, targets):
  adapter = random_adapter(params, targets)
  before = flat(params)
  after = flat(jax.jit(lora.merge)(params, adapter, 0.7))
  assert after.keys() == before.keys()
  for name, kernel in before.items():
    if name not in adapter.factors:
      np.testing.assert_array_equal(after[name], kernel, err_msg=name)
      continue
    layer, inputs, _ = lora.split_shape(name, kernel.shape)
    count = layer[0] if layer else 1
    w = np.asarray(kernel, np.float64).reshape(count, np.prod(inputs), -1)
    a = np.asarray(adapter.factors[name]["a"], np.float64)
    b = np.asarray(adapter.factors[name]["b"], np.float64)
    scales = np.broadcast_to(adapter.scales[name], (count,))
    a, b = a.reshape(count, -1, 4), b.reshape(count, 4, -1)
    for i in range(count):
      w[i] += 0.7 * scales[i] * a[i] @ b[i]
    assert np.abs(w - kernel.reshape(w.shape)).max() > 0.05
    got = np.asarray(after[name]).reshape(w.shape)
    np.testing.assert_allclose(got, w, atol=2e-6, err_msg=name)


def test_a_bf16_kernel_is_rounded_once(params):
  adapter = random_adapter(params)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  exact = lora.merge(
    jax.tree.map(lambda x: x.astype(jnp.float32), half), adapter
  )
  for name, leaf in flat(lora.merge(half, adapter)).items():
    assert leaf.dtype == jnp.bfloat16
    expected = flat(exact)[name].astype(jnp.bfloat16)
    np.testing.assert_array_equal(leaf, expected, err_msg=name)


def test_gradients_are_the_analytic_ones(params):
  adapter = random_adapter(params, EVERY_KERNEL)
  weights = flat(tiny_models.randomise(params, seed=9))

  def loss(adapter):
    merged = flat(lora.merge(params, adapter, 1.5))
    return sum(jnp.sum(weights[n] * merged[n]) for n in adapter.factors)

  grads = jax.grad(loss)(adapter)
  for name, f in adapter.factors.items():
    layer, inputs, outputs = lora.split_shape(name, weights[name].shape)
    n, i, o = int(np.prod(layer)), int(np.prod(inputs)), int(np.prod(outputs))
    c = np.asarray(weights[name]).reshape(n, i, o)
    scale = 1.5 * np.broadcast_to(adapter.scales[name], (n,))[:, None, None]
    a, b = (np.asarray(f["a"]).reshape(n, i, 4),
            np.asarray(f["b"]).reshape(n, 4, o))  # fmt: skip
    got_a = np.asarray(grads.factors[name]["a"]).reshape(a.shape)
    got_b = np.asarray(grads.factors[name]["b"]).reshape(b.shape)
    wanted_a = scale * c @ b.transpose(0, 2, 1)
    np.testing.assert_allclose(got_a, wanted_a, atol=1e-4, err_msg=name)
    wanted_b = scale * a.transpose(0, 2, 1) @ c
    np.testing.assert_allclose(got_b, wanted_b, atol=1e-4, err_msg=name)
    assert not np.any(grads.scales[name])


@pytest.mark.parametrize("modulation", ["shared", "per_block"])
def test_a_sharded_merge_is_local_and_equals_the_whole(modulation):
  config = dataclasses.replace(tiny_models.MMDIT, modulation=modulation)
  params = tiny_models.mmdit_params(mmdit.MMDiT(config))
  adapter = random_adapter(params, EVERY_KERNEL)
  whole = flat(lora.merge(params, adapter))
  mesh = create_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
  placed = sharding.tree_shardings(params, mmdit.SHARDING_RULES, mesh)
  params = jax.device_put(params, placed)
  rules = sharding.tree_shardings(adapter, lora.SHARDING_RULES, mesh)
  assert rules.factors["blocks/attn/to_q/kernel"]["b"].spec[2] == "tensor"
  assert rules.factors["blocks/attn/to_out/kernel"]["a"].spec[1] == "tensor"
  adapter = jax.device_put(adapter, rules)
  with jax.set_mesh(mesh):
    merge = jax.jit(lora.merge, out_shardings=placed)
    compiled = merge.lower(params, adapter).compile()
    sharded = compiled(params, adapter)
  moved = r"all-gather|all-reduce|all-to-all|collective-permute"
  assert not re.search(moved, compiled.as_text())
  for name, leaf in flat(sharded).items():
    assert leaf.sharding == flat(placed)[name]
    np.testing.assert_allclose(leaf, whole[name], atol=1e-6, err_msg=name)


def test_what_does_not_fit_is_named(params):
  with pytest.raises(InputError, match="rank 0 must be at least 1"):
    lora.init(params, lora.DEFAULT_TARGETS, 0, 1, KEY)
  with pytest.raises(InputError, match="norm_q/scale' matches no kernel"):
    lora.init(params, (r"blocks/attn/norm_q/scale",), 2, 1, KEY)
  adapter = random_adapter(params)
  base = {k: v for k, v in params.items() if k != "blocks"}
  with pytest.raises(InputError, match=r"no kernel blocks/attn/to_k/kernel"):
    lora.merge(base, adapter)
  narrow = dataclasses.replace(tiny_models.MMDIT, num_heads=1)
  narrow = tiny_models.mmdit_params(mmdit.MMDiT(narrow))
  with pytest.raises(InputError, match=r"blocks/attn/to_k.*another model"):
    lora.merge(narrow, adapter)
