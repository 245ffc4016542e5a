# SPDX-License-Identifier: Apache-2.0
"""Planning Flow-GRPO: the programs are those of a run, and bad input."""

import jax
import numpy as np
import pytest

from experiments import flow_grpo
from qi2_jax import aot
from qi2_jax.errors import InputError
from qi2_jax.parallel import hlo, hlo_costs, sharding
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import (
  frozen,
  grpo_plan,
  grpo_task,
  prompts,
  rollout,
  rollout_encode,
  rollout_rewards,
)


def small(**fields):
  """16 of 32 prompts, 4 images of each; a LoRA."""
  config = flow_grpo.get_config("smoke")
  config.init, config.lora.rank, config.model.remat = "ANY", 4, "full"
  config.data.batch_size, config.rl.candidates, config.rl.parts = 32, 2, 2
  config.rl.steps, config.rl.window_high = 6, 5
  config.rewards.use = ("rules",)
  config.mesh.update({"data": 2, "fsdp": 2, "seq": 1, "tensor": 2})
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


@pytest.mark.parametrize("references", [0, 1])
def test_planned_features_are_those_of_a_rollout(tmp_path, references):
  """From prompts as the loader brings them, part by part, to the update."""
  config = small(**{"rl.kl_weight": 0.1})
  mesh = create_mesh(config.mesh.to_dict())
  run = grpo_plan._Run(config, mesh, references)
  models = frozen.load(config, str(tmp_path), mesh)
  channels = models.vae.config.image_channels
  image = np.zeros((64, 64, channels), np.uint8)
  sample = {
    "image": image, "references": (image,) * references, "caption": "a ball",
    "kind": "single",
  }  # fmt: skip
  host = rollout_encode.transform(models.conditioner)(
    sample, np.random.default_rng(0)
  )
  part = jax.tree.map(lambda x: np.stack([x] * 8), host)
  found = jax.eval_shape(prompts.encoder(models), part)
  pair, condition, negative, key = run.arguments(8)
  assert shapes(found["condition"]) == shapes(condition)
  assert shapes(found["negative"]) == shapes(negative)

  def rows(*arguments):
    own = rollout.features(*run.sample(*arguments))
    return rollout_encode._joined([own, own], run.how.group)

  with jax.set_mesh(mesh):
    rows = jax.eval_shape(rows, pair, found["condition"], found["negative"],
                          key)  # fmt: skip
    means = grpo_task._reference_means
    rows["reference_BWNZ"] = jax.eval_shape(
      lambda p, r: means(p, r, how=run.how, module=run.module), run.base, rows
    )
  judge = rollout_rewards.Judge(
    config.rewards, {"rules": lambda *_: {"rules": np.arange(64.0)}}
  )
  judged, log = judge.advantages({"rules": np.arange(64.0)}, ["single"] * 16, 4)
  rows |= judged | {"log": log}
  placed = run.features()
  base = placed.pop("frozen")
  assert jax.tree.leaves(base)[0].shape == jax.tree.leaves(run.base)[0].shape
  assert placed.keys() == rows.keys()
  assert placed["log"].keys() == log.keys()
  for name in rows.keys() - {"log", "advantage_B", "weight_B"}:
    assert shapes(placed[name]) == shapes(rows[name]), name
  assert placed["advantage_B"].shape == rows["advantage_B"].shape == (64,)
  by_batch = sharding.batch_sharding(mesh)
  assert {x.sharding for x in jax.tree.leaves(placed)} == {by_batch}


@pytest.mark.slow
def test_programs_and_formulas_agree():
  """Compiled for CPUs; the window makes two loops of unknown length."""
  config = small(**{"optimizer.accumulate": 2})
  mesh = create_mesh(config.mesh.to_dict())
  for lower, loops in (
    (grpo_plan.lower_rollout, 2), (grpo_plan.lower_step, 0),
  ):  # fmt: skip
    lowered, facts = lower(config, mesh, platforms=("cpu",))
    assert facts["global_batch"] == 64 and facts["prompts"] == 16
    text = lowered.compile().as_text()
    module = hlo.parse(text, facts.get("unknown_trips", 1))
    assert len(module.unknown_loops) == loops
    found = hlo_costs.products(module).flops * mesh.size
    # An update watches the drift of 16 of 128 rows, forward only.
    assert found == pytest.approx(facts["analytic_flops_per_step"], rel=0.1)


def test_facts_are_those_of_the_config():
  config = small()
  mesh = create_mesh(config.mesh.to_dict())
  run = grpo_plan._Run(config, mesh, 0)
  facts = run.facts()
  assert facts["parameters"] > 20 * facts["trained_parameters"]
  assert facts["trained_parameters"] == run.factors
  # Images are what a microbatch is made of.
  split = aot.with_batch_per_chip(config, 4, 8)
  assert split.optimizer.accumulate == 2
  with pytest.raises(InputError, match="a batch of 64 does not divide"):
    aot.with_batch_per_chip(config, 3, 8)


def test_bad_input_is_named():
  mesh = create_mesh({"data": 2, "fsdp": 2, "seq": 1, "tensor": 2})
  with pytest.raises(InputError, match="must split into"):
    grpo_plan.lower_rollout(small(**{"rl.parts": 3}), mesh)
  with pytest.raises(InputError, match="needs a model"):
    grpo_plan.lower_step(small(init=""), mesh)
  with pytest.raises(InputError, match="ranks by the time"):
    aot.search(small(), "v5e:2x4", jax.devices())
