# SPDX-License-Identifier: Apache-2.0
"""Planning the VAE's step: it is the step that trains, and bad input."""

import jax
import jax.numpy as jnp
import pytest

from experiments import vae as experiment
from qi2_jax import aot
from qi2_jax.errors import InputError
from qi2_jax.models import lpips, vae
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import program, vae_plan, vae_task

SMALL = vae.VAEConfig(
  base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=(1, 2, 2),
  num_res_blocks=1, temporal_downsample=(False, True),
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
  monkeypatch.setitem(vae.PRESETS, "tiny", SMALL)


def small(variant="tiny", **fields):
  config = experiment.get_config(variant)
  config.data.buckets = ((32, 16), (32, 32))
  config.data.batch_size = 8
  config.lpips.widths = (4, 4, 4, 4, 4)
  config.dinov2.layer = 0
  config.mesh.update({"data": 2, "fsdp": 2, "seq": 2})
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


@pytest.mark.parametrize("variant, fields", [
  ("tiny", {"optimizer.accumulate": 2, "trainable": "middle"}),
  ("demo", {}),
])  # fmt: skip
def test_the_planned_step_is_the_step_that_trains(tmp_path, variant, fields):
  """Both lower to the same text, from real and from abstract arguments."""
  config = small(variant, **fields)
  mesh = create_mesh(config.mesh.to_dict())
  with jax.set_mesh(mesh):
    task = vae_task.vae_task(config, str(tmp_path), mesh)
    state = program.abstract_state(task.init, task.start, task.rules, mesh)
    rows = {"image": jnp.zeros((8, 32, 32, SMALL.image_channels), jnp.uint8)}
    features = task.encode(None, sharding.put_batch(rows, mesh))
    image, place = features["image"], sharding.batch_sharding(mesh)
    features["image"] = jax.ShapeDtypeStruct(
      image.shape, image.dtype, sharding=place
    )
  trained = program.lower(task.step, state, features, mesh)
  planned, facts = vae_plan.lower_step(config, mesh)
  assert facts["bucket"] == [32, 32]
  assert planned.as_text() == trained.as_text()


def test_facts_are_those_of_the_config():
  config = small(trainable="decoder", **{"optimizer.accumulate": 2})
  config.loss.align = ((0, 0.0),)
  mesh = create_mesh(config.mesh.to_dict())
  _, facts = vae_plan.lower_step(config, mesh)
  variables = jax.eval_shape(
    lambda: vae.init_variables(vae.VAE(SMALL), jax.random.key(0))
  )
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
  params = variables["params"]
  assert facts["parameters"] == count(params)
  assert facts["trained_parameters"] == count(params["decoder"]) + count(
    params["post_quant_conv"]
  )
  assert facts["batch_per_chip"] == 0.5
  net = lpips.LPIPS(lpips.LPIPSConfig(config.lpips.widths))
  perceptual = jax.eval_shape(lambda: lpips.init_params(net, jax.random.key(0)))
  assert facts["frozen_parameters"] == count(perceptual)


def test_bad_input_is_named():
  mesh = create_mesh({"data": 2, "fsdp": 2, "seq": 2})
  with pytest.raises(InputError, match="drop --references"):
    vae_plan.lower_step(small(), mesh, references=1)
  with pytest.raises(InputError, match="batch size 6 does not divide"):
    vae_plan.lower_step(small(**{"data.batch_size": 6}), mesh)
  with pytest.raises(InputError, match="20 rows do not divide"):
    vae_plan.lower_step(small(**{"data.buckets": ((20, 32),)}), mesh)
  with pytest.raises(InputError, match="layer 4 does not exist"):
    vae_plan.lower_step(small(**{"dinov2.layer": 4}), mesh)
  with pytest.raises(InputError, match="ranks by the time"):
    aot.search(small(), "v5e:2x4", jax.devices())


def test_the_tiny_step_compiles_for_a_tpu():
  pytest.importorskip("libtpu")
  config = small(**{"mesh.seq": 1})
  made = aot.plan(config, "v5e:2x2", aot.topology_devices("v5e:2x2"))
  assert made["fits"] and made["flops_per_step"] > 0
  assert "does not fit" not in aot.describe(made)


@pytest.mark.slow
def test_the_full_step_is_lowered_at_its_size():
  """256 px, the global batch of the config, for eight chips."""
  config = experiment.get_config("256")
  mesh = create_mesh(config.mesh.to_dict())
  _, facts = vae_plan.lower_step(config, mesh)
  assert facts["global_batch"] == 256 and facts["bucket"] == [256, 256]
  # The temporal kernels are no part of the training.
  million = 78.69 + 259.05 - 6.75
  assert facts["parameters"] / 1e6 == pytest.approx(million, abs=0.01)
  assert facts["trained_parameters"] == facts["parameters"]
  # VGG16's convolutions, and 17 of the 24 layers of DINOv2-L's 304 M.
  blocks = 17 * 12.6
  assert facts["frozen_parameters"] / 1e6 == pytest.approx(
    14.7 + blocks + 2.0, rel=0.02
  )
