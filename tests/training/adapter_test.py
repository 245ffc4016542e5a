# SPDX-License-Identifier: Apache-2.0
"""The LoRA step: it learns, and eight devices learn what one does."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest
import tiny_models
from ml_collections import ConfigDict

from experiments import sft
from qi2_jax.flow.schedules import ShiftConfig
from qi2_jax.models import lora, mmdit
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import adapter, lora_task, state, steps
from qi2_jax.training.task import Task

BATCH, TARGET = 8, (4, 4)
KEY = jax.random.key(3)
MODEL = mmdit.MMDiT(tiny_models.MMDIT)
FULL = steps.flow_matching_loss(
  MODEL, logit_mean=0.0, logit_std=1.0, shift=ShiftConfig()
)
CONFIG = adapter.LoraConfig(4, 8.0, lora.DEFAULT_TARGETS)


@functools.cache
def problem():
  """A random base and features that carry it."""
  base = tiny_models.mmdit_params(MODEL)
  batch = {
    "latents_BNZ": tiny_models.noise(tiny_models.MMDIT, BATCH, TARGET, seed=4),
    "condition": tiny_models.conditioning(
      tiny_models.MMDIT, words=(1, 4, 2, 6, 3, 5, 1, 2), target=TARGET,
      length=12,
    ),
  }  # fmt: skip
  return base, batch


def factors(seed=0):
  """Fresh factors, `b` filled so that all of them matter."""
  made = adapter.init_factors(CONFIG, problem()[0], jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x if np.any(x) else np.float32(0.1 * rng.normal(size=x.shape)),
    made,
  )


@functools.cache
def train(spec=(), num_steps=1, accumulate=1):
  """State and metrics of the last step on a mesh, as numpy."""
  base, batch = problem()
  mesh = create_mesh(dict(spec), jax.devices()[: 8 if spec else 1])
  # A large epsilon: the sign of a rounding error is not reproducible.
  tx = optax.adamw(2e-2, eps=1e-3)
  start = state.create(factors(), tx)
  places = sharding.tree_shardings(start, lora.SHARDING_RULES, mesh)
  start = jax.device_put(start, places)
  frozen = jax.device_put(
    base, sharding.tree_shardings(base, mmdit.SHARDING_RULES, mesh)
  )
  batch = sharding.put_batch(jax.tree.map(np.asarray, batch), mesh)
  loss = adapter.lora_loss(FULL, CONFIG)
  step = steps.make_step(loss, tx, 0.9, accumulate)
  with jax.set_mesh(mesh):
    step = jax.jit(step, out_shardings=(places, None))
    for _ in range(num_steps):
      features = batch | {steps.FROZEN: frozen}
      start, metrics = step(start, features, KEY)
    return jax.device_get((start, metrics, frozen))


@pytest.mark.parametrize("spec", [
  (("data", 2), ("fsdp", 2), ("tensor", 2)), (("fsdp", 8),),
  (("data", 2), ("seq", 4)),
])  # fmt: skip
def test_eight_devices_equal_one(spec):
  new, metrics, _ = train()
  new_8, metrics_8, _ = train(spec)
  assert abs(metrics_8["loss"] / metrics["loss"] - 1) <= 1e-5
  for (path, leaf_8), leaf in zip(
    jax.tree_util.tree_leaves_with_path(new_8), jax.tree.leaves(new)
  ):
    assert tiny_models.relative(leaf_8, leaf) <= 1e-5, path


def test_accumulation_gives_the_same_factors():
  new, metrics, _ = train()
  new_4, metrics_4, _ = train(accumulate=4)
  assert abs(metrics_4["loss"] / metrics["loss"] - 1) <= 1e-5
  for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(new_4.params)):
    assert tiny_models.relative(b, a) <= 1e-5


def test_the_loss_falls_and_the_base_stays():
  base, batch = problem()
  new, _, frozen = train(num_steps=30)
  for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(frozen), strict=True):
    np.testing.assert_array_equal(a, b)
  key = jax.random.key(99)  # noise that no step has seen
  first, last = (
    float(FULL(lora.merge(base, adapter.to_lora(CONFIG, f)), batch, key)[0])
    for f in (factors(), new.ema)
  )
  assert last < 0.8 * first


def test_the_loss_is_that_of_the_merged_weights():
  base, batch = problem()
  made = factors()
  flat = jax.tree_util.tree_leaves_with_path(made)
  assert len(flat) == 2 * 7
  kernels = {}
  for path, leaf in flat:
    *where, kind = sharding.path_name(path).split("/")
    kernels.setdefault(tuple(where), {})[kind] = np.asarray(leaf)
  merged = jax.tree.map(np.array, base)
  for where, pair in kernels.items():
    node = functools.reduce(lambda tree, k: tree[k], where[:-1], merged)
    for layer, kernel in enumerate(node["kernel"]):
      a, b = pair["a"][layer], pair["b"][layer]
      delta = a.reshape(-1, 4) @ b.reshape(4, -1)
      kernel += (8.0 / 4) * delta.reshape(kernel.shape)
  loss = adapter.lora_loss(FULL, CONFIG)
  ours, _ = loss(made, batch | {steps.FROZEN: base}, KEY)
  theirs, _ = FULL(merged, batch, KEY)
  assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def products(jaxpr):
  """Shapes of the results of all matrix products of a program."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      yield eqn.outvars[0].aval.shape
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from products(inner)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_makes_nothing_of_the_size_of_a_kernel(remat):
  """Neither merged weights nor a gradient of the base."""
  base, batch = problem()
  config = dataclasses.replace(tiny_models.MMDIT, remat=remat)
  full = steps.flow_matching_loss(
    mmdit.MMDiT(config), logit_mean=0.0, logit_std=1.0, shift=None
  )
  loss = adapter.lora_loss(full, CONFIG)
  features = batch | {steps.FROZEN: base}
  program = jax.make_jaxpr(jax.grad(loss, has_aux=True))(
    factors(), features, KEY
  )
  made = set(products(program.jaxpr))
  layers = lora.kernels(base)
  targets = [s for n, s in layers.items() if n.startswith("blocks/")]
  assert {x.shape[1:] for x in jax.tree.leaves(factors())} & made
  for shape in targets:
    assert shape not in made and shape[1:] not in made


