# SPDX-License-Identifier: Apache-2.0
"""The stage of distillation without a run: features, teachers, the best.

Whole runs are in `dmd_run_test`, the step in `dmd_step_test`.
"""

import json
import os
import pathlib
import types

import dmd_toy
import dmd_workdir
import jax
import numpy as np
import pytest
import tiny_models

from data_pipelines.shapes.prompts import is_held_out
from experiments import dmd as dmd_config
from qi2_jax.conditioning import encoder
from qi2_jax.conditioning.conditioner import stack
from qi2_jax.errors import InputError
from qi2_jax.models import mmdit
from qi2_jax.parallel import sharding
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.pipeline import Pipeline
from qi2_jax.training import (
  adapter,
  best,
  dmd_plan,
  dmd_task,
  dmd_views,
  frozen,
  program,
  prompts,
  steps,
  teachers,
  weights,
  workdir,
)

MODELS = types.SimpleNamespace(module=None, conditioner=None, frozen=None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return dmd_workdir.create(tmp_path_factory.mktemp("runs") / "dmd")


def test_only_a_better_value_replaces_the_best(run):
  """And the best is a workdir that samples like the run itself."""
  source = Pipeline.load(run)
  said = [
    best.keep(run, step, source.params, value)
    for step, value in ((10, 0.5), (20, 0.7), (20, 0.7), (30, float("nan")),
                        (40, 0.3))
  ]  # fmt: skip
  assert said == [True, False, False, False, True]
  folder = pathlib.Path(run, "best")
  assert os.listdir(folder / "checkpoints") == ["40"]
  text = (folder / "best.json").read_text()
  assert json.loads(text) == {"step": 40, "value": 0.3}
  kept = Pipeline.load(str(folder))
  for a, b in zip(*map(jax.tree.leaves, (kept.params, source.params))):
    np.testing.assert_array_equal(a, b)
  for pipeline in (kept, source):
    assert pipeline.sampling.sigmas == dmd_workdir.SIGMAS
    assert pipeline.sampling.shift is None and pipeline.sampling.guidance == 1
  with pytest.raises(InputError, match="its own 4 noise levels"):
    kept.sampling_with(steps=8)


def test_the_distance_is_that_of_samples_of_one_prompt():
  """With a made-up sampler: parameters are the mean of its images."""
  config = dmd_workdir.config()
  config.dmd.held_out_samples = 8
  asked = []

  def generator(mean, frozen, requests, how):
    asked.append((mean, how, [r.seed for r in requests]))
    return [
      np.float32(
        mean + 0.1 * np.random.default_rng(r.seed).normal(size=(64, 64, 4))
      )
      for r in requests
    ]

  views = dmd_views.Views(config, MODELS, 0.0)
  views._generator = generator
  near, far = views.distance(0.0), views.distance(0.5)
  assert abs(near) < 0.01 and far > 0.3
  assert views.distance(0.0) == near  # the noise is fixed
  (_, slow, theirs), (_, fast, ours), *_ = asked
  assert [a[0] for a in asked].count(0.0) == 3  # the teacher's are made once
  assert not set(ours) & set(theirs)
  assert slow.steps == 2 and slow.guidance == 3.0 and slow.sigmas is None
  assert fast.sigmas == dmd_workdir.SIGMAS and fast.guidance == 1.0


def test_a_preview_shows_references_two_teachers_and_the_student():
  asked = []

  def generator(params, frozen, requests, how):
    asked.append((params, how))
    return [np.full((64, 64, 4), params, np.float32) for _ in requests]

  views = dmd_views.Views(dmd_workdir.config(), MODELS, 0.5)
  views._generator = generator
  image = np.zeros((64, 64, 4), np.uint8)
  samples = [
    {"caption": "a cat", "image": image, "references": ()},
    {"caption": "blue", "image": image, "references": (image + 255,)},
  ]
  for _ in range(2):
    grid = views.preview(-1.0, samples)["samples"]
  assert grid.shape == (4 * 68, 2 * 68, 3)
  teacher, student = (0.5, [2, 4]), (-1.0, [4, 4])
  for params, steps_ in (teacher, student):
    assert [how.steps for p, how in asked if p == params] == steps_


def test_a_changed_teacher_is_noticed(run, tmp_path):
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  record = tmp_path / "teachers.json"
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    Pipeline.load(run).params,
  )
  (tmp_path / "new").mkdir()
  (params,) = teachers.load([run], str(tmp_path / "new"), placed)
  text = (tmp_path / "new" / "teachers.json").read_text()
  (row,) = json.loads(text)
  assert row["path"] == run and row["step"] == 1
  assert row["checksum"] == weights.checksum(params)
  record.write_text(text)
  teachers.load([run], str(tmp_path), placed)
  with pytest.raises(InputError, match="began with 1 teachers, not 2"):
    teachers.load([run, run], str(tmp_path), placed)
  record.write_text(json.dumps([row | {"checksum": row["checksum"] ^ 1}]))
  with pytest.raises(InputError, match="other weights"):
    teachers.load([run], str(tmp_path), placed)
  record.write_text("{}x")
  with pytest.raises(InputError, match="cannot be read"):
    teachers.load([run], str(tmp_path), placed)


