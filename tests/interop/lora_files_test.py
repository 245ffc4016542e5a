# SPDX-License-Identifier: Apache-2.0
"""Adapter files: every spelling, our own folders, and what is refused."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_models

from qi2_jax.errors import InputError
from qi2_jax.interop import lora as files
from qi2_jax.models import lora
from qi2_jax.models.mmdit import MMDiT, init_params

CONFIG = tiny_models.MMDIT
BLOCK = "transformer_blocks.0."


@pytest.fixture(scope="module")
def shapes():
  model = MMDiT(CONFIG)
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def assert_same_lora(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def plain_file():
  """Two modules of layer 0 under bare names, rank 2."""
  rng = np.random.default_rng(0)
  d = CONFIG.width
  sizes = {"attn.to_out.0": (d, d), "img_mlp.out": (d * CONFIG.mlp_ratio, d)}
  out = {}
  for name, (fan_in, fan_out) in sizes.items():
    out[f"{BLOCK}{name}.lora_A.weight"] = rng.normal(size=(2, fan_in))
    out[f"{BLOCK}{name}.lora_B.weight"] = rng.normal(size=(fan_out, 2))
  return {k: v.astype(np.float32) for k, v in out.items()}


def read_tensors(tensors, shapes, folder, metadata=None):
  path = str(folder / "adapter.safetensors")
  tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, path, metadata)
  return files.read(path, shapes)


# The prefixes that diffusers' reader of alpha tensors expects.
KNOWN_TO_DIFFUSERS = ("", "diffusion_model.", "lora_unet_")


@pytest.mark.parametrize("prefix", [
  "", "transformer.", "diffusion_model.", "base_model.model.", "lora_unet_",
])  # fmt: skip
@pytest.mark.parametrize("down, up", [
  ("lora_A", "lora_B"), ("lora_down", "lora_up"),
  ("lora_A.default", "lora_B.default"),
])  # fmt: skip
def test_every_spelling_is_the_same_adapter(prefix, down, up, shapes, tmp_path):
  plain = plain_file()
  wanted = read_tensors(plain, shapes, tmp_path)
  spelled = {}
  for key, value in plain.items():
    module, _, rest = key.partition(".lora_")
    if prefix == "lora_unet_":
      module = module.replace(".", "_")
    rest = (down if rest[0] == "A" else up) + ".weight"
    spelled[f"{prefix}{module}.{rest}"] = value
    spelled[f"{prefix}{module}.alpha"] = np.float32([6.0]).reshape(())
  got = read_tensors(spelled, shapes, tmp_path)
  assert set(map(float, wanted.scales.values())) == {1.0}
  assert set(map(float, got.scales.values())) == {3.0}
  assert_same_lora(got.replace(scales=wanted.scales), wanted)
  # diffusers reads those with an alpha tensor too: the same change.
  if down != "lora_A.default" and prefix in KNOWN_TO_DIFFUSERS:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch_tensors = {k: torch.tensor(v) for k, v in spelled.items()}
    state = diffusers.QwenImage21Pipeline.lora_state_dict(torch_tensors)
    name = f"transformer.{BLOCK}img_mlp.out"
    b, a = (state[f"{name}.lora_{x}.weight"].numpy() for x in "BA")
    f = got.factors["blocks/mlp/out/kernel"]
    delta = 3 * np.asarray(f["a"])[0] @ np.asarray(f["b"])[0]
    np.testing.assert_allclose(delta.T, b @ a, atol=1e-5)


def test_fused_gate_up_is_gate_then_proj(shapes, tmp_path):
  rng = np.random.default_rng(3)
  d, hidden = CONFIG.width, CONFIG.width * CONFIG.mlp_ratio
  a = rng.normal(size=(2, d)).astype(np.float32)
  rows = rng.normal(size=(2, hidden, 2)).astype(np.float32)
  stem = f"diffusion_model.{BLOCK}img_mlp."
  both = np.concatenate(rows)
  fused = read_tensors(
    {f"{stem}gate_up.lora_down.weight": a, f"{stem}gate_up.alpha": np.ones(()),
     f"{stem}gate_up.lora_up.weight": both}, shapes, tmp_path,
  )  # fmt: skip
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
  merged = lora.merge(zeros, fused)["blocks"]["mlp"]
  for name, b in zip(("gate", "proj"), rows):
    np.testing.assert_allclose(
      merged[name]["kernel"][0], (b @ a).T / 2, atol=1e-5, err_msg=name
    )
    assert not np.any(merged[name]["kernel"][1])
  apart = {}
  for name, b in zip(("gate_layer", "proj"), rows):
    apart[f"{stem}{name}.lora_A.weight"] = a
    apart[f"{stem}{name}.lora_B.weight"] = b
    apart[f"{stem}{name}.alpha"] = np.ones(())
  assert_same_lora(fused, read_tensors(apart, shapes, tmp_path))
  apart[f"{stem}gate_up.lora_A.weight"] = a
  apart[f"{stem}gate_up.lora_B.weight"] = both
  with pytest.raises(InputError, match="fused and unfused"):
    read_tensors(apart, shapes, tmp_path)


def test_layers_that_differ_are_padded_with_zeros(shapes, tmp_path):
  rng = np.random.default_rng(4)
  d = CONFIG.width
  tensors = {}
  for layer, rank in enumerate((2, 3)):
    stem = f"transformer_blocks.{layer}.attn.to_q."
    tensors[f"{stem}lora_A.weight"] = rng.normal(size=(rank, d))
    tensors[f"{stem}lora_B.weight"] = rng.normal(size=(d, rank))
  stem = "transformer_blocks.1.attn.to_k."
  tensors[f"{stem}lora_A.weight"] = rng.normal(size=(2, d))
  tensors[f"{stem}lora_B.weight"] = rng.normal(size=(d, 2))
  tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
  pattern = {r"transformer_blocks\.1\.attn\.to_q": 3, "to_q": 2}
  config = {"lora_alpha": 6, "r": 2, "rank_pattern": pattern}
  metadata = {"lora_adapter_metadata": json.dumps(config)}
  got = read_tensors(tensors, shapes, tmp_path, metadata)
  q, k = (got.factors[f"blocks/attn/{n}/kernel"] for n in ("to_q", "to_k"))
  assert q["a"].shape == (2, d, 3)
  assert not np.any(q["a"][0, :, 2]) and not np.any(q["b"][0, 2])
  assert np.all(q["a"][1] != 0) and np.all(q["b"][1] != 0)
  np.testing.assert_array_equal(got.scales["blocks/attn/to_q/kernel"], [3, 2])
  assert not np.any(k["a"][0]) and not np.any(k["b"][0])
  assert got.scales["blocks/attn/to_k/kernel"] == 3
  # Written and read again it is the same adapter.
  files.write(str(tmp_path / "again.safetensors"), got)
  again = files.read(str(tmp_path / "again.safetensors"), shapes)
  assert_same_lora(again, got)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_native_folders_survive(dtype, shapes, tmp_path):
  adapter = lora.init(shapes, (r".*/kernel",), 3, 5, jax.random.key(0))
  adapter.scales["blocks/mlp/out/kernel"] = jnp.array([0.5, 2.0])
  factors = jax.tree.map(lambda x: (x + 0.1).astype(dtype), adapter.factors)
  adapter = adapter.replace(factors=factors)
  folder, peft = str(tmp_path / "native"), str(tmp_path / "peft")
  files.save(folder, adapter)
  files.save(folder, adapter)
  files.write(peft, adapter)
  assert sorted(os.listdir(folder)) == ["config.json", "variables"]
  assert_same_lora(files.load(folder), adapter)
  assert files.is_native(folder) and not files.is_adapter(folder)
  assert files.is_adapter(peft) and not files.is_native(peft)
  with pytest.raises(InputError, match="is no adapter folder"):
    files.load(peft)
  with pytest.raises(InputError, match="exists and is no adapter"):
    files.save(peft, adapter)
  with pytest.raises(InputError, match="exists and is no adapter"):
    files.write(folder, adapter)
  assert_same_lora(files.load(folder), adapter)


A = f"{BLOCK}img_mlp.out.lora_A.weight"
B = f"{BLOCK}img_mlp.out.lora_B.weight"
WRONG = {
  "magnitude_vector is not a plain": {
    f"{BLOCK}img_mlp.out.lora_magnitude_vector": np.ones(32)},
  "dora_scale is not a plain": {f"{BLOCK}img_mlp.out.dora_scale": np.ones(3)},
  "lokr_w1 is not a plain": {f"{BLOCK}img_mlp.out.lokr_w1": np.ones((2, 2))},
  "lora_B.bias is not a plain": {f"{BLOCK}img_mlp.out.lora_B.bias": np.ones(3)},
  r"transformer_blocks\.2\.attn\.to_q that this model lacks": {
    "transformer_blocks.2.attn.to_q.lora_A.weight": np.ones((2, 32))},
  "add_q_proj that this model lacks": {
    f"{BLOCK}attn.add_q_proj.lora_A.weight": np.ones((2, 32))},
  r"shape \(2, 48\) but this model needs \(2, 96\)": {A: np.ones((2, 48))},
  r"shape \(48, 2\) but this model needs \(32, 2\)": {B: np.ones((48, 2))},
  r"shape \(2, 96, 1, 1\)": {A: np.ones((2, 96, 1, 1))},
  r"shape \(0, 96\)": {A: np.ones((0, 96)), B: np.ones((32, 0))},
  "must be one number": {f"{BLOCK}img_mlp.out.alpha": np.ones(2)},
  "are the same weight": {"transformer." + A: np.ones((2, 96))},
  "has no partner": {f"{BLOCK}attn.to_q.lora_A.weight": np.ones((2, 32))},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_adapters_for_something_else_are_named(message, shapes, tmp_path):
  with pytest.raises(InputError, match=message):
    read_tensors({**plain_file(), **WRONG[message]}, shapes, tmp_path)


def test_configs_that_do_not_fit_are_named(shapes, tmp_path):
  def read(**fields):
    metadata = {"lora_adapter_metadata": json.dumps(fields)}
    return read_tensors(plain_file(), shapes, tmp_path, metadata)

  assert float(read(r=2, lora_alpha=5).scales["blocks/mlp/out/kernel"]) == 2.5
  with pytest.raises(InputError, match="rank 2 but the adapter's config says"):
    read(r=4, lora_alpha=4)
  with pytest.raises(InputError, match="peft_type=LOKR"):
    read(peft_type="LOKR")
  with pytest.raises(InputError, match="use_dora=True"):
    read(r=2, use_dora=True)
  with pytest.raises(InputError, match="no LoRA weights"):
    read_tensors({}, shapes, tmp_path)


def test_broken_files_are_one_sentence(shapes, tmp_path):
  read_tensors(plain_file(), shapes, tmp_path)
  path = tmp_path / "adapter.safetensors"
  path.write_bytes(path.read_bytes()[:-5])
  with pytest.raises(InputError, match="cannot be read"):
    files.read(str(path), shapes)
  with pytest.raises(InputError, match="cannot be read"):
    files.read(str(tmp_path / "none.safetensors"), shapes)
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match="holds neither"):
    files.read(str(tmp_path / "empty"), shapes)


@pytest.mark.parametrize("name", ["file.safetensors", "folder", "native"])
def test_a_failed_write_leaves_the_old_adapter(
  name, shapes, tmp_path, monkeypatch
):
  adapter = read_tensors(plain_file(), shapes, tmp_path)
  path = str(tmp_path / "out" / name)
  write = files.save if name == "native" else files.write
  read = files.load if name == "native" else lambda p: files.read(p, shapes)
  write(path, adapter)
  before = read(path)

  def full(*args, **kwargs):
    pathlib.Path(args[1]).write_text("half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  monkeypatch.setattr(files.ocp.StandardCheckpointer, "save", full)
  with pytest.raises(OSError, match="No space"):
    write(path, adapter)
  assert os.listdir(tmp_path / "out") == [name]
  assert_same_lora(read(path), before)
