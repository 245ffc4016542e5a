# SPDX-License-Identifier: Apache-2.0
"""The sample command: prompts files, outputs, bad input."""

import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tiny_models
from PIL import Image

from qi2_jax import sample
from qi2_jax.errors import InputError
from qi2_jax.interop import lora as lora_files
from qi2_jax.models import lora
from qi2_jax.models.mmdit import MMDiT, init_params
from qi2_jax.pipeline import Pipeline

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import tiny_folder

DEFAULTS = {
  "prompt": None, "prompts": None, "negative_prompt": "", "image": [],
  "size": None, "height": None, "width": None, "resolution": 64,
  "steps": 2, "guidance": None, "seed": 0, "num": 1, "batch_size": None,
  "latents": None, "dtype": "float32", "lora": [], "devices": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_folder.create(tmp_path_factory.mktemp("sample") / "tiny")


@pytest.fixture(autouse=True)
def load_once(monkeypatch, folder):
  """Loading is tested elsewhere; here it would be most of the time."""
  original, loaded = Pipeline.load, {}

  def load(path, dtype=None, devices=None):
    if path not in loaded:
      loaded[path] = original(path, dtype, devices)
    return loaded[path]

  monkeypatch.setattr(Pipeline, "load", load)


def run(folder, out, **values):
  fields = DEFAULTS | {"model": folder, "out": str(out)} | values
  return sample.run(types.SimpleNamespace(**fields))


def test_a_png_keeps_alpha_and_tells_how_it_was_made(folder, tmp_path):
  out = tmp_path / "a.png"
  run(folder, out, prompt="a cat", seed=7, guidance=2.0, negative_prompt="x")
  image = Image.open(out)
  assert image.size == (64, 64) and image.mode == "RGBA"
  info = image.text
  assert info["prompt"] == "a cat" and info["seed"] == "7"
  assert info["guidance"] == "2.0" and info["negative_prompt"] == "x"
  assert info["steps"] == "2" and info["model"] == folder
  npy = tmp_path / "a.npy"
  run(folder, npy, prompt="a cat", seed=7, guidance=2.0, negative_prompt="x")
  exact = np.load(npy)
  assert exact.dtype == np.float32 and exact.shape == (64, 64, 4)
  assert exact.min() >= 0 and exact.max() <= 1
  np.testing.assert_allclose(np.asarray(image) / 255, exact, atol=0.502 / 255)
  assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_rows_of_a_file_have_their_own_settings(folder, tmp_path):
  Image.new("RGB", (64, 32), "red").save(tmp_path / "ref.png")
  rows = [
    {"prompt": "a cat"},
    {"prompt": "a cat", "seed": 3, "size": "64x32"},
    {"prompt": "make it blue", "images": ["ref.png"]},
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
  out = tmp_path / "out.png"
  run(folder, out, prompts=str(path), seed=1, num=2)
  made = [Image.open(tmp_path / f"out_{i:03d}.png") for i in range(6)]
  assert [m.text["seed"] for m in made] == ["1", "2", "3", "4", "1", "2"]
  assert made[2].size == (64, 32) and made[0].size == (64, 64)
  assert made[4].text["images"] == "1" and made[4].size == (96, 32)
  assert Image.open(out).size[0] > 2 * 64
  whole = tmp_path / "one.png"
  run(folder, whole, prompt="a cat", seed=2)
  np.testing.assert_array_equal(
    np.asarray(made[1]), np.asarray(Image.open(whole))
  )


def test_an_interrupt_keeps_finished_images(folder, tmp_path, monkeypatch):
  stream = Pipeline.stream

  def broken(self, *args):
    yield next(stream(self, *args))
    raise KeyboardInterrupt

  monkeypatch.setattr(Pipeline, "stream", broken)
  with pytest.raises(KeyboardInterrupt):
    run(folder, tmp_path / "o.png", prompt="a cat", num=3, batch_size=1)
  assert [p.name for p in tmp_path.iterdir()] == ["o_000.png"]


def adapter(pipeline, scale):
  """An adapter of every linear layer with `b` of size `scale`."""
  made = lora.init(
    pipeline.params, lora.DEFAULT_TARGETS, 2, 4.0, jax.random.key(0)
  )
  factors = {
    name: {"a": pair["a"], "b": pair["b"] + scale}
    for name, pair in made.factors.items()
  }
  return made.replace(factors=factors)


def test_adapters_are_merged_by_their_weight(folder, tmp_path):
  pipeline = Pipeline.load(folder, "float32")
  file, native = tmp_path / "a.safetensors", tmp_path / "native"
  lora_files.write(str(file), adapter(pipeline, 0.05))
  lora_files.save(str(native), adapter(pipeline, 0.05))
  out = tmp_path / "a.npy"

  def draw(*loras):
    run(folder, out, prompt="a cat", lora=list(loras))
    return np.load(out)

  plain, whole = draw(), draw(str(file))
  assert np.abs(whole - plain).max() > 1e-3
  np.testing.assert_allclose(draw(str(native)), whole, atol=1e-6)
  np.testing.assert_allclose(draw(f"{file}:0"), plain, atol=1e-6)
  halves = draw(f"{file}:0.5", f"{native}:0.5")
  np.testing.assert_allclose(halves, whole, atol=1e-5)


def test_an_adapter_of_another_model_is_refused(folder, tmp_path):
  other = MMDiT(tiny_models.MMDIT)
  params = jax.eval_shape(lambda: init_params(other, jax.random.key(0)))
  made = lora.init(params, lora.DEFAULT_TARGETS, 2, 2.0, jax.random.key(0))
  file, native = tmp_path / "b.safetensors", tmp_path / "native"
  lora_files.write(str(file), made)
  lora_files.save(str(native), made)
  for path in (file, native):
    with pytest.raises(InputError, match="for another model"):
      run(folder, tmp_path / "a.png", prompt="x", lora=[str(path)])


BAD = {
  "no prompt": ({}, "either --prompt or --prompts"),
  "size": ({"height": 48, "width": 64}, "48 x 64 .* not a multiple of 32"),
  "one side": ({"height": 64}, "both --height and --width"),
  "size twice": ({"size": "1:1", "height": 64, "width": 64}, "not both"),
  "size name": ({"size": "big"}, "neither a ratio"),
  "missing image": ({"image": ["nowhere.png"]}, "cannot read image nowhere"),
  "guidance": ({"guidance": -1.0}, "guidance -1.0"),
  "steps": ({"steps": 1}, "1 sampling steps are too few"),
  "prompt": ({"prompt": "red " * 9000}, "position table has 8192 rows"),
  "extension": ({"out": "a.jpg"}, "must end in .png or .npy"),
  "folder": ({"out": "/nowhere/a.png"}, "does not exist"),
  "model": ({"model": "/nowhere"}, "/nowhere does not exist"),
  "latents": ({"latents": "/nowhere.npy"}, "cannot read --latents"),
  "lora": ({"lora": ["/nowhere.safetensors"]}, "/nowhere.safetensors"),
  "lora weight": ({"lora": ["a:b"]}, "'b' is no number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(folder, tmp_path, name):
  values, message = BAD[name]
  prompt = {} if name == "no prompt" else {"prompt": "a cat"}
  values = {"out": str(tmp_path / "a.png"), "model": folder} | prompt | values
  with pytest.raises(InputError, match=message) as caught:
    sample.run(types.SimpleNamespace(**(DEFAULTS | values)))
  assert "\n" not in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_eleven_references_are_refused(folder, tmp_path):
  photo = tmp_path / "ref.png"
  Image.new("RGB", (64, 64)).save(photo)
  with pytest.raises(InputError, match="at most 10"):
    run(folder, tmp_path / "a.png", prompt="x", image=[str(photo)] * 11)


def test_noise_of_another_size_is_refused(folder, tmp_path):
  path = tmp_path / "noise.npy"
  for shape, message in (
    ((1, 2, 2, tiny_folder.Z), r"needs \(4, 4, 16\)"),
    ((2, 4, 4, tiny_folder.Z), "1 images need"),
    ((4, 4, tiny_folder.Z), "1 images need"),
  ):
    np.save(path, np.zeros(shape))
    with pytest.raises(InputError, match=message):
      run(folder, tmp_path / "a.png", prompt="x", latents=str(path))
  np.save(path, np.zeros((1, 4, 4, tiny_folder.Z), int))
  with pytest.raises(InputError, match="not floats"):
    run(folder, tmp_path / "a.png", prompt="x", latents=str(path))


@pytest.mark.parametrize(
  "text, message",
  [
    ("{", "rows.jsonl:1 is no valid JSON"),
    ('{"text": "x"}', "needs a JSON object with a text"),
    ('{"prompt": "x", "sed": 1}', "unknown key 'sed'"),
    ("\n", "is empty"),
  ],
)
def test_bad_rows_are_named(folder, tmp_path, text, message):
  path = tmp_path / "rows.jsonl"
  path.write_text(text)
  with pytest.raises(InputError, match=message):
    run(folder, tmp_path / "a.png", prompts=str(path))


def test_a_turbo_model_keeps_its_steps(tmp_path):
  model = tiny_folder.create(tmp_path / "turbo", turbo=True)
  with pytest.raises(InputError, match="its own 8 noise levels"):
    run(model, tmp_path / "a.png", prompt="x", steps=4)


def test_the_command_line_ends_with_a_sentence(folder, tmp_path):
  command = [
    sys.executable, "-m", "qi2_jax.sample", f"--model={folder}",
    "--prompt=a cat", "--size=33x64", f"--out={tmp_path / 'a.png'}",
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith("error: size 64 x 33") and "Traceback" not in (
    done.stderr
  )
