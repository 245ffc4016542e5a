# SPDX-License-Identifier: Apache-2.0
"""`convert verify` agrees on an intact folder and names what is broken."""

import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import tiny_folder  # noqa: E402

from qi2_jax import verify  # noqa: E402
from qi2_jax.errors import InputError  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_folder.create(tmp_path_factory.mktemp("verify") / "tiny")


SETTINGS = types.SimpleNamespace(
  resolution=64, steps=2, guidance=2.0, dtype="float32"
)


def test_every_component_agrees(folder, capsys):
  assert verify.verify(folder, SETTINGS) == 0
  out = capsys.readouterr().out
  assert out.count(" ok") == 9 and "9 of 9 agree" in out


def test_a_broken_component_is_named(folder, capsys, monkeypatch):
  original = verify.our_outputs

  def broken(*args):
    out = original(*args)
    out["velocity"] = out["velocity"] * np.float32(1.001)
    return out

  monkeypatch.setattr(verify, "our_outputs", broken)
  assert verify.verify(folder, SETTINGS) == 1
  lines = capsys.readouterr().out.splitlines()
  differing = [line for line in lines if "DIFFERS" in line]
  assert len(differing) == 2 and all("MMDiT" in line for line in differing)


def test_a_folder_that_is_no_pipeline(tmp_path):
  with pytest.raises(InputError, match="pipeline"):
    verify.verify(str(tmp_path), SETTINGS)


def test_psnr_and_error_are_what_they_say():
  a = np.zeros((4, 4))
  assert verify.psnr(a + 0.1, a) == pytest.approx(20)
  assert verify.relative(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25
