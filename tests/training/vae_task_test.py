# SPDX-License-Identifier: Apache-2.0
"""Whole VAE runs: from a diffusers folder, on with the recipe, and out again.

The networks of the losses are random stand-ins.
"""

import json
import os
import pathlib

import jax
import numpy as np
import pytest

from data_pipelines.shapes.generate import Options, generate
from experiments import vae as experiment
from qi2_jax import train
from qi2_jax.errors import InputError
from qi2_jax.interop import model_folder
from qi2_jax.interop import vae as published
from qi2_jax.models import vae
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import checkpoints, vae_build, vae_task

pytestmark = pytest.mark.usefixtures("one_device")
SIDE = 32
SMALL = vae.VAEConfig(
  base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=(1, 2, 2),
  num_res_blocks=1, temporal_downsample=(False, True),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_preset():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(vae.PRESETS, "tiny", SMALL)
    yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("data") / "shapes")
  generate(path, Options(t2i=24, edits=0, sizes=((SIDE, SIDE),)), workers=1)
  return path


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """A VAE folder that diffusers wrote, temporal kernels and all."""
  diffusers = pytest.importorskip("diffusers")
  import tiny_folder

  path = str(tmp_path_factory.mktemp("original") / "vae")
  stats = {"mean": np.linspace(-1, 1, 4), "std": np.linspace(1, 2, 4)}
  fields = published.published(SMALL, stats)
  del fields["_class_name"]
  model = diffusers.AutoencoderKLQwenImage21(**fields)
  tiny_folder.randomise(model, 0).save_pretrained(path)
  return path


def short(data, **fields):
  """Two steps of the `tiny` variant, with narrower stand-ins."""
  config = experiment.get_config("tiny")
  config.data.path = data
  config.data.buckets = ((SIDE, SIDE),)
  config.data.batch_size = 4
  config.data.t2i, config.data.ti2i = 1.0, 0.0
  config.num_steps, config.save_every, config.log_every = 2, 2, 1
  config.preview_every = 2
  config.latent_stat_batches = 1
  config.lpips.widths = (4, 4, 4, 4, 4)
  config.dinov2.layer = 0
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 0
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope="module")
def decoder_run(data, original, tmp_path_factory):
  """A decoder-only run from the original."""
  workdir = str(tmp_path_factory.mktemp("decoder"))
  config = short(data, init=original, trainable="decoder")
  config.loss.align = ((0, 0.0),)
  assert train.train(config, workdir) == 0
  return workdir


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}


def last_row(workdir):
  text = pathlib.Path(workdir, "metrics.jsonl").read_text()
  return json.loads(text.splitlines()[-1])


def test_a_decoder_run_keeps_latents_and_temporal_kernels(
  original, decoder_run
):
  _, before = model_folder.load_vae(original)
  _, after = model_folder.load_vae(decoder_run)
  assert before.keys() == after.keys() == {"params", "carried", "latent_stats"}
  old, new = flat(before), flat(after)
  trained = ("['params']['decoder']", "['params']['post_quant_conv']")
  for name in old:
    same = np.array_equal(old[name], new[name])
    assert same != name.startswith(trained), name
  assert "lpips" in last_row(decoder_run)


def test_the_export_reconstructs_the_same_in_diffusers(decoder_run, tmp_path):
  diffusers = pytest.importorskip("diffusers")
  import torch

  config, variables = model_folder.load_vae(decoder_run)
  target = str(tmp_path / "out")
  model_folder.export_vae(target, config, variables)
  theirs = diffusers.AutoencoderKLQwenImage21.from_pretrained(target).eval()
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (1, SIDE, SIDE, 4)).astype(np.float32)
  ours, _, _ = vae.VAE(config).apply(variables, image)
  with torch.no_grad():
    x = torch.tensor(image.transpose(0, 3, 1, 2))[:, :, None]
    out = theirs.decode(theirs.encode(x).latent_dist.mode()).sample[:, :, 0]
  out = out.numpy().transpose(0, 2, 3, 1)
  # diffusers clamps what it decodes.
  np.testing.assert_allclose(np.clip(ours, -1, 1), out, atol=1e-5)
  assert theirs.config.latents_std == pytest.approx(
    np.asarray(variables["latent_stats"]["std"]).tolist()
  )


