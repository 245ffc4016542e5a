# SPDX-License-Identifier: Apache-2.0
"""The VAE's race with diffusers: same weights, peaks of separate processes."""

import json
import os

import benchmark_program
import numpy as np
import pytest

from qi2_jax.errors import InputError

pytest.importorskip("diffusers")
SIZE, BATCH = 32, 2


@pytest.fixture(scope="module")
def program():
  with (
    benchmark_program.loaded("diffusers_cases"),
    benchmark_program.loaded("vae_speed") as module,
  ):
    yield module


@pytest.fixture(scope="module")
def folder(program, tmp_path_factory):
  """A random VAE of factor 4 and a batch for it."""
  path = str(tmp_path_factory.mktemp("vae"))
  program.make_model(
    path, 12, dim_mult=[1, 2, 2], num_res_blocks=1,
    temperal_downsample=[False, True], scale_factor_spatial=4,
    scale_factor_temporal=2,
  )  # fmt: skip
  return path


@pytest.fixture(scope="module")
def result(program, folder):
  np.ones(2**27)  # A GiB, more than either side needs.
  return program.measure(folder, BATCH, SIZE, repeats=2)


def test_both_sides_do_the_same_work(result, folder):
  assert set(result.max_relative_error) == {"encode", "decode"}
  assert 0 < max(result.max_relative_error.values()) <= 1e-4
  images = np.load(os.path.join(folder, "ours_decode.npy"))
  assert images.shape == (BATCH, SIZE, SIZE, 4)
  latents = np.load(os.path.join(folder, "diffusers_encode.npy"))
  assert latents.shape == (BATCH, SIZE // 4, SIZE // 4, 64)


def test_times_and_peaks_are_of_each_side(program, result):
  held = program._peak_gib()
  for name in program.SIDES:
    for work in program.WORK:
      fastest = result.seconds[name][work]
      assert 0 < fastest <= result.medians[name][work]
    # Interpreter and libraries alone take more than 50 MiB.
    assert 0.05 < result.loaded_gib[name] <= result.peak_gib[name]
    # What this process once held is not counted.
    assert result.loaded_gib[name] < held


def test_the_table_shows_rates(program):
  made = program.Result(
    size=256, batch=4, seconds={
      "diffusers": {"encode": 2.0, "decode": 6.0},
      "ours": {"encode": 0.5, "decode": 1.5},
    }, medians={}, loaded_gib={"diffusers": 0.5, "ours": 0.25},
    peak_gib={"diffusers": 2.0, "ours": 1.0},
    max_relative_error={"encode": 1e-6, "decode": 2e-6},
  )  # fmt: skip
  _, _, theirs, ours = program.markdown([made]).splitlines()
  assert "| diffusers | 2 | 0.667 | 0.5 | 2.00 (0.50) | 2e-06 |" in theirs
  assert ours == "| 256 | 4 | ours | 8 | 2.67 | 2 | 1.00 (0.25) | 2e-06 |"


def test_other_outputs_are_no_race(program, tmp_path):
  for side, value in zip(program.SIDES, (1.0, 1.001)):
    np.save(tmp_path / f"{side}_encode.npy", np.full(3, value))
  with pytest.raises(InputError, match=r"encode: .* differ by 1\.0e-03"):
    program._error(str(tmp_path), "encode")


def test_a_process_that_ends_is_named(program, tmp_path, monkeypatch):
  script = tmp_path / "one_answer.py"
  script.write_text(f"print({json.dumps(json.dumps({'peak_gib': 1}))})")
  monkeypatch.setattr(program, "__file__", str(script))
  side = program.Side("ours", "")
  assert side.loaded == {"peak_gib": 1}
  with pytest.raises(InputError, match="process of ours ended"):
    side.do("encode")
  side.stop()


@pytest.mark.parametrize("sizes, width, message", [
  (["250"], 48, "--sizes=250"), (["0"], 48, "--sizes=0"),
  (["big"], 48, "--sizes=big"), (["256"], 40, "--width=40"),
])  # fmt: skip
def test_sizes_that_suit_no_model_are_named(program, sizes, width, message):
  assert program.check_flags(["256", "512"], 48) == [256, 512]
  with pytest.raises(InputError, match=message):
    program.check_flags(sizes, width)
