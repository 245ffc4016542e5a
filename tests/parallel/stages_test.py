# SPDX-License-Identifier: Apache-2.0
"""Eight devices compute what one computes, for the real stages.

Every stage is its `tiny` config with its real task: encoding and the jitted
step; then the MMDiT with and without its cache, and the sampler. All weights
are random and none is zero. Fast: every stage and every mesh at least once;
slow: the full product.
"""

import dataclasses
import functools
import os
import re

import jax
import numpy as np
import pytest
import tiny_models

from experiments import continual, pretrain, sft, vae
from qi2_jax.conditioning.conditioner import stack
from qi2_jax.errors import InputError
from qi2_jax.flow.generate import Generator, Request, SamplingConfig
from qi2_jax.models import mmdit
from qi2_jax.models import vae as vae_lib
from qi2_jax.parallel import mesh as mesh_lib
from qi2_jax.parallel import sharding
from qi2_jax.training import build, checkpoints, frozen, program
from qi2_jax.training.tasks import TASKS

STAGES = {
  "pretrain": (pretrain, "tiny"),
  "continual": (continual, "tiny"),
  "sft": (sft, "tiny"),
  "lora": (sft, "tiny"),
  "vae": (vae, "demo"),  # the L1 alone
  "vae_recipe": (vae, "tiny"),
}
EDITS = ("continual", "sft")
MESHES = {
  "fsdp8": {"fsdp": 8},
  "fsdp4_tensor2": {"fsdp": 4, "tensor": 2},
  "data4_seq2": {"data": 4, "seq": 2},
  "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
  "data2_fsdp2_seq2": {"data": 2, "fsdp": 2, "seq": 2},
  "slices2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
}
LOSS, GRADIENTS, OUTPUTS = 1e-5, 1e-4, 1e-4
BATCH, SIDE = 8, 64
KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True)
class FakeChip:
  """A device of a slice; the mesh of these is laid over real ones."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "cpu"
  device_kind: str = "cpu"


def mesh_of(name: str):
  """A mesh by name; `slices2` pretends that devices 4 to 7 are far away."""
  if name == "one":
    return mesh_lib.create_mesh({}, jax.devices()[:1])
  if not name.startswith("slices2"):
    return mesh_lib.create_mesh(MESHES[name])
  chips = [FakeChip(d.id, d.id // 4) for d in jax.devices()]
  grid = mesh_lib.create_mesh(MESHES[name], chips).devices
  assert all(len({c.slice_index for c in part.flat}) == 1 for part in grid)
  real = {d.id: d for d in jax.devices()}
  grid = np.vectorize(lambda chip: real[chip.id])(grid)
  kinds = (jax.sharding.AxisType.Auto,) * grid.ndim
  return jax.sharding.Mesh(grid, mesh_lib.AXES, axis_types=kinds)


def config_of(stage: str, base: str):
  """The tiny config of a stage; Adam moves from its first step on."""
  file, variant = STAGES[stage]
  config = file.get_config(variant)
  config.optimizer.warmup_steps = 0
  config.data.caption_dropout = 0.0
  if stage == "lora":
    config.init, config.lora.rank, config.lora.alpha = base, 2, 2.0
  return config


def samples(edits: bool) -> list[dict]:
  """Noise images with captions of different lengths."""
  rng = np.random.default_rng(0)

  def image():
    return rng.integers(0, 256, (SIDE, SIDE, 4), np.uint8)

  words = ["a", "red", "circle", "left", "of", "two", "small", "squares"]
  return [
    {
      "caption": " ".join(words[: 1 + i]),
      "image": image(),
      "references": (image(),) if edits else (),
    }
    for i in range(BATCH)
  ]


def random_params(init):
  """Parameters of a task, none of them zero."""
  shapes = jax.eval_shape(init, jax.random.key(0))
  ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
  return tiny_models.randomise(ones)


@functools.cache
def random_vae():
  """A VAE that nobody has to compile first."""
  module = build.new_vae(config_of("pretrain", "").vae)
  params = random_params(lambda key: vae_lib.init_variables(module, key))
  stats = vae_lib.identity_stats(module.config.z_dim)
  return module, {"params": params["params"], "latent_stats": stats}


@pytest.fixture(scope="module", autouse=True)
def models_once():
  """Encoder and VAE are made once; every mesh has them placed anew."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, "built_in", functools.cache(build.built_in))
    patch.setattr(frozen, "own_vae", lambda config, workdir: random_vae())
    yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A workdir with the weights beneath a LoRA."""
  path = str(tmp_path_factory.mktemp("base"))
  model = mmdit.MMDiT(mmdit.PRESETS["tiny"])
  params = random_params(functools.partial(mmdit.init_params, model))
  store = checkpoints.CheckpointStore(path)
  store.save(1, {"ema": params}, {"step": 1})
  store.close()
  return path


def batch_of(task, mesh, edits: bool):
  """The fixed samples as the loader makes a batch of them."""
  rng = np.random.default_rng(1)
  hosts = [task.transform(s, rng) for s in samples(edits)]
  return sharding.put_batch(stack(hosts), mesh)


def train_step(stage: str, mesh, base: str, workdir: str):
  """State and metrics after one step of a stage, as numpy arrays."""
  config = config_of(stage, base)
  os.makedirs(workdir, exist_ok=True)
  with jax.set_mesh(mesh):
    task = TASKS[config.objective](config, workdir, mesh)
    abstract = program.abstract_state(task.init, task.start, task.rules, mesh)
    places = program.shardings_of(abstract)
    start = jax.jit(task.start, out_shardings=places)
    state = start(random_params(task.init))
    features = task.encode(state, batch_of(task, mesh, stage in EDITS))
    step = program.jit_step(task.step, places, mesh)
    compiled = step.lower(state, features, KEY).compile()
    text = compiled.as_text()
    assert ("all-reduce" in text) == (mesh.size > 1)
    return jax.device_get(compiled(state, features, KEY))


def assert_same_step(found, wanted) -> None:
  """Loss, gradients (as Adam's moments), parameters and their averages."""
  (state_8, metrics_8), (state, metrics) = found, wanted
  assert abs(metrics_8["loss"] / metrics["loss"] - 1) <= LOSS
  assert metrics["skipped"] == metrics_8["skipped"] == 0
  for name, value in metrics.items():
    assert abs(metrics_8[name] - value) <= GRADIENTS * abs(value), name
  moments = 0
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(state_8), jax.tree.leaves(state),
    strict=True,
  ):  # fmt: skip
    name = sharding.path_name(path)
    if "/mu/" in name or "/nu/" in name:
      moments += bool(np.abs(b).max() > 0)
      assert np.abs(a - b).max() <= GRADIENTS * np.abs(b).max(), name
    else:
      # Adam's first update is the sign of the gradient, and the sign of a
      # rounding error is not reproducible.
      same = np.isclose(a, b, rtol=1e-5, atol=1e-6).mean()
      assert same >= 0.99 or b.size < 100, (name, same)
  assert moments > len(jax.tree.leaves(state.params))


