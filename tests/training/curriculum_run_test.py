# SPDX-License-Identifier: Apache-2.0
"""A run over two resolutions: batches, programs, rates, resume, bad input."""

import json
import pathlib

import numpy as np
import pytest
import short_runs
from ml_collections import ConfigDict

from data_pipelines.loader.config import Phase, Resolution
from experiments import continual, pretrain, sft
from qi2_jax import train
from qi2_jax.errors import InputError
from qi2_jax.training import progress

pytestmark = pytest.mark.usefixtures("one_device")


def short(**fields):
  """`tiny_curriculum` in 9 steps: 4 at 32 px, then both resolutions."""
  config = pretrain.get_config("tiny_curriculum")
  config.data.schedule = ((0, {"px32": 1.0}), (4, {"px32": 2, "px64": 3}))
  config.data.resolutions.px32.batch_size = 8
  config.data.resolutions.px64.batch_size = 4
  config.data.resolutions.px64.buckets = ((64, 64),)
  config.data.rendered_t2i, config.data.rendered_edits = 40, 0
  config.num_steps = 9
  config.save_every = 3
  config.log_every = 1
  config.preview_every = 0
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


def watch(monkeypatch, killed_at=None):
  """Notes (start, shape) of every batch, images counted, and the step."""
  seen = {"shapes": [], "images": [], "step": None}
  iterate, add = train.Loader.iterate, progress.Meter.add
  jit_step = train.program.jit_step

  def watched(self, start_step=0):
    for i, batch in enumerate(iterate(self, start_step), start_step):
      if i == killed_at:
        raise short_runs.Killed
      seen["shapes"].append((batch["image"].shape, len(batch["references"])))
      yield batch

  def counted(self, images, work):
    seen["images"].append(images)
    return add(self, images, work)

  def jitted(*args):
    seen["step"] = jit_step(*args)
    return seen["step"]

  monkeypatch.setattr(train.Loader, "iterate", watched)
  monkeypatch.setattr(progress.Meter, "add", counted)
  monkeypatch.setattr(train.program, "jit_step", jitted)
  return seen


def losses(workdir: pathlib.Path):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def test_two_resolutions_train_and_resume_over_the_border(
  tmp_path, monkeypatch
):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  with monkeypatch.context() as patch:
    seen = watch(patch)
    assert train.train(short(), str(whole)) == 0
  sizes = [shape[0] for shape, _ in seen["shapes"]]
  assert sizes[:4] == [8] * 4 and set(sizes[4:]) == {4, 8}
  assert {shape[:3] for shape, _ in seen["shapes"]} == {
    (8, 32, 32),
    (4, 64, 64),
  }
  # Images per second counts the rows that really came.
  assert seen["images"] == sizes
  # One program per shape, batch size and number of references; no other.
  assert seen["step"]._cache_size() == len(set(seen["shapes"]))
  with monkeypatch.context() as patch:
    watch(patch, killed_at=5)
    with pytest.raises(short_runs.Killed):
      train.train(short(), str(broken))
  # Step 3 is saved, before the border; the rest is trained again.
  with monkeypatch.context() as patch:
    again = watch(patch)
    assert train.train(short(), str(broken)) == 0
  assert again["shapes"] == seen["shapes"][3:]
  expected, actual = short_runs.arrays(whole, 9), short_runs.arrays(broken, 9)
  assert expected.keys() == actual.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
  assert losses(broken) == losses(whole)


def test_previews_have_the_resolution_of_their_phase(tmp_path):
  config = short()
  paths = train.data_paths(config.data, str(tmp_path))
  data = train.loader_config(config.data, paths, str(tmp_path), 0)
  for step, side in ((0, 32), (3, 32), (4, 64), (8, 64)):
    samples = train.preview_samples(data, step)
    assert {s["image"].shape[:2] for s in samples} == {(side, side)}


def test_one_resolution_is_a_schedule_of_one_phase():
  config = pretrain.get_config("tiny")
  buckets = tuple(map(tuple, config.data.buckets))
  assert train.curriculum(config.data) == (
    {"px64": Resolution(buckets, 16)}, (Phase(0, {"px64": 1.0}),)
  )  # fmt: skip


@pytest.mark.parametrize("stage", [pretrain, continual, sft])
def test_the_report_variants_are_schedules(stage):
  config = stage.get_config("report")
  resolutions, schedule = train.curriculum(config.data)
  assert {name for phase in schedule for name in phase.shares} == set(
    resolutions
  )
  for name, resolution in resolutions.items():
    assert name == f"px{resolution.buckets[0][0]}"
    # One number of microbatches serves all of them on 64 chips.
    assert resolution.batch_size % (64 * 64) == 0
  # Restored from JSON, as a workdir stores it, it is the same.
  stored = ConfigDict(json.loads(json.dumps(config.data.to_dict())))
  assert train.curriculum(stored) == (resolutions, schedule)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"optimizer.accumulate": 8}, "batch of 4 cannot be split into 8"),
    ({"data.schedule": ()}, r"start at steps \[\]"),
    ({"data.schedule": ((0, 1.0),)}, r"config\.data\.schedule=.* cannot"),
    ({"data.schedule": ((0, {"px32": 1.0}),)}, r"\['px64'\] are in no phase"),
    ({"data.schedule": ((0, {"px99": 1.0}),)}, "'px99': 1.0"),
    ({"data.resolutions": {}}, r"'px32': 1\.0 from step 0"),
  ],
)
def test_bad_schedules_fail_before_data_is_rendered(fields, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    train.train(short(**fields), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_buckets_of_no_resolution_are_refused():
  # As in a config written by hand, without references between the fields.
  fields = pretrain.get_config("tiny_curriculum").to_dict()
  fields["data"]["batch_size"] = 99
  config = pretrain.get_config("tiny").copy_and_resolve_references()
  with config.unlocked():
    config.data = fields["data"]
  with pytest.raises(InputError, match="are those of no resolution"):
    train.curriculum(config.data)
