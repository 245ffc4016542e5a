# SPDX-License-Identifier: Apache-2.0
"""Component folders of both kinds against diffusers' own files."""

import _thread
import dataclasses
import gc
import json
import os
import pathlib
import shutil
import signal
import time

import jax
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny_models
from raw_bits import bits, torch_bits

from qi2_jax.errors import InputError
from qi2_jax.interop import mapping, mmdit, model_folder, vae
from qi2_jax.interop.published import read_json, write_json
from qi2_jax.models.mmdit import SHARDING_RULES, MMDiTConfig
from qi2_jax.models.vae import SHARDING_RULES as VAE_RULES
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.parallel.sharding import tree_shardings

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

diffusers = pytest.importorskip("diffusers")
import tiny_folder  # noqa: E402

DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module", params=DTYPES)
def folder(request, tmp_path_factory):
  """A tiny pipeline in several shards."""
  path = tmp_path_factory.mktemp(request.param)
  dtype = getattr(torch, request.param)
  return tiny_folder.create(path, dtype=dtype, max_shard_size="100KB")


def weights(path):
  """diffusers' own reading of a component: name -> tensor."""
  folder = pathlib.Path(path)
  config = json.loads((folder / "config.json").read_text())
  stored = load_file(next(folder.glob("*.safetensors")))
  dtype = next(iter(stored.values())).dtype
  model, info = getattr(diffusers, config["_class_name"]).from_pretrained(
    path, output_loading_info=True, torch_dtype=dtype
  )
  assert not any(info.values()), info
  return model.state_dict()


def assert_equal_trees(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)

  def one(path, a, b):
    assert a.dtype == b.dtype, path
    np.testing.assert_array_equal(bits(a), bits(b), err_msg=str(path))

  jax.tree_util.tree_map_with_path(one, ours, theirs)


def assert_equal_files(a, b):
  """Same tensors, bit for bit, as diffusers reads them."""
  a, b = weights(a), weights(b)
  assert a.keys() == b.keys()
  for name, tensor in a.items():
    assert tensor.dtype == b[name].dtype, name
    np.testing.assert_array_equal(
      torch_bits(tensor), torch_bits(b[name]), err_msg=name
    )


def reference_tree(folder, abstract, table):
  """The Flax tree made in memory of diffusers' state dict."""
  tensors = {}
  for name, tensor in weights(folder).items():
    raw = torch_bits(tensor)
    kind = str(tensor.dtype).removeprefix("torch.")
    tensors[name] = raw.view(getattr(ml_dtypes, kind, kind))
  return mapping.import_tree(tensors, abstract, table)


def test_both_kinds_round_trip(folder, tmp_path):
  """safetensors -> arrays -> Orbax -> arrays -> safetensors."""
  config, params = model_folder.load_mmdit(folder)
  assert (config.num_layers, config.head_dim, config.latent_channels) == (
    2, 32, 16,
  )  # fmt: skip
  expected = reference_tree(f"{folder}/transformer", params, mmdit.table)
  assert_equal_trees(params, expected)
  model_folder.save_mmdit(f"{tmp_path}/native", config, params)
  assert sorted(os.listdir(tmp_path)) == ["native"]
  again, restored = model_folder.load_mmdit(f"{tmp_path}/native")
  assert again == config
  assert_equal_trees(restored, expected)
  lazy_config, lazy = model_folder.open_mmdit(f"{tmp_path}/native")
  # A chunk that spans layers would be read once per layer.
  chunks = lazy["blocks"]["mlp"]["out"]["kernel"].chunk_layout.read_chunk
  assert chunks.shape == (1, 192, 64)
  for name, tree in (("eager", restored), ("lazy", lazy)):
    model_folder.export_mmdit(f"{tmp_path}/{name}", lazy_config, tree)
    assert_equal_files(f"{tmp_path}/{name}", f"{folder}/transformer")