def test_a_sample_brings_its_empty_prompt_and_category(run):
  """Pixels of the target do not matter; those of the reference do."""
  loaded = workdir.load(run)
  models = frozen.Models(
    loaded.model, loaded.conditioner, loaded.conditioner.vae, loaded.frozen
  )
  transform = prompts.transform(models.conditioner)
  encode = prompts.encoder(models)
  rng = np.random.default_rng(0)
  reference = rng.integers(0, 256, (64, 64, 4), np.uint8)

  def features(*captions, references=(reference,), target=0):
    samples = [
      {
        "caption": caption, "references": references,
        "image": np.full((64, 64, 4), target, np.uint8),
      }
      for caption in captions
    ]  # fmt: skip
    return encode(stack([transform(sample, rng) for sample in samples]))

  edits = features("make it red", "")
  assert list(edits["category_B"]) == [1, 1]
  assert list(features("a cat", references=())["category_B"]) == [0]
  empty = jax.tree.map(lambda x: x[1:], edits["condition"])
  negative = jax.tree.map(lambda x: x[:1], edits["negative"])
  for a, b in zip(*map(jax.tree.leaves, (empty, negative)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  text = edits["condition"].text_BTC
  assert np.abs(text[0] - text[1]).max() > 1e-3
  other = features("make it red", "", target=9)
  for a, b in zip(*map(jax.tree.leaves, (edits, other)), strict=True):
    np.testing.assert_array_equal(a, b)
  other = features("make it red", "", references=(reference[::-1],))
  gap = other["condition"].references_BRZ - edits["condition"].references_BRZ
  assert np.abs(gap).max() > 1e-3


def test_cached_features_take_the_place_of_pixels(run):
  loaded = workdir.load(run)
  conditioner = loaded.conditioner
  models = frozen.Models(
    loaded.model, conditioner, conditioner.vae, loaded.frozen
  )
  transform = prompts.transform(conditioner)
  encode = prompts.encoder(models)
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (64, 64, 4), np.uint8)
  system = encoder.num_system_tokens(conditioner.encoder)

  def check(references):
    sample = {"caption": "make it red", "image": image}
    sample["references"] = references
    pixels = encode(stack([transform(sample, rng)]))
    counts = {}

    def condition(no_caption, no_references):
      assert not no_references
      part = pixels["negative" if no_caption else "condition"]
      caption = "" if no_caption else sample["caption"]
      made = conditioner.host(caption, references, (64, 64))
      counts[no_caption] = count = int(made["ids_valid"].sum()) - system
      latents = [np.asarray(part.references_BRZ[0])] if references else []
      return np.asarray(part.text_BTC[0, :count]), latents

    cached_sample = {
      "id": "x", "caption": sample["caption"], "size": (64, 64),
      "reference_sizes": ((64, 64),) * len(references),
      "latents": np.zeros((16, 64), np.float32), "condition": condition,
    }  # fmt: skip
    made = encode(stack([transform(cached_sample, rng)]))
    assert made["category_B"] == pixels["category_B"]
    for name, no_caption in (("condition", False), ("negative", True)):
      ours, theirs = made[name], pixels[name]
      count = counts[no_caption]
      np.testing.assert_array_equal(
        ours.text_BTC[:, :count], theirs.text_BTC[:, :count]
      )
      np.testing.assert_array_equal(ours.references_BRZ, theirs.references_BRZ)
      for a, b in zip(*map(jax.tree.leaves, (ours.layout, theirs.layout))):
        np.testing.assert_array_equal(a, b)
    assert counts[False] > counts[True]

  check(())
  check((image,))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"init": ""}, "needs a teacher"),
    ({"optimizer.accumulate": 2}, "does not accumulate"),
    ({"data.batch_size": 5}, "does not split into 2 groups"),
    ({"dmd.ratio": 0}, "ratio=0 must be at least 1"),
    ({"dmd.sigmas": (0.9, 0.5)}, "must fall from 1"),
    ({"dmd.sigmas": (1.0, 0.5, 0.5)}, "must fall from 1"),
    ({"dmd.sigmas": ()}, "must fall from 1"),
    ({"dmd.step_weights": (1.0, 2.0)}, "one number above 0 for each of the 4"),
    ({"dmd.step_weights": (1.0, 1.0, 1.0, 0.0)}, "one number above 0"),
    ({"dmd.weight": "none"}, "dmd.weight='none' is unknown"),
    ({"dmd.sampler": "heun"}, "dmd.sampler='heun' is unknown"),
    ({"dmd.held_out_samples": 1}, "must be at least 2"),
    ({"dmd.times.kind": "beta"}, "kind='beta' is unknown"),
    ({"dmd.teachers": ("a", "b")}, "teacher_weights must have the shape"),
  ],
)
def test_bad_configs_are_refused_before_anything_is_read(
  fields, message, tmp_path
):
  mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1})
  config = dmd_workdir.config(**fields)
  with pytest.raises(InputError, match=message):
    dmd_task.dmd_task(config, str(tmp_path), mesh)
  assert not list(tmp_path.iterdir())