@pytest.fixture(scope="module")
def on_one(base, tmp_path_factory):
  """What one device makes of each stage, once."""
  folder = tmp_path_factory.mktemp("one")
  return functools.cache(
    lambda stage: train_step(stage, mesh_of("one"), base, str(folder / stage))
  )


# `continual` is slow because its tiny program is that of `sft`.
FAST = {
  ("pretrain", "fsdp8"),
  ("pretrain", "data4_seq2"),
  ("pretrain", "slices2_fsdp2_tensor2"),
  ("sft", "fsdp4_tensor2"),
  ("lora", "data2_fsdp2_tensor2"),
  ("vae", "data2_fsdp2_seq2"),
}


def cases(kinds, fast):
  """Every pair of a kind and a mesh; those beyond `fast` are slow."""
  for kind in kinds:
    # The recipe takes a minute and a half; one mesh has to do.
    for name in MESHES if kind != "vae_recipe" else ("data2_fsdp2_tensor2",):
      slow = () if (kind, name) in fast else (pytest.mark.slow,)
      yield pytest.param(kind, name, marks=slow)


@pytest.mark.parametrize("stage, name", cases(STAGES, FAST))
def test_a_step_of_a_stage(stage, name, on_one, base, tmp_path):
  found = train_step(stage, mesh_of(name), base, str(tmp_path))
  assert_same_step(found, on_one(stage))


