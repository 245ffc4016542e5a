# SPDX-License-Identifier: Apache-2.0
"""The tiny recipe as its commands run it reaches what its docstring says.

LPIPS and DINOv2 are random stand-ins, the images rendered shapes.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from data_pipelines.shapes.generate import Options, generate

ROOT = pathlib.Path(__file__).parents[2]


def run(module: str, *arguments: str) -> None:
  # The tests' XLA flags would make the training several times slower.
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  subprocess.run(
    [sys.executable, "-m", module, *arguments], cwd=ROOT, env=env, check=True
  )


@pytest.mark.slow
def test_held_out_images_reach_26_db_and_ssim_of_0_9(tmp_path):
  workdir, data, out = (str(tmp_path / n) for n in ("run", "data", "scores"))
  options = Options(t2i=400, edits=0, sizes=((64, 64),), split="held_out")
  generate(data, options, workers=1)
  config = "--config=experiments/{}".format
  run("qi2_jax.train", config("vae.py:tiny"), f"--workdir={workdir}")
  run("qi2_jax.evaluate", config("evaluate.py:vae"), f"--model={workdir}",
      f"--data={data}", f"--out={out}", "--config.untrained=True")  # fmt: skip
  results = json.loads(pathlib.Path(out, "results.json").read_text())
  mean = {
    name: {k: v["mean"] for k, v in model["figures"].items()}
    for name, model in results["models"].items()
  }
  assert mean["run"]["psnr"] >= 26 and mean["run"]["ssim"] >= 0.9
  assert mean["untrained"]["psnr"] < 15 and mean["untrained"]["ssim"] < 0.2