MODEL = mmdit.MMDiT(tiny_models.MMDIT)
TARGET = (2, 2)
LORA = {
  "data.batch_size": 16, "lora.rank": 2, "optimizer.learning_rate": 0.01,
}  # fmt: skip


def rows(size):
  def conditioning(words):
    return tiny_models.conditioning(
      tiny_models.MMDIT, words=words, references=((2, 2),), target=TARGET,
      length=12,
    )  # fmt: skip

  return {
    "condition": conditioning(tuple(1 + i % 5 for i in range(size))),
    "negative": conditioning((1,) * size),
    "category_B": np.arange(size, dtype=np.int32) % 2,
  }


def sharded_step(spec, count):
  """A step of a LoRA student on a mesh, and what came out."""
  config = dmd_workdir.config(**LORA)
  lora_config = adapter.from_config(config)
  mesh = create_mesh(dict(spec), jax.devices()[:count])
  start, step = dmd_task.training(config, MODEL, lora_config)
  teacher = tiny_models.mmdit_params(MODEL)
  state = start(adapter.trained(MODEL, lora_config)(jax.random.key(1)))
  places = sharding.tree_shardings(state, dmd_task.rules(lora_config), mesh)
  whole = sharding.tree_shardings(teacher, mmdit.SHARDING_RULES, mesh)
  params = jax.device_put(teacher, whole)
  features = sharding.put_batch(jax.tree.map(np.asarray, rows(16)), mesh)
  features[steps.FROZEN] = {"teachers": [params], "base": params}
  with jax.set_mesh(mesh):
    jitted = program.jit_step(step, places, mesh)
    state = jax.device_put(state, places)
    return jax.device_get(jitted(state, features, jax.random.key(3)))


