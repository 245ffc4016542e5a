# SPDX-License-Identifier: Apache-2.0
"""Text lengths of a run: who counts, and what the transforms pad to."""

import collections
import itertools
import json
import pathlib

import numpy as np
import pytest
import short_runs

from data_pipelines import records
from data_pipelines.loader.config import LoaderConfig, Phase, Resolution
from data_pipelines.loader.loader import Loader
from experiments import common, pretrain
from qi2_jax import cache, captions, train
from qi2_jax.conditioning.encoder import num_image_tokens, num_system_tokens
from qi2_jax.errors import InputError
from qi2_jax.training import build, prompts
from qi2_jax.training.flow_task import flow_transform

LENGTHS = (12, 14, 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return short_runs.render(tmp_path_factory.mktemp("data") / "shapes", 96, 48)


@pytest.fixture(scope="module")
def conditioner():
  config = pretrain.get_config("tiny")
  return build.conditioner(config.text, build.new_vae(config.vae))[0]


@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize(
  "prompt", ["", "a red circle", "\n\n two\n lines ", "x " * 12, "<|im_start|>"]
)
def test_a_prompt_fits_exactly_into_its_length(conditioner, prompt, references):
  images = [np.zeros((64, 64, 3), np.uint8)] * references
  length = conditioner.prompt_length(prompt, references)
  slots = (4,) * references
  extra = num_image_tokens(conditioner.encoder, slots) if references else 0
  extra += num_system_tokens(conditioner.encoder)
  roomy = conditioner.host(prompt, images, (64, 64), length + 9)
  exact = conditioner.host(prompt, images, (64, 64), length)
  assert exact["ids_valid"].all()
  assert roomy["ids_valid"].sum() == len(exact["ids"]) == length + extra
  np.testing.assert_array_equal(roomy["ids"][: len(exact["ids"])], exact["ids"])
  if prompt == "x " * 12:
    cut = conditioner.host(prompt, images, (64, 64), length - 1)
    assert cut["ids"].tolist() != exact["ids"][:-1].tolist()
    assert cut["ids_valid"].sum() == length - 1 + extra


def test_the_lengths_of_a_config():
  config = common.base_config().text
  assert captions.lengths(config) == ()
  config.lengths = (64, 128, 512)
  assert captions.lengths(config) == (64, 128, 512)
  for bad in ((64, 128), (128, 64, 512), (64, 64, 512), (512, 1024)):
    config.lengths = bad
    with pytest.raises(InputError, match=r"rise to config\.text\.length"):
      captions.lengths(config)


def loader_of(path, conditioner, transform, **hosts):
  config = LoaderConfig(
    (path,), {"px64": Resolution(((64, 64),), 8)},
    (Phase(0, {"px64": 1.0}),), text_lengths=LENGTHS, repeat_small=True,
  )  # fmt: skip
  counter = captions.counter_of(conditioner)
  return Loader(config, transform, counter=counter, **hosts)


def test_batches_are_padded_to_the_length_of_their_program(data, conditioner):
  config = common.base_config().data
  config.caption_dropout = 0.5
  loader = loader_of(data, conditioner, flow_transform(conditioner, config))
  system = num_system_tokens(conditioner.encoder)
  dataset = records.open_dataset(data)
  lengths = collections.Counter()
  for step, batch in enumerate(itertools.islice(loader.iterate(), 40)):
    info, numbers = loader.peek(step)
    tags = num_image_tokens(
      conditioner.encoder, (4,) * len(batch["references"])
    )
    padded = batch["ids"].shape[1] - system - tags
    assert padded == info.text_length
    lengths[padded] += 1
    for row, number in enumerate(numbers.tolist()):
      record = dataset[number]
      whole = conditioner.prompt_length(record.caption, len(record.references))
      none = conditioner.prompt_length("", len(record.references))
      used = batch["ids_valid"][row].sum() - system - tags
      # Nothing is cut, and a dropped caption keeps its batch's shape.
      assert used in (min(whole, LENGTHS[-1]), none)
      assert whole <= padded or padded == LENGTHS[-1]
  loader.close()
  assert set(lengths) == set(LENGTHS)


def test_prompts_without_targets_keep_the_length_too(data, conditioner):
  loader = loader_of(data, conditioner, prompts.transform(conditioner))
  for step, batch in enumerate(itertools.islice(loader.iterate(), 12)):
    info, _ = loader.peek(step)
    shapes = {batch[name]["ids"].shape for name in ("prompt", "empty")}
    assert len(shapes) == 1
    expected = (
      info.text_length
      + num_system_tokens(conditioner.encoder)
      + num_image_tokens(conditioner.encoder, (4,) * len(info.key.references))
    )
    assert shapes.pop() == (8, expected)
  loader.close()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_and_its_cache_have_the_same_losses(data, tmp_path, caplog):
  fields = {
    "text.lengths": LENGTHS, "num_steps": 6, "log_every": 1, "save_every": 0,
    "data.t2i": 0.5, "data.ti2i": 0.5, "data.caption_dropout": 0.4,
    "data.repeat_small": True,
  }  # fmt: skip
  out, config = str(tmp_path / "cache"), short_runs.config
  cache.build_cache(config(pretrain, data, **fields), out, 4, "exact")
  losses = []
  for name, path in (("images", data), ("features", out)):
    workdir = tmp_path / name
    with caplog.at_level("INFO", "absl"):
      assert train.train(config(pretrain, path, **fields), str(workdir)) == 0
    lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
    losses.append([json.loads(line)["loss"] for line in lines])
  np.testing.assert_allclose(losses[0], losses[1], atol=1e-6)
  assert len(losses[0]) == 6
  # At the start of a run the number of programs is told.
  assert "each of 6 programs is compiled" in caplog.text
