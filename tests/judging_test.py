# SPDX-License-Identifier: Apache-2.0
"""`config.rewards` becomes rewards, or one sentence that says why not."""

import sys

import numpy as np
import pytest
from absl import logging

from experiments import flow_grpo, nft
from qi2_jax import judging
from qi2_jax.errors import InputError
from qi2_jax.interop import image_text
from qi2_jax.rewards.protocol import Prompt
from qi2_jax.training import rollout_rewards

MODELS = ("clip", "aesthetic", "ocr", "consistency")
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(4)]


def section(*use, **fields):
  made = flow_grpo.get_config("smoke").rewards
  made.use = use
  made.models.update_from_flattened_dict(
    {
      "clip.path": "random",
      "aesthetic.path": "random",
      "aesthetic.head": "random",
      "ocr.reader": "shapes",
      "consistency.path": "random",
    }
    | fields
  )
  return made


def test_all_are_there_and_say_that_they_mean_nothing(monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda text, *a: said.append(text))
  loads, load = [], image_text.load
  monkeypatch.setattr(
    image_text, "load", lambda path: loads.append(path) or load(path)
  )
  made = section("rules", *MODELS)
  found = rollout_rewards.scores(made, judging.rewards(made))
  assert set(found) == {"rules", *MODELS}
  # One model serves both that embed.
  assert loads == ["random"]
  for words in (
    "TINY MODEL WITH RANDOM WEIGHTS", "AESTHETIC HEAD HAS RANDOM",
    "DINOv2 RUNS WITH RANDOM", "not by an OCR engine",
  ):  # fmt: skip
    assert sum(words in text for text in said) == 1
  asked = [Prompt("the word CAT in red", "edit", IMAGES[1])] * 4
  source = IMAGES[1].copy()
  source[:10, :10] = 0
  sources = [(source,)] * 4
  for name in MODELS:
    (values,) = found[name](IMAGES, asked, sources).values()
    assert values.shape == (4,) and np.isfinite(values).all()
    assert name == "ocr" or len(set(values)) > 1


def test_unused_models_are_not_read():
  made = flow_grpo.get_config("smoke")
  found = judging.arguments(made)["rewards"]
  assert set(found) == set(rollout_rewards.BUILT_IN)
  for stage in (flow_grpo, nft):
    weights = stage.get_config("qwen_image_2_1").rewards.weights
    assert {*rollout_rewards.BUILT_IN, *MODELS} <= set(weights.default)


@pytest.mark.parametrize("use, fields, message", [
  ("beauty", {}, "names 'beauty'.*'aesthetic', 'background', 'clip'"),
  ("clip", {"clip.path": ""}, r"models\.clip\.path is empty"),
  ("clip", {"clip.path": "nowhere"}, "nowhere/config.json does not exist"),
  ("aesthetic", {"aesthetic.head": ""}, r"aesthetic\.head is empty"),
  ("aesthetic", {"aesthetic.head": "x.pth"}, r"x\.pth is no \.safetensors"),
  ("consistency", {"consistency.path": ""}, r"consistency\.path is empty"),
  ("ocr", {"ocr.reader": "none"}, "must not be 'none'"),
  ("ocr", {"ocr.reader": "eyes"}, r"models\.ocr\.reader='eyes'"),
])  # fmt: skip
def test_what_is_missing_is_named(use, fields, message):
  with pytest.raises(InputError, match=message):
    judging.rewards(section(use, **fields))


def test_a_missing_engine_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "rapidocr", None)
  made = section("ocr", **{"ocr.reader": "rapidocr"})
  with pytest.raises(InputError, match=r"ocr\.reader='rapidocr': .*install"):
    judging.rewards(made)