def test_the_recipe_goes_on_from_a_workdir_and_resumes(
  data, decoder_run, tmp_path
):
  workdir = str(tmp_path / "recipe")
  config = short(data, init=decoder_run)
  config.optimizer.accumulate = 2
  assert train.train(config, workdir) == 0
  row = last_row(workdir)
  assert {"lpips", "align_cosine", "align_weight", "psnr"} <= row.keys()
  assert np.isfinite(row["loss"]) and row["align_weight"] > 0
  # The projection is kept with the state and stays out of the VAE.
  store = checkpoints.CheckpointStore(workdir, read_only=True)
  (projection,) = jax.tree.leaves(store.saved_part(2, "projection"))
  store.close()
  assert projection.shape == (4, 64)
  _, before = model_folder.load_vae(decoder_run)
  _, after = model_folder.load_vae(workdir)
  assert flat(before).keys() == flat(after).keys()
  for name, kernel in flat(before["carried"]).items():
    np.testing.assert_array_equal(flat(after["carried"])[name], kernel)
  std = [np.asarray(v["latent_stats"]["std"]) for v in (before, after)]
  assert np.abs(std[0] - std[1]).max() > 1e-3
  os.remove(os.path.join(workdir, "vae", "config.json"))
  assert train.train(config, workdir) == 0  # Resumes at its end, and finishes.
  assert os.path.exists(os.path.join(workdir, "vae", "config.json"))


@pytest.mark.parametrize("fields, message", [
  ({"lpips.random_features": False}, "config.lpips.vgg"),
  ({"dinov2.random_features": False}, "config.dinov2.path"),
  ({"dinov2.layer": 4}, "layer 4 does not exist"),
  ({"trainable": "encoder"}, "use one of"),
  ({"trainable": "decoder"}, "teaches? nothing|teach nothing"),
  ({"loss.align": ((5, 0.1), (5, 0.2))}, "config.loss.align"),
  ({"loss.l1": ((0, -1.0),)}, "config.loss.l1.*negative"),
  ({"init": "nowhere"}, "nowhere holds no VAE"),
])  # fmt: skip
def test_contradictions_are_named_before_anything_is_read(fields, message):
  config = short("", **fields)
  mesh = create_mesh({}, jax.devices()[:1])
  with pytest.raises(InputError, match=message):
    vae_task.vae_task(config, "", mesh)


def test_rows_that_do_not_divide_over_seq_are_named():
  config = short("")
  mesh = create_mesh({"seq": 8}, jax.devices())
  config.data.buckets = ((32, 32), (36, 32))
  with pytest.raises(InputError, match="36 rows do not divide over seq=8"):
    vae_build.check_rows(config, SMALL.factor, mesh)
  plain = experiment.get_config("demo")
  plain.data.buckets = config.data.buckets
  with pytest.raises(InputError, match="36 rows do not divide over seq=8"):
    vae_task.vae_task(plain, "", mesh)
  config.data.buckets = ((32, 32), (64, 32))
  vae_build.check_rows(config, SMALL.factor, mesh)


def test_another_vae_is_named(data, original, tmp_path):
  config = short(data, init=original, **{"vae.preset": "qwen_image_2_1"})
  with pytest.raises(InputError, match="is of another model"):
    train.train(config, str(tmp_path / "run"))


def test_l1_alone_takes_the_plain_step():
  assert vae_build.is_plain(experiment.get_config("demo"))
  assert vae_build.is_plain({})
  for name in ("tiny", "256", "decoder", "finetune_2_1"):
    assert not vae_build.is_plain(experiment.get_config(name)), name
  for name in ("l1", "smoothing"):
    config = experiment.get_config("demo")
    config.loss[name] = ((0, 1.0), (10, 0.5))
    assert not vae_build.is_plain(config)


def test_every_variant_is_a_valid_recipe():
  for name in ("256", "512", "2k", "decoder", "finetune_2_1", "tiny", "demo"):
    config = experiment.get_config(name)
    vae_build.check(config)
    train.curriculum(config.data)
    assert json.loads(json.dumps(config.to_dict()))