def test_the_vae_round_trips(folder, tmp_path):
  config, variables = model_folder.load_vae(folder)
  assert config.carry_temporal and "carried" in variables
  stats = read_json(f"{folder}/vae/config.json")
  for name in ("mean", "std"):
    np.testing.assert_array_equal(
      variables["latent_stats"][name], np.float32(stats[f"latents_{name}"])
    )
  tree = vae.merge(variables["params"], variables["carried"])
  expected = reference_tree(f"{folder}/vae", tree, vae.table)
  assert_equal_trees(tree, expected)
  model_folder.save_vae(f"{tmp_path}/vae", config, variables)
  # A workdir, like a pipeline folder, holds it under the name vae.
  again, restored = model_folder.load_vae(str(tmp_path))
  assert again == config
  assert_equal_trees(restored, variables)
  model_folder.export_vae(f"{tmp_path}/out", *model_folder.open_vae(tmp_path))
  assert_equal_files(f"{tmp_path}/out", f"{folder}/vae")
  read = read_json(f"{tmp_path}/out/config.json")
  for name in ("latents_mean", "latents_std"):
    np.testing.assert_array_equal(np.float32(read[name]), np.float32(
      stats[name]
    ))  # fmt: skip


def test_dtypes_are_cast_on_request(folder, tmp_path):
  _, params = model_folder.load_mmdit(folder)
  for dtype in DTYPES:
    config, cast = model_folder.load_mmdit(folder, dtype=dtype)
    assert_equal_trees(cast, optax.tree.cast(params, dtype))
    out = f"{tmp_path}/{dtype}"
    model_folder.export_mmdit(out, config, params, dtype=dtype)
    theirs = {k: v for k, v in weights(out).items()}
    assert {str(v.dtype) for v in theirs.values()} == {f"torch.{dtype}"}
    expected = mapping.export_tree(cast, mmdit.table)
    for name, tensor in theirs.items():
      np.testing.assert_array_equal(
        torch_bits(tensor).view(np.uint8),
        expected[name].view(np.uint8),
      )


@pytest.mark.parametrize("native", [False, True])
def test_a_sharded_load_equals_the_file(native, folder, tmp_path):
  mesh = create_mesh({"data": 1, "fsdp": 4, "seq": 1, "tensor": 2})
  source = folder
  config, plain = model_folder.load_mmdit(folder)
  _, plain_vae = model_folder.load_vae(folder)
  if native:
    source = str(tmp_path)
    model_folder.save_mmdit(f"{source}/transformer", config, plain)
    model_folder.save_vae(f"{source}/vae", *model_folder.load_vae(folder))
  _, params = model_folder.load_mmdit(
    source, shardings=lambda a: tree_shardings(a, SHARDING_RULES, mesh)
  )
  expected = tree_shardings(plain, SHARDING_RULES, mesh)
  jax.tree.map(lambda a, s: a.sharding == s or pytest.fail(str(s)), params,
               expected)  # fmt: skip
  q = params["blocks"]["attn"]["to_q"]["kernel"]
  assert q.addressable_shards[0].data.shape == (2, 64 // 4, 1, 32)
  assert_equal_trees(params, plain)
  _, variables = model_folder.load_vae(
    source, shardings=lambda a: tree_shardings(a, VAE_RULES, mesh)
  )
  assert_equal_trees(variables, plain_vae)
  # A sharded model exports as a whole one does.
  model_folder.export_mmdit(f"{tmp_path}/out", config, params)
  assert_equal_files(f"{tmp_path}/out", f"{folder}/transformer")


def test_nan_bits_survive(tmp_path):
  """A backend that computes bfloat16 in float32 would quieten these."""
  config = MMDiTConfig(
    num_layers=2, num_heads=1, head_dim=8, context_dim=4,
    rope_axes=(2, 2, 4), latent_channels=2,
  )  # fmt: skip
  rng = np.random.default_rng(0)

  def noise(a):
    raw = rng.integers(0, 2**16, a.shape, dtype=np.uint16)
    return raw.view(ml_dtypes.bfloat16)

  params = jax.tree.map(noise, model_folder.abstract_mmdit(config))
  model_folder.export_mmdit(f"{tmp_path}/a", config, params)
  _, loaded = model_folder.load_mmdit(f"{tmp_path}/a")
  assert_equal_trees(loaded, params)
  model_folder.save_mmdit(f"{tmp_path}/b", config, loaded)
  assert_equal_trees(model_folder.load_mmdit(f"{tmp_path}/b")[1], params)


def test_our_vae_loads_in_diffusers_without_missing_keys(tmp_path):
  """A VAE trained here has no temporal kernels; the file gets zeros."""
  config = tiny_models.VAE
  abstract = model_folder.abstract_vae(config)
  fresh = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), abstract)
  stats = {"mean": np.zeros(config.z_dim), "std": np.ones(config.z_dim)}
  variables = {
    "params": tiny_models.randomise(fresh), "latent_stats": stats
  }  # fmt: skip
  model_folder.export_vae(f"{tmp_path}/vae", config, variables)
  tensors = weights(f"{tmp_path}/vae")
  temporal = [n for n in tensors if "time_conv" in n]
  assert temporal and all((tensors[n] == 0).all() for n in temporal)
  # Read back, the zeros are carried, and everything else is as it was.
  loaded, back = model_folder.load_vae(str(tmp_path))
  assert loaded == dataclasses.replace(config, carry_temporal=True)
  assert_equal_trees(back["params"], variables["params"])
  # A native folder has only what was saved, and nothing to carry.
  model_folder.save_vae(f"{tmp_path}/native", config, variables)
  loaded, back = model_folder.load_vae(f"{tmp_path}/native")
  assert loaded == config and "carried" not in back
  assert_equal_trees(back["params"], variables["params"])


