# SPDX-License-Identifier: Apache-2.0
"""Stage configs against Table 2 of the Qwen-Image-2.0 report."""

import json

import pytest
from ml_collections.config_flags import config_path

from experiments import common, continual, pretrain, sft

K = 1024
# Steps, T2I share, learning rate, and batch by resolution (Table 2).
TABLE_2 = {
  pretrain: (700_000, 0.9, 1e-4, {256: 32 * K, 512: 16 * K}),
  continual: (250_000, 0.7, 2e-5, {512: 16 * K, 1024: 8 * K, 2048: 4 * K}),
  sft: (10_000, 0.7, 1e-5, {512: 16 * K, 1024: 8 * K, 2048: 4 * K}),
}


@pytest.mark.parametrize("stage", TABLE_2, ids=lambda m: m.__name__)
def test_full_variants_are_table_2(stage):
  num_steps, t2i, rate, batches = TABLE_2[stage]
  for side, batch in batches.items():
    config = stage.get_config(str(side))
    assert config.num_steps == num_steps
    assert config.data.batch_size == batch
    assert config.data.t2i == t2i
    assert config.data.t2i + config.data.ti2i == pytest.approx(1.0)
    assert config.data.caption_dropout == 0.1
    assert config.data.reference_dropout == 0.0
    assert config.optimizer.learning_rate == rate
    assert config.optimizer.weight_decay == 0.001
    assert config.optimizer.clip_norm == 1.0
    assert config.optimizer.schedule == "constant"
    assert config.optimizer.accumulate == 1
    assert config.lora.rank == 0
    assert (side, side) == tuple(config.data.buckets[0])
    assert json.loads(json.dumps(config.to_dict()))
  others = {"256", "512", "1024", "2048"} - {str(side) for side in batches}
  for name in others | {"nonsense"}:
    with pytest.raises(ValueError, match="use one of"):
      stage.get_config(name)


@pytest.mark.parametrize("stage", TABLE_2, ids=lambda m: m.__name__)
def test_report_is_the_whole_stage(stage):
  num_steps, t2i, rate, batches = TABLE_2[stage]
  config = stage.get_config("report")
  assert config.num_steps == num_steps and config.data.t2i == t2i
  assert config.optimizer.learning_rate == rate
  resolutions = config.data.resolutions
  assert {
    name: (r.batch_size, tuple(r.buckets)) for name, r in resolutions.items()
  } == {f"px{side}": (b, common.BUCKETS[side]) for side, b in batches.items()}
  starts = [start for start, _ in config.data.schedule]
  assert starts[0] == 0 and starts == sorted(set(starts))
  assert starts[-1] < num_steps
  for _, shares in config.data.schedule:
    assert sum(shares.values()) == pytest.approx(1.0)
    assert set(shares) <= set(resolutions.keys())
  # The resolution never falls: the largest is there at the end.
  assert config.data.schedule[-1][1][f"px{max(batches)}"] > 0
  assert json.loads(json.dumps(config.to_dict()))["data"]["schedule"]
  plain = stage.get_config(str(max(batches)))
  for field in ("buckets", "batch_size"):
    assert config.data[field] == plain.data[field]


def test_overrides_reach_a_resolution_and_its_reference():
  config = pretrain.get_config("report")
  config_path.set_value("data.resolutions.px512.batch_size", config, 64)
  assert config.data.batch_size == 64
  config_path.set_value("data.buckets", config, ((512, 512),))
  assert config.data.resolutions.px512.buckets == ((512, 512),)
  config_path.set_value("data.resolutions.px256.batch_size", config, 128)
  assert config.data.batch_size == 64


@pytest.mark.parametrize("side", common.BUCKETS)
def test_buckets_fit_the_slots_and_cover_an_area(side):
  buckets = common.BUCKETS[side]
  assert len(set(buckets)) == len(buckets)
  for height, width in buckets:
    assert height % 32 == width % 32 == 0  # a slot of the encoder
    assert (width, height) in buckets
    assert height * width == pytest.approx(side * side, rel=0.06)


@pytest.mark.parametrize("stage", TABLE_2, ids=lambda m: m.__name__)
def test_tiny_fits_a_laptop_and_says_its_command(stage):
  config = stage.get_config("tiny")
  assert config.num_steps <= 40 and config.data.batch_size <= 16
  assert config.model.preset == config.vae.preset == "tiny"
  assert f"--config=experiments/{stage.__name__.split('.')[1]}.py" in (
    stage.__doc__
  )


def test_variants_share_no_state():
  first = sft.get_config("lora")
  first.data.buckets = ((64, 64),)
  first.lora.rank = 1
  assert sft.get_config("lora").lora.rank == 32
  assert sft.get_config("512").lora.rank == 0
  pretrain.get_config("report").data.resolutions.px256.batch_size = 1
  assert pretrain.get_config("report").data.resolutions.px256.batch_size > 1