def forward(models, params, mesh):
  """Velocity with the prefix recomputed, and from its cache."""
  conditioner = models.conditioner
  hosts = [
    conditioner.host(s["caption"], s["references"], (SIDE, SIDE))
    for s in samples(True)
  ]
  batch = sharding.put_batch(stack(hosts), mesh)
  cond = jax.jit(conditioner.encode)(models.frozen, batch)
  tokens = cond.layout.target_positions_BN3.shape[1]
  x = tiny_models.noise(models.module.config, BATCH, (tokens, 1))
  sigma = np.linspace(0.1, 0.9, BATCH, dtype=np.float32)
  x, sigma = sharding.put_batch((np.asarray(x), sigma), mesh)
  variables = {"params": params}

  @jax.jit
  def both(variables, x, sigma, cond):
    apply = models.module.apply
    cache = apply(variables, cond, method="prefix_cache")
    cached = apply(variables, x, sigma, cache, cond.layout, method="decode")
    return apply(variables, x, sigma, cond), cached

  return both(variables, x, sigma, cond)


def sampler(models, params, mesh):
  """Images of edits in three steps with guidance."""
  del mesh
  requests = [
    Request(s["caption"], s["references"], SIDE, SIDE, seed=i, negative="blue")
    for i, s in enumerate(samples(True))
  ]
  generator = Generator(models.module, models.conditioner)
  sampling = SamplingConfig(steps=3, guidance=2.0, batch_size=BATCH)
  return generator(params, models.frozen, requests, sampling)


WORKS = {"forward": forward, "sampler": sampler}


def work_on(kind: str, mesh):
  """What a mesh makes of the forward pass or of sampling, as numpy arrays."""
  with jax.set_mesh(mesh):
    models = frozen.load(config_of("pretrain", ""), "", mesh)
    init = functools.partial(mmdit.init_params, models.module)
    params = random_params(init)
    places = sharding.tree_shardings(params, mmdit.SHARDING_RULES, mesh)
    made = WORKS[kind](models, jax.device_put(params, places), mesh)
    return [np.asarray(x) for x in jax.device_get(made)]


work_on_one = functools.cache(lambda kind: work_on(kind, mesh_of("one")))
FAST_WORK = {
  ("forward", "data2_fsdp2_seq2"), ("sampler", "data2_fsdp2_tensor2"),
}  # fmt: skip


@pytest.mark.parametrize("kind, name", cases(WORKS, FAST_WORK))
def test_the_model_and_the_sampler(kind, name):
  found, wanted = work_on(kind, mesh_of(name)), work_on_one(kind)
  for a, b in zip(found, wanted, strict=True):
    assert tiny_models.relative(a, b) <= OUTPUTS
  if kind == "forward":
    assert tiny_models.relative(found[1], found[0]) <= OUTPUTS


@pytest.mark.parametrize("stage", ["pretrain", "lora", "vae"])
def test_a_missing_or_wrong_rule_names_the_parameter(stage, base, tmp_path):
  mesh = mesh_of("fsdp4_tensor2")
  config = config_of(stage, base)
  task = TASKS[config.objective](config, str(tmp_path), mesh)
  abstract = jax.eval_shape(lambda: task.start(task.init(jax.random.key(0))))
  names = [
    sharding.path_name(path)
    for path, x in jax.tree_util.tree_leaves_with_path(abstract.params)
  ]  # fmt: skip
  used = 0
  for i, (pattern, _) in enumerate(task.rules):
    before, after = task.rules[:i], task.rules[i + 1 :]
    mine = [
      n for n in names
      if re.fullmatch(pattern, n)
      and not any(re.fullmatch(p, n) for p, _ in (*before, *after))
    ]  # fmt: skip
    if not mine:
      continue
    used += 1
    named = "|".join(re.escape(n) for n in mine)
    with pytest.raises(InputError, match=rf"no .* rule .* \S*({named}) "):
      sharding.tree_shardings(abstract, (*before, *after), mesh)
    for axes in (("model",), ("fsdp", "fsdp"), (None,) * 9):
      rules = (*before, (pattern, axes), *after)
      with pytest.raises(InputError, match=rf"parameter \S*({named}) "):
        sharding.tree_shardings(abstract, rules, mesh)
  assert used