def test_variants_stay_native(tmp_path):
  config = MMDiTConfig(
    num_layers=2, num_heads=2, head_dim=16, context_dim=24,
    rope_axes=(4, 6, 6), latent_channels=8, attention="joint",
    condition_time="shared", modulation="per_block", gate="linear",
    rope_theta=500.0, remat="none", dtype=jax.numpy.bfloat16,
  )  # fmt: skip
  params = jax.tree.map(
    lambda a: np.ones(a.shape, np.float32), model_folder.abstract_mmdit(config)
  )
  model_folder.save_mmdit(f"{tmp_path}/m", config, params)
  again, restored = model_folder.load_mmdit(f"{tmp_path}/m")
  assert again == config
  assert_equal_trees(restored, params)
  with pytest.raises(InputError, match="attention='joint' cannot be exported"):
    model_folder.export_mmdit(f"{tmp_path}/out", config, params)
  assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
  "part, field, value, message",
  [
    ("transformer", "_class_name", "FluxTransformer2DModel", "of class Flux"),
    ("transformer", "patch_size", 2, "patch_size=2"),
    ("transformer", "causal_condition", False, "causal_condition=false"),
    ("transformer", "out_channels", 16, "out_channels=16"),
    ("transformer", "axes_dims_rope", [16, 16], "needs three numbers"),
    ("transformer", "axes_dims_rope", [8, 8, 8], "must sum to head_dim"),
    ("transformer", "num_layers", "many", "num_layers=.*whole"),
    ("transformer", "guidance_embeds", True, "unknown field guidance_embeds"),
    ("transformer", "quantization_config", {"bits": 4}, "quantization_config"),
    ("vae", "_class_name", "AutoencoderKL", "of class AutoencoderKL"),
    ("vae", "attn_scales", [1.0], "attn_scales"),
    ("vae", "is_residual", False, "is_residual=false"),
    ("vae", "dropout", 0.1, "dropout=0.1"),
    ("vae", "out_channels", 3, "out_channels=3"),
    ("vae", "patch_size", 3, "in_channels=4, which patch_size=3"),
    ("vae", "temperal_downsample", [True], "needs 4 true or false"),
    ("vae", "latents_mean", [0.0], "needs 8 numbers in latents_mean"),
    ("vae", "latents_std", [0.0] * 8, "latents_std that is not positive"),
  ],
)
def test_unsupported_fields_are_named(part, field, value, message, tmp_path):
  load = getattr(
    model_folder, {"transformer": "load_mmdit", "vae": "load_vae"}[part]
  )
  config, stats = MMDiTConfig(), {"mean": np.zeros(8), "std": np.ones(8)}
  made = (
    mmdit.published(config) if part == "transformer"
    else vae.published(dataclasses.replace(VAE_CONFIG, z_dim=8), stats)
  )  # fmt: skip
  made[field] = value
  (tmp_path / part).mkdir()
  write_json(f"{tmp_path}/{part}/config.json", made)
  with pytest.raises(InputError, match=message) as error:
    load(str(tmp_path))
  assert "\n" not in str(error.value)
  if "head_dim" not in message:
    assert f"{part}/config.json" in str(error.value)


VAE_CONFIG = vae.config({"_class_name": vae.CLASS})


