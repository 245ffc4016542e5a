# SPDX-License-Identifier: Apache-2.0
"""Planning a step for a pod: same step as training, true numbers, bad input."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from experiments import continual, nft, pretrain
from qi2_jax import aot
from qi2_jax.errors import InputError
from qi2_jax.models import mmdit
from qi2_jax.models import vae as vae_model
from qi2_jax.parallel import chips, hlo, hlo_costs
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.parallel.sharding import batch_sharding
from qi2_jax.training import program
from qi2_jax.training.tasks import TASKS


def tiny(**fields):
  """The tiny pre-training with 16 samples of one shape per step."""
  config = pretrain.get_config("tiny")
  config.data.buckets = ((64, 64), (32, 32))
  config.mesh.update({"data": 1, "fsdp": -1})
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


def test_the_planned_step_is_the_step_that_trains(tmp_path):
  """Both lower to the same text, from real and from abstract arguments."""
  config = tiny(**{"optimizer.accumulate": 2})
  mesh = create_mesh(config.mesh.to_dict())
  with jax.set_mesh(mesh):
    task = TASKS["flow_matching"](config, str(tmp_path), mesh)
    train_state = program.abstract_state(
      task.init, task.start, task.rules, mesh
    )  # fmt: skip
    image = np.zeros((64, 64, 4), np.uint8)[..., : _channels(config)]
    sample = {"image": image, "references": (image,), "caption": "a ball"}
    host = task.transform(sample, np.random.default_rng(0))
    batch = jax.tree.map(
      lambda x: np.stack([x] * config.data.batch_size), host
    )  # fmt: skip
    features = jax.eval_shape(task.encode, train_state, batch)
    step = program.jit_step(
      task.step, program.shardings_of(train_state), mesh
    )  # fmt: skip
    features = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=batch_sharding(mesh)
      ),
      features,
    )
    key = jax.device_put(
      jax.random.key(0), jax.NamedSharding(mesh, jax.P())
    )  # fmt: skip
    trained = step.trace(train_state, features, key).lower(
      lowering_platforms=("tpu",)
    )
  planned, facts = program.lower_step(config, mesh, references=1)
  assert facts["bucket"] == [64, 64]
  assert planned.as_text() == trained.as_text()


def _channels(config) -> int:
  return vae_model.PRESETS[config.vae.preset].image_channels


def test_program_and_formula_agree_under_accumulation():
  """Compiled for CPUs: loops over layers inside a loop over microbatches."""
  config = tiny(**{"optimizer.accumulate": 2, "model.remat": "full"})
  mesh = create_mesh(config.mesh.to_dict())
  lowered, facts = program.lower_step(config, mesh, platforms=("cpu",))
  module = hlo.parse(lowered.compile().as_text())
  assert module.unknown_loops == ()
  found = hlo_costs.products(module).flops * mesh.size
  assert found == pytest.approx(facts["analytic_flops_per_step"], rel=0.05)


def test_roofline_of_made_up_work():
  chip = chips.Chip(100.0, 1.0, 10.0, 5.0)
  moved = {
    "all-gather": {"count": 1, "bytes": 30.0},
    "all-reduce": {"count": 1, "bytes": 10.0},
  }
  out = chips.roofline(chip, 400.0, 300.0, 20.0, moved)
  assert out["roofline_seconds"] == {"compute": 4.0, "hbm": 2.0, "links": 10.0}
  assert out["bound_by"] == "links"
  assert out["step_seconds_roofline"] == 10.0
  assert out["mfu_roofline"] == pytest.approx(300 / (10 * 100))
  assert out["mfu_serial"] == pytest.approx(300 / (16 * 100))


def test_microbatches_of_a_batch_per_chip():
  config = tiny()
  config.data.batch_size = 64
  split = aot.with_batch_per_chip(config, 2, 8)
  assert split.optimizer.accumulate == 4
  assert config.optimizer.accumulate == 1
  for bad in (3, 0, 16):
    with pytest.raises(InputError, match="microbatches of"):
      aot.with_batch_per_chip(config, bad, 8)
  # Chips of a seq axis share samples.
  assert aot.with_batch_per_chip(config, 0.25, 8).optimizer.accumulate == 32


def test_a_search_ranks_what_fits_and_survives_ctrl_c(monkeypatch):
  config = tiny()
  config.data.batch_size = 64
  tried = []

  def plan(config, topology, devices):
    size, remat = 64 / config.optimizer.accumulate / 8, config.model.remat
    tried.append((remat, size))
    if remat == "none":
      raise KeyboardInterrupt
    return {
      "fits": not (remat == "full" and size > 2),
      "mesh": config.mesh.to_dict(), "remat": remat, "batch_per_chip": size,
      "accumulate": config.optimizer.accumulate, "hbm_gib_per_chip": size,
      "hbm_limit_gib": 2.5, "bound_by": "compute", "mfu_roofline": 0.5,
      "step_seconds_roofline": 10 / size + (remat == "full"),
    }  # fmt: skip

  monkeypatch.setattr(aot, "plan", plan)
  ranked = aot.search(config, "v5e:2x4", jax.devices())
  # A row ends with the first that does not fit.
  full = [("full", 1), ("full", 2), ("full", 4)]
  dots = [("dots", 1), ("dots", 2), ("dots", 4), ("dots", 8)]
  assert tried == [*full, *dots, ("none", 1)]
  order = [(p["remat"], p["batch_per_chip"]) for p in ranked]
  assert order == [*dots[::-1][:2], ("dots", 2), ("full", 2),
                   ("dots", 1), ("full", 1)]  # fmt: skip


def test_bad_input_is_named():
  mesh_of = lambda spec: tiny(**{"mesh.fsdp": spec})  # noqa: E731
  with pytest.raises(InputError, match="v9x:4x4"):
    aot.topology_devices("v9x:4x4")
  with pytest.raises(InputError, match="does not fill 8 devices"):
    aot.plan(mesh_of(3), "v5e:2x4", jax.devices())
  config = tiny(**{"data.batch_size": 12})
  with pytest.raises(InputError, match="batch size 12 does not divide"):
    aot.plan(config, "v5e:2x4", jax.devices())
  with pytest.raises(InputError, match="objective='nft'"):
    aot.lower_fns(nft.get_config("tiny"))
  with pytest.raises(InputError, match="LoRA"):
    aot.lower_fns(tiny(**{"lora.rank": 4}))


def test_without_libtpu_the_remedy_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"\.\[aot\]"):
    aot.topology_devices("v5e:2x2")


@pytest.fixture(scope="module")
def libtpu():
  """Skips without the TPU compiler."""
  return pytest.importorskip("libtpu")


def test_unknown_shape(libtpu):
  with pytest.raises(InputError, match="v5e:3x5"):
    aot.topology_devices("v5e:3x5")


KEYS = {
  "hbm_gib_per_chip", "hbm_limit_gib", "hbm_parts", "flops_per_step",
  "analytic_flops_per_step", "compile_seconds", "collectives",
  "largest_buffer", "mfu_roofline", "step_seconds_roofline",
  "roofline_assumptions", "bound_by",
}  # fmt: skip


def test_the_tiny_step_compiles_for_a_tpu(libtpu):
  devices = aot.topology_devices("v5e:2x2")
  made = aot.plan(tiny(), "v5e:2x2", devices)
  assert made.keys() >= KEYS
  assert made["fits"] and made["unknown_loops"] == []
  ratio = made["flops_per_step"] / made["analytic_flops_per_step"]
  assert ratio == pytest.approx(1, abs=0.05)
  assert "of the analytic count" in aot.describe(made)
  json.dumps(made)


def test_a_step_that_does_not_fit_says_how_much_it_wants(libtpu):
  config = pretrain.get_config("512")
  config.data.batch_size = 4
  made = aot.plan(config, "v5e:2x2", aot.topology_devices("v5e:2x2"))
  assert not made["fits"]
  assert made["hbm_gib_per_chip"] > 15.75
  assert "does not fit" in aot.describe(made)


@pytest.mark.slow
def test_full_width_has_no_square_and_no_whole_gradient(libtpu, monkeypatch):
  """Two layers of full width on 64 chips: gradients go round in rings."""
  model = mmdit.PRESETS["qwen_image_2_1"]
  model = dataclasses.replace(model, num_layers=2)
  monkeypatch.setitem(mmdit.PRESETS, "qwen_image_2_1", model)
  config = continual.get_config("1024")
  config.data.batch_size = 64
  config.mesh.data = 2
  devices = aot.topology_devices("v5e:8x8")
  mesh = create_mesh(config.mesh.to_dict(), devices)
  # Tests multiply in fp32; the kernel's bf16 products cannot.
  with jax.default_matmul_precision("default"):
    lowered, facts = program.lower_step(config, mesh)
  assert facts["kernel"] == "splash"
  compiled, _ = aot.compile_step(lowered, mesh, production=False)
  module = hlo.parse(compiled.as_text())
  target = facts["tokens"]["target"]
  square = [
    str(array)
    for array in hlo_costs.largest_buffers(module, 200)
    if sum(d >= target for d in array.dims) > 1
    # Weights of 4096 x 12288 and 4096 x 16384 are no square of 4144 tokens.
    and not {4096, 12288, 16384} & set(array.dims)
  ]
  assert square == []
  moved = hlo_costs.collectives(module)
  gradients = 2 * facts["parameters"]
  assert moved["collective-permute"]["bytes"] > 0.5 * gradients
  assert moved["all-reduce"]["bytes"] < 0.1 * gradients


@pytest.mark.slow
@pytest.mark.parametrize(
  "topology, batch", [("v5p:4x4x4", 8), ("v5e:16x16", 4), ("v6e:16x16", 8)]
)
def test_the_full_step_fits_with_a_tenth_to_spare(libtpu, topology, batch):
  devices = aot.topology_devices(topology)
  config = aot.with_batch_per_chip(
    pretrain.get_config("512"), batch, len(devices)
  )
  made = aot.plan(config, topology, devices)
  assert made["parameters"] == 7_115_124_736
  assert made["hbm_gib_per_chip"] <= 0.9 * made["hbm_limit_gib"]
  ratio = made["flops_per_step"] / made["analytic_flops_per_step"]
  assert ratio == pytest.approx(1, abs=0.05)
