# SPDX-License-Identifier: Apache-2.0
"""The six stages of the report as configs of the offline pipeline."""

import pytest

from data_pipelines.engine.config import parse
from data_pipelines.filters import decide, standins
from experiments import common, data

STAGES = ("stage1", "stage2", "stage3", "stage4", "stage5", "stage6")
# Section 2.3, Stage 1, in its order; deduplication has three parts here.
REPORT = (
  "broken", "resolution", "exact_duplicate", "perceptual_duplicate",
  "embedding_duplicate", "nsfw", "rotation", "entropy", "alignment",
  "token_length",
)  # fmt: skip


def stage(name):
  return parse(data.get_config(name).to_dict())


@pytest.mark.parametrize("name", (*STAGES, "tiny"))
def test_every_variant_can_run(name):
  config = stage(name)
  assert config.name == name
  provided = {
    column
    for options in config.score.values()
    for stand_in in options["stand_ins"]
    for column in standins.COLUMNS[stand_in]
  }
  wanted = decide.score_columns(config.filters, config.filter_order)
  assert wanted <= provided
  assert set(config.filters) == set(config.filter_order)
  assert f"    {name} " in data.__doc__


def test_filters_are_those_of_the_report():
  assert stage("stage1").filter_order == REPORT
  before = ()
  for name in STAGES:  # a stage only adds
    order = stage(name).filter_order
    assert order[: len(before)] == before
    before = order
  added = {"resolution", "quality", "aesthetic", "compression"}
  assert added <= set(stage("stage4").filter_order)
  assert not added & (set(stage("stage3").filter_order) - {"resolution"})
  assert stage("stage6").filter_order[-1] == "distribution"


def test_resolutions_grow():
  sides = {
    "stage1": (256,), "stage2": (256,), "stage3": (512,),
    "stage4": (1024, 512), "stage5": (2048, 1024, 512),
    "stage6": (2048, 1024, 512),
  }  # fmt: skip
  for name, expected in sides.items():
    assert [
      tuple(map(tuple, buckets)) for buckets in stage(name).resolutions
    ] == [common.BUCKETS[side] for side in expected]


def test_the_last_stage_is_stricter():
  """Every threshold of stage 5 still holds, and some are higher."""
  five, six = stage("stage5").filters, stage("stage6").filters
  stricter = 0
  for name, options in five.items():
    for option, limit in options.items():
      new = six[name][option]
      if option.startswith("min_"):
        assert new >= limit
        stricter += new > limit
      elif option.startswith("max_"):
        assert new <= limit
        stricter += new < limit
      else:
        assert new == limit
  assert stricter >= 5


def test_variants_share_no_state():
  first = data.get_config("stage4")
  first.filters.quality.min_quality = 9.0
  first.buckets.px512 = ((8, 8),)
  assert data.get_config("stage4").filters.quality.min_quality < 1
  assert data.get_config("stage3").buckets.px512 == common.BUCKETS[512]