def test_four_devices_make_the_step_of_one():
  one = sharded_step({"data": 1}, 1)
  other = sharded_step({"fsdp": 2, "tensor": 2}, 4)
  for name, value in one[1].items():
    assert other[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
  for part in ("params", "fake"):
    trees = (getattr(state, part) for state in (one[0], other[0]))
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
      # Adam without memory divides by the size of the gradient itself, so
      # where that is rounding error the sign is too.
      close = np.isclose(a, b, rtol=1e-3, atol=1e-5)
      assert close.mean() > 0.98


def test_the_plan_is_lowered_for_a_pod_without_weights():
  config = dmd_workdir.config(**LORA)
  config.data.buckets = ((32, 32),)
  mesh = create_mesh({"data": 2, "fsdp": 4})
  lowered, facts = dmd_plan.lower_step(config, mesh, references=1)
  # Scans over fake updates and layers, loops over the student's steps.
  assert lowered.as_text().count("stablehlo.while") >= 4
  assert facts["batch_per_update"] == 8 and facts["teachers"] == 1
  assert facts["trained_parameters"] < 0.1 * facts["parameters"]


def test_held_out_prompts_are_held_out():
  config = dmd_config.get_config("tiny")
  assert len(set(config.dmd.held_out_prompts)) >= 12
  assert all(is_held_out(p) for p in config.dmd.held_out_prompts)


def test_energy_distance_tells_distributions_apart():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 400, 8, 2))
  assert abs(best.energy_distance(a, b)) < 0.01
  # Of two points each, written out.
  x, y = np.asarray([[0.0], [1.0]]), np.asarray([[3.0], [5.0]])
  assert best.energy_distance(x, y) == pytest.approx(2 * 3.5 - 1.0 - 2.0)
  assert best.energy_distance(a, b + 0.5) > 0.1
  assert best.energy_distance(a, 0.5 * b) > 0.1
  wide = np.concatenate([a, a], axis=1), np.concatenate([b, b], axis=1) + 0.5
  assert best.energy_distance(*wide) == pytest.approx(
    best.energy_distance(a, b + 0.5), rel=0.05
  )


def test_the_toy_config_is_complete():
  """`DmdConfig` has no defaults: the toy names every field of the stage."""
  made = dmd_task.settings(dmd_workdir.config())
  assert made.sigmas == dmd_toy.SIGMAS == dmd_workdir.SIGMAS
  assert made.teacher_weights_MKC.shape == (1, 4, 2)


@pytest.mark.parametrize("name", ["qwen_image_2_1", "qwen_image_2_1_lora"])
def test_full_variants_have_lightnings_numbers(name):
  """Those that its author has made known; the rest is ours."""
  config = dmd_config.get_config(name)
  config.init = "teacher"
  made = dmd_task.settings(config)
  assert made.sigmas == (1.0, 0.9, 0.75, 0.5) and made.ratio == 5
  assert config.data.batch_size == (made.ratio + 1) * 64
  for part in (config.optimizer, config.dmd.fake_optimizer):
    assert (part.b1, part.b2, part.weight_decay) == (0.0, 0.999, 0.01)
    assert part.clip_norm == 1.0
  assert config.dmd.fake_optimizer.learning_rate == 4e-7
  assert made.guidance == 4.0 and made.weight == "x0_norm"
  assert made.times.kind == "logit_normal" and not made.decoupled
  assert config.data.t2i == config.data.ti2i == 0.5
  if name.endswith("lora"):
    assert (config.lora.rank, config.lora.alpha) == (64, 8.0)
    assert config.optimizer.learning_rate == 5e-5
  else:
    assert config.lora.rank == 0
  assert json.loads(json.dumps(config.to_dict()))
  with pytest.raises(ValueError, match="use one of"):
    dmd_config.get_config("nonsense")
