# SPDX-License-Identifier: Apache-2.0
"""The demo's commands and its report, without training anything."""

import functools
import importlib
import json
import pathlib

import numpy as np
import pytest

from experiments import evaluate as evaluate_config
from qi2_jax import demo, evaluate
from qi2_jax.evaluation import store
from qi2_jax.phases import Journal
from tests.evaluation.evaluate_test import Fake


def _flag(arguments, name):
  found = [a for a in arguments if a.startswith(f"--{name}=")]
  return found[0].partition("=")[2] if found else None


@pytest.mark.parametrize(
  "data, pipeline", [(None, False), ("photos", False), (None, True)]
)
@pytest.mark.parametrize("quick", [False, True])
def test_every_command_names_what_exists(data, pipeline, quick):
  phases = demo.plan(pathlib.Path("w"), data, 0.1, quick, pipeline)
  assert [p.name for p in phases] == [
    "data", "vae", "pretrain", "sft", "evaluate",
  ]  # fmt: skip
  for phase in phases:
    flag, module, *arguments = phase.arguments
    assert flag == "-m" and importlib.util.find_spec(module)
    if config := _flag(arguments, "config"):
      path, _, variant = config.partition(":")
      name = path.removesuffix(".py").replace("/", ".")
      fields = importlib.import_module(name).get_config(variant)
      for argument in arguments:
        if argument.startswith("--config."):
          key = argument.partition("=")[0].removeprefix("--config.")
          # Raises KeyError for a field that does not exist.
          functools.reduce(
            lambda found, part: found[part], key.split("."), fields
          )


def _fake_workdir(folder):
  """What the phases leave behind, with made-up training curves."""
  phases = demo.plan(folder, None, 0.1, True)
  journal = Journal(folder / "phases.json", phases)
  for phase in phases:
    journal.add(phase, 10.0, finished=True)
  for stage in ("vae", "pretrain", "sft"):
    (folder / stage).mkdir()
    rows = [
      {
        "step": 10 * i,
        "loss": 1 / i,
        "images_per_second": 1.0 if i == 1 else 100.0,
        "data_wait_fraction": 0.0 if i == 1 else 0.02,
      }
      | ({"psnr": 20.0 + i} if stage == "vae" else {})
      for i in range(1, 6)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / stage / "metrics.jsonl").write_text(text + '{"step": 60, "lo')
    config = {"data": {"batch_size": 4}}
    (folder / stage / "config.json").write_text(json.dumps(config))
  config = evaluate_config.get_config("tiny")
  out = store.create(folder / "evaluation")
  fake = Fake({})
  results = evaluate.evaluate(fake, config, out)
  results |= {
    "notes": ["stand-in <encoder>"], "model": "m", "step": 1, "sampling": {},
    "versions": {"jax": "1"}, "machine": "box", "device": "cpu",
    "parameters": {"mmdit": 1_400_000, "vae": 600_000},
  }  # fmt: skip
  store.write_json(out / "results.json", results)
  return journal


def test_report_and_results_tell_all(tmp_path):
  journal = _fake_workdir(tmp_path)
  results = demo.collect(tmp_path, journal)
  assert results["seconds"]["total"] == 50.0
  training = results["training"]["sft"]
  assert training["steps"] == 50 and training["images_per_second"] == 100
  # The row with the compilation would have hidden the waiting.
  assert np.isclose(training["data_wait_fraction"], 0.02)
  assert results["t2i"]["position"].keys() >= {
    "seen", "held_out", "chance", "vae_ceiling", "n",
  }  # fmt: skip
  page = demo.write_report(tmp_path, results, 4).read_text()
  assert page.count("<svg") == 4  # three losses and the VAE's PSNR
  assert "stand-in &lt;encoder&gt;" in page
  for command in results["commands"].values():
    assert command in page