def rewrite(folder, change):
  """Applies `change` to the tensors of a single-file component."""
  path = f"{folder}/{model_folder.STEM}.safetensors"
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: t.pop("img_in.weight"), r"has no tensor img_in\.weight"),
    (
      lambda t: t.update({"extra.weight": torch.zeros(2)}),
      r"1 tensors .* no place in this model, e\.g\. extra\.weight",
    ),
    (
      lambda t: t.update({"proj_out.weight": torch.zeros(3, 64)}),
      r"proj_out\.weight has shape \(3, 64\).* needs \(16, 64\)",
    ),
    (
      lambda t: t.update(
        {"img_in.weight": t["img_in.weight"].to(torch.float8_e4m3fn)}
      ),
      r"img_in\.weight is stored as float8_e4m3fn; quantised",
    ),
  ],
)
def test_wrong_tensors_are_named_before_any_is_read(
  change, message, tmp_path, monkeypatch
):
  tiny_folder.mmdit().save_pretrained(tmp_path)
  rewrite(tmp_path, change)
  monkeypatch.setattr(
    mapping.TensorReader, "view", lambda *_: pytest.fail("data was read")
  )
  with pytest.raises(InputError, match=message):
    model_folder.load_mmdit(str(tmp_path))


def test_other_folders_are_refused_and_left_alone(folder, tmp_path):
  config, params = model_folder.load_mmdit(folder)
  with pytest.raises(InputError, match="holds no MMDiT"):
    model_folder.load_mmdit(str(tmp_path))
  with pytest.raises(InputError, match="holds no VAE"):
    model_folder.load_vae(str(tmp_path))
  mine = tmp_path / "mine"
  mine.mkdir()
  (mine / "precious.txt").write_text("keep")
  with pytest.raises(InputError, match="in the way"):
    model_folder.save_mmdit(str(mine), config, params)
  with pytest.raises(InputError, match="exists; choose a new folder"):
    model_folder.export_mmdit(str(mine), config, params)
  assert os.listdir(mine) == ["precious.txt"]
  # An older model folder is replaced as a whole.
  target = tmp_path / "model"
  model_folder.save_mmdit(str(target), config, params)
  (target / "stale").write_text("")
  zeros = jax.tree.map(lambda a: a * 0, params)
  model_folder.save_mmdit(str(target), config, zeros)
  assert sorted(os.listdir(target)) == ["config.json", "variables"]
  assert_equal_trees(model_folder.load_mmdit(str(target))[1], zeros)
  assert sorted(os.listdir(tmp_path)) == ["mine", "model"]


def test_an_interrupted_save_waits_for_its_writers(tmp_path, monkeypatch):
  """Threads that still wrote would fill the folder behind the clean-up."""
  seen = []

  def slow(_, path, args):
    time.sleep(0.1)
    _thread.interrupt_main()
    time.sleep(0.3)
    os.makedirs(path)
    seen.append(str(path))

  monkeypatch.setattr(ocp.Checkpointer, "save", slow)
  config = tiny_models.VAE
  stats = {"mean": np.zeros(config.z_dim), "std": np.ones(config.z_dim)}
  variables = {"params": {"a": np.zeros(2)}, "latent_stats": stats}
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt):
      model_folder.save_vae(f"{tmp_path}/vae", config, variables)
  finally:
    signal.signal(signal.SIGINT, before)
  assert len(seen) == 1 and os.listdir(tmp_path) == []


# Orbax abandons its other reads when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_native_folders_are_one_sentence(folder, tmp_path):
  config, params = model_folder.load_mmdit(folder)
  model_folder.save_mmdit(f"{tmp_path}/m", config, params)
  shallow = dataclasses.replace(config, num_layers=1)
  write_json(f"{tmp_path}/m/config.json", mmdit.native(shallow))
  with pytest.raises(InputError, match=r"has shape \(2, .* by the config"):
    model_folder.load_mmdit(f"{tmp_path}/m")
  write_json(f"{tmp_path}/m/config.json", mmdit.native(config))
  chunk = tmp_path / "m" / "variables" / "norm_out.kernel" / "0.0"
  chunk.write_bytes(chunk.read_bytes()[:-9])
  shutil.copytree(tmp_path / "m", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "variables")
  (tmp_path / "cut" / "variables").mkdir()
  for name, message in (("m", "reading .* failed"), ("cut", "no complete")):
    with pytest.raises(InputError, match=message) as error:
      model_folder.load_mmdit(f"{tmp_path}/{name}")
    assert "\n" not in str(error.value)
  gc.collect()
