# SPDX-License-Identifier: Apache-2.0
"""Whole pipeline folders there and back, from the command line."""

import contextlib
import gc
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from raw_bits import assert_equal_modules

from qi2_jax import convert
from qi2_jax.errors import InputError
from qi2_jax.interop import lora, model_folder
from qi2_jax.models import lora as lora_models

torch = pytest.importorskip("torch")
from safetensors.numpy import load_file  # noqa: E402

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
import tiny_folder  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
CLASSES = {
  "transformer": diffusers.QwenImage21Transformer2DModel,
  "vae": diffusers.AutoencoderKLQwenImage21,
  "text_encoder": transformers.Qwen3VLForConditionalGeneration,
}
COPIED = ("text_encoder", "scheduler", "processor", "model_index.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """An fp32 pipeline in single files."""
  return tiny_folder.create(tmp_path_factory.mktemp("fp32") / "source")


@pytest.fixture(scope="module")
def native(source):
  """Its import."""
  target = f"{os.path.dirname(source)}/native"
  convert.import_pipeline(source, target)
  return target


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
  """A bf16 pipeline in many shards, reached through links like a cache."""
  base = tmp_path_factory.mktemp("bf16")
  real = tiny_folder.create(
    base / "blobs", dtype=torch.bfloat16, turbo=True, max_shard_size="50KB"
  )
  for path in pathlib.Path(real).rglob("*"):
    link = base / "source" / path.relative_to(real)
    if path.parent.name == "processor":
      continue
    if path.is_dir() and path.name != "processor":
      link.mkdir(parents=True)
    else:
      link.parent.mkdir(parents=True, exist_ok=True)
      link.symlink_to(path)
  hidden = base / "source" / ".cache"
  hidden.mkdir()
  (hidden / "download.lock").write_text("")
  return str(base / "source")


def command(*arguments):
  """Runs the program; returns its status, last line of stderr and log."""
  done = subprocess.run(
    [sys.executable, "-m", "qi2_jax.convert", *arguments],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  lines = done.stderr.strip().splitlines() or [""]
  return done.returncode, lines[-1], done.stderr


def assert_equal_tensors(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def files(folder):
  """Relative path -> bytes of everything in a folder."""
  folder = pathlib.Path(folder)
  if folder.is_file():
    return folder.read_bytes()
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in folder.rglob("*")
    if p.is_file()
  }


def read(folder, name, dtype):
  """A component as its own library reads it, with nothing missing."""
  model, info = CLASSES[name].from_pretrained(
    f"{folder}/{name}", output_loading_info=True, torch_dtype=dtype
  )
  assert not any(info.values()), info
  return model


def assert_same_pipeline(source, out, dtype):
  for name in CLASSES:
    assert_equal_modules(read(source, name, dtype), read(out, name, dtype))
  for name in COPIED:
    assert files(f"{out}/{name}") == files(f"{source}/{name}")
  made = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
    out, subfolder="scheduler"
  )
  assert made.config == diffusers.FlowMatchEulerDiscreteScheduler.from_config(
    json.loads(files(f"{source}/scheduler")["scheduler_config.json"])
  ).config  # fmt: skip


def test_the_command_line_round_trips_bf16_shards(sharded, tmp_path):
  native, out = f"{tmp_path}/native", f"{tmp_path}/out"
  status, last, log = command("import", f"--from={sharded}", f"--to={native}")
  assert status == 0, log
  assert "done in" in last
  assert sorted(os.listdir(native)) == sorted([*COPIED, "transformer", "vae"])
  assert sorted(os.listdir(f"{native}/transformer")) == [
    "config.json", "variables",
  ]  # fmt: skip
  assert model_folder.is_pipeline_folder(native)
  status, _, log = command(f"--from={native}", "export", f"--to={out}")
  assert status == 0, log
  assert_same_pipeline(sharded, out, torch.bfloat16)
  assert sorted(os.listdir(tmp_path)) == ["native", "out"]


def test_fp32_round_trips_and_casts(source, native, tmp_path):
  out, cast = f"{tmp_path}/out", f"{tmp_path}/cast"
  convert.export_pipeline(native, out)
  assert_same_pipeline(source, out, torch.float32)
  convert.export_pipeline(native, cast, "bfloat16")
  for name in ("transformer", "vae"):
    expected = read(source, name, torch.float32).to(torch.bfloat16)
    assert_equal_modules(expected, read(cast, name, torch.bfloat16))
  assert files(f"{cast}/text_encoder") == files(f"{source}/text_encoder")
  # Export takes safetensors as well, for a cast or for the copy.
  convert.export_pipeline(source, f"{tmp_path}/again")
  assert_same_pipeline(source, f"{tmp_path}/again", torch.float32)


def test_extra_files_come_along(source, tmp_path):
  mine = tmp_path / "mine"
  shutil.copytree(source, mine)
  (mine / "transformer" / "LICENSE").write_text("terms")
  (mine / "README.md").write_text("read me")
  (mine / "vae" / "diffusion_pytorch_model.bin").write_text("old weights")
  convert.import_pipeline(str(mine), f"{tmp_path}/out")
  out = files(f"{tmp_path}/out")
  assert out["transformer/LICENSE"] == b"terms"
  assert out["README.md"] == b"read me"
  assert not [name for name in out if name.endswith((".bin", "model.tmp"))]
  assert "transformer/diffusion_pytorch_model.safetensors" not in out


def damaged(kind, folder):
  """Breaks a copy of a good pipeline."""
  weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
  if kind == "no vae":
    shutil.rmtree(folder / "vae")
  elif kind == "empty":
    shutil.rmtree(folder)
    folder.mkdir()
  elif kind == "other pipeline":
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
  elif kind == "truncated":
    weights.write_bytes(weights.read_bytes()[:-10])
  elif kind == "missing":
    weights.unlink()
  elif kind == "scheduler":
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_karras_sigmas": True}))
  elif kind == "vae field":
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"is_residual": False}))
  elif kind == "vae tensor":
    diffusers.AutoencoderKLQwenImage21(
      base_dim=4, decoder_base_dim=4
    ).save_pretrained(folder / "other")
    name = "diffusion_pytorch_model.safetensors"
    os.replace(folder / "other" / name, folder / "vae" / name)


@pytest.mark.parametrize(
  "kind, message",
  [
    ("no vae", "no Qwen-Image-2.x pipeline folder: it has no vae/config"),
    ("empty", "it has no model_index.json and no transformer/config.json"),
    ("other pipeline", "model_index.json: .* of class FluxPipeline"),
    ("truncated", "transformer/.*safetensors is truncated"),
    ("missing", "has neither diffusion_pytorch_model.safetensors"),
    ("scheduler", "use_karras_sigmas=true"),
    ("vae field", "vae/config.json: .*is_residual=false"),
    ("vae tensor", "tensor .* has shape|no place"),
  ],
)
def test_bad_folders_fail_before_anything_is_written(
  kind, message, source, tmp_path, monkeypatch
):
  copy = tmp_path / "copy"
  shutil.copytree(source, copy)
  damaged(kind, copy)
  monkeypatch.setattr(
    convert, "_complete", lambda _: pytest.fail("the work began")
  )
  for work in (convert.import_pipeline, convert.export_pipeline):
    with pytest.raises(InputError, match=message) as error:
      work(str(copy), f"{tmp_path}/out")
    assert "\n" not in str(error.value)


def test_targets_are_never_touched(source, tmp_path, monkeypatch):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "precious.txt").write_text("keep")
  for work in (convert.import_pipeline, convert.export_pipeline):
    with pytest.raises(InputError, match="exists; choose a new name"):
      work(source, f"{tmp_path}/mine")
    with pytest.raises(InputError, match="is inside"):
      work(source, f"{source}/out")
    with pytest.raises(InputError, match=r"the folder of --to, .*nowhere"):
      work(source, f"{tmp_path}/nowhere/out")
  full = types.SimpleNamespace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
  for work in (convert.import_pipeline, convert.export_pipeline):
    with pytest.raises(InputError, match=r"needs 0\.0. GB and its disk"):
      work(source, f"{tmp_path}/out")
  assert files(tmp_path) == {"mine/precious.txt": b"keep"}


@contextlib.contextmanager
def largest_file(size):
  """A real disk error: the system refuses files above `size` bytes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Orbax abandons its other writes when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_failures_leave_nothing_behind(source, native, tmp_path, monkeypatch):
  with largest_file(40_000):
    with pytest.raises(InputError, match=r"writing .* failed") as error:
      convert.import_pipeline(source, f"{tmp_path}/out")
    with pytest.raises(OSError, match="File too large"):
      convert.export_pipeline(native, f"{tmp_path}/out")
  gc.collect()
  assert "\n" not in str(error.value)
  assert os.listdir(tmp_path) == []

  def interrupt(*_):
    assert len(os.listdir(tmp_path)) == 1
    raise KeyboardInterrupt

  monkeypatch.setattr(convert, "_copy", interrupt)
  for work, start in ((convert.import_pipeline, source),
                      (convert.export_pipeline, native)):  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
      work(start, f"{tmp_path}/out")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def run(monkeypatch):
  """`main` with flags, in this process."""

  def call(*arguments):
    values = flags.FlagValues()
    for name in ("from", "to", "base", "dtype"):
      flags.DEFINE_string(name, None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    return convert.main(values(["convert", *arguments])[1:])

  return call


def test_adapters_are_dispatched(run, source, tmp_path):
  config, _ = model_folder.load_mmdit(source)
  abstract = model_folder.abstract_mmdit(config)
  made = lora_models.init(
    abstract, lora_models.DEFAULT_TARGETS, 2, 4.0, jax.random.key(0)
  )
  first, native, last = (
    f"{tmp_path}/{n}" for n in ("a.safetensors", "lora", "b.safetensors")
  )
  lora.write(first, made)
  with pytest.raises(InputError, match="is a LoRA adapter; pass --base"):
    run("import", f"--from={first}", f"--to={native}")
  run("import", f"--from={first}", f"--to={native}", f"--base={source}")
  assert lora.is_native(native)
  run("export", f"--from={native}", f"--to={last}")
  assert_equal_tensors(load_file(last), load_file(first))
  with pytest.raises(InputError, match="exists; choose a new name"):
    run("export", f"--from={native}", f"--to={last}")
  back = lora.load(native)
  for path, factors in made.factors.items():
    np.testing.assert_array_equal(back.factors[path]["a"], factors["a"])


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "give one of the words import, export, verify"),
    (["import", "export"], "got import export"),
    (["import"], "import needs --from and --to"),
    (["import", "--from=no/where", "--to=x"], "no/where does not exist"),
    (["export", "--from=.", "--to=x", "--base=y"], "--base is for importing"),
    (["import", "--from=.", "--to=x", "--dtype=float32"], "--dtype is for"),
    (["verify"], "convert verify DIR"),
  ],
)
def test_bad_command_lines(arguments, message, run):
  with pytest.raises(InputError, match=message):
    run(*arguments)