def test_the_config_is_read_as_written():
  section = dict(rank=2, alpha=6.0, targets=())
  config = ConfigDict(
    dict(objective="flow_matching", init="runs/a", lora=section)
  )
  made = adapter.from_config(config)
  assert made == adapter.LoraConfig(2, 6.0, lora.DEFAULT_TARGETS)
  scales = adapter.to_lora(made, factors()).scales.values()
  assert all(math.isclose(s, 3.0) for s in scales)
  config.lora.targets = (".*img_in/kernel",)
  assert adapter.from_config(config).targets == (".*img_in/kernel",)
  config.lora.rank = 0
  assert adapter.from_config(config) is None
  # A run of a release without LoRA training.
  assert adapter.from_config(ConfigDict(dict(objective="vae"))) is None


def test_a_task_is_adapted(monkeypatch):
  """Its encode brings the base along, its preview sees merged weights."""
  base, batch = problem()
  monkeypatch.setattr(lora_task.weights, "own_base", lambda *_: base)
  task = Task(
    functools.partial(mmdit.init_params, MODEL), None, mmdit.SHARDING_RULES,
    transform=None, encode=lambda state, batch: dict(batch), step=None,
    preview=lambda params, samples: params, finish=None,
  )  # fmt: skip
  mesh = create_mesh({}, jax.devices()[:1])
  run = sft.get_config("tiny")
  made = lora_task.adapted(run, task, FULL, CONFIG, "run", mesh)
  fresh = made.init(jax.random.key(0))
  assert jax.tree.structure(fresh) == jax.tree.structure(factors())
  features = made.encode(None, batch)
  assert features[steps.FROZEN] is base
  _, metrics = jax.jit(made.step)(made.start(fresh), features, KEY)
  wanted, _ = FULL(base, batch, jax.random.fold_in(KEY, 0))
  assert float(metrics["loss"]) == pytest.approx(float(wanted))
  shown = made.preview(factors(), [])
  wanted = lora.merge(base, adapter.to_lora(CONFIG, factors()))
  for a, b in zip(jax.tree.leaves(shown), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
