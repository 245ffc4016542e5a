# SPDX-License-Identifier: Apache-2.0
"""Eight devices compute what one computes: loss, gradients, train step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from qi2_jax.flow.schedules import ShiftConfig
from qi2_jax.models import mmdit, vae
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import state, steps

BATCH, TARGET = 8, (4, 4)
MESHES = {
  "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
  "fsdp8": {"fsdp": 8},
  # The VAE's 2 latent rows: with one row a shard of a 3x3 convolution, XLA
  # (jaxlib 0.10) multiplies gradients by the number of data shards.
  "data4_seq2": {"data": 4, "seq": 2},
  "data2_seq4": {"data": 2, "seq": 4},
}
KEY = jax.random.key(3)


def flow_problem():
  """Loss, parameters, rules and a batch with one reference per sample."""
  config = tiny_models.MMDIT
  model = mmdit.MMDiT(config)
  cond = tiny_models.conditioning(
    config, words=(1, 4, 2, 6, 3, 5, 1, 2), references=((4, 2),),
    target=TARGET, length=12,
  )  # fmt: skip
  batch = {
    "latents_BNZ": tiny_models.noise(config, BATCH, TARGET, seed=4),
    "condition": cond,
  }
  loss = steps.flow_matching_loss(
    model, logit_mean=0.0, logit_std=1.0, shift=ShiftConfig()
  )
  params = tiny_models.mmdit_params(model)
  return loss, params, mmdit.SHARDING_RULES, batch


def vae_problem():
  """The same for the VAE; its loss needs images in [-1, 1]."""
  model = vae.VAE(tiny_models.VAE)
  image = jnp.tanh(tiny_models.noise(tiny_models.MMDIT, BATCH, (32, 12)))
  image = image.reshape(BATCH, 32, 32, 3)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
  loss = steps.vae_loss_fn(model, smoothing=0.3)
  return loss, tiny_models.randomise(ones), vae.SHARDING_RULES, {"image": image}


PROBLEMS = {"flow": flow_problem, "vae": vae_problem}


def run(problem, spec):
  """One train step on a mesh: state and metrics as numpy arrays.

  Adam's epsilon is large: with the default the first update is the sign of
  the gradient, and the sign of a rounding error is not reproducible.
  """
  loss, params, rules, batch = problem
  devices = jax.devices()[: 8 if spec else 1]
  mesh = create_mesh(spec, devices)
  optimizer = optax.adamw(1e-2, eps=1e-3)
  whole = state.create(params, optimizer)
  shardings = sharding.tree_shardings(whole, rules, mesh)
  whole = jax.device_put(whole, shardings)
  batch = sharding.put_batch(jax.tree.map(np.asarray, batch), mesh)
  step = steps.make_step(loss, optimizer, ema_decay=0.9)
  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(step, out_shardings=(shardings, None))
      .lower(whole, batch, KEY)
      .compile()
    )
    new, metrics = jax.device_get(compiled(whole, batch, KEY))
  text = compiled.as_text()
  collective = any(
    op in text for op in ("all-reduce", "all-gather", "reduce-scatter")
  )
  assert collective == bool(spec)
  return new, metrics


@pytest.fixture(scope="module", params=PROBLEMS)
def problem(request):
  made = PROBLEMS[request.param]()
  return made, run(made, {})


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(name, problem):
  made, (new, metrics) = problem
  new_8, metrics_8 = run(made, MESHES[name])
  assert abs(metrics_8["loss"] / metrics["loss"] - 1) <= 1e-5
  for key, value in metrics.items():
    assert abs(metrics_8[key] / value - 1) <= 1e-4, key
  # After one step Adam's first moment is a tenth of the gradient.
  assert {"mu", "nu"} <= set(new.opt_state[0]._fields)
  for (path, leaf_8), leaf in zip(
    jax.tree_util.tree_leaves_with_path(new_8), jax.tree.leaves(new)
  ):
    assert tiny_models.relative(leaf_8, leaf) <= 1e-4, path
