# SPDX-License-Identifier: Apache-2.0
"""The feature cache: losses as without it, resume, several resolutions."""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines import records
from data_pipelines.features.check import read_about
from data_pipelines.features.dataset import FeatureDataset
from data_pipelines.loader.loader import Loader
from data_pipelines.shapes.generate import Options, generate
from experiments import pretrain, vae
from qi2_jax import cache, producer, train
from qi2_jax.conditioning.conditioner import stack
from qi2_jax.errors import InputError
from qi2_jax.parallel import mesh as mesh_lib
from qi2_jax.training import build, cached, frozen
from tests.training.multiprocess_test import finish, start, start_two

pytestmark = pytest.mark.usefixtures("one_device", "built_once")


@pytest.fixture(scope="module")
def built_once():
  """Random models are built once: a new encoder would compile anew."""
  originals = build.built_in, build.frozen_vae
  build.built_in = functools.cache(build.built_in)
  made = build.frozen_vae(tiny("").vae)
  build.frozen_vae = lambda config: made
  yield
  build.built_in, build.frozen_vae = originals


def tiny(path, stage=pretrain, **fields) -> ConfigDict:
  """Five steps on T2I and edits that lose captions and references."""
  config = stage.get_config("tiny")
  config.data.path = str(path)
  config.data.buckets = ((64, 64),)
  config.data.batch_size = 4
  config.data.t2i, config.data.ti2i = 0.5, 0.5
  config.data.caption_dropout = config.data.reference_dropout = 0.4
  config.num_steps = 5
  config.log_every = 1
  config.preview_every = 0
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Rendered shapes; the pixels of one record are damaged."""
  folder = tmp_path_factory.mktemp("data")
  generate(
    str(folder / "sound"), Options(t2i=18, edits=10, sizes=((64, 64),)), 1
  )  # fmt: skip
  sound = records.open_dataset(folder / "sound")
  with records.DatasetWriter(folder / "data", 3, {}) as out:
    for i in range(len(sound)):
      record = sound[i]
      if i == 2:
        broken = dataclasses.replace(
          record.target, data=record.target.data[:99]
        )
        record = dataclasses.replace(record, target=broken)
      out.add(record)
  return folder / "data"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
  out = str(tmp_path_factory.mktemp("cache") / "whole")
  cache.build_cache(tiny(data), out, 4, "exact")
  return out


def scalars(config, workdir) -> list[dict]:
  """Trains; the logged values of every step."""
  assert train.train(config, str(workdir)) == 0
  lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def on_the_fly(data, tmp_path_factory):
  return scalars(tiny(data), tmp_path_factory.mktemp("run"))


def assert_close(first, second, **tolerances):
  assert [r["step"] for r in first] == [r["step"] for r in second]
  assert len({r["loss"] for r in first}) == len(first) == 5
  for name, tolerance in tolerances.items():
    np.testing.assert_allclose(
      [r[name] for r in second], [r[name] for r in first], rtol=0,
      atol=tolerance, err_msg=name,
    )  # fmt: skip


def test_losses_and_gradients_are_those_without_cache(
  whole, on_the_fly, tmp_path
):
  found = scalars(tiny(whole), tmp_path)
  assert_close(on_the_fly, found, loss=1e-6, grad_norm=1e-5, param_norm=1e-5)
  (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
  assert "Unreadable image" in line


def test_previews_show_the_same_images(whole, data):
  samples = [
    train.preview_samples(
      train.loader_config(tiny(path).data, (str(path),), "", 0)
    )
    for path in (data, whole)
  ]
  assert len(samples[0]) == 8
  for a, b in zip(*samples, strict=True):
    assert a["caption"] == b["caption"]
    jax.tree.map(np.testing.assert_array_equal, a["image"], b["image"])
    jax.tree.map(
      np.testing.assert_array_equal, a["references"], b["references"]
    )


@pytest.mark.slow
def test_bfloat16_storage_is_close(data, on_the_fly, tmp_path):
  out = str(tmp_path / "half")
  cache.build_cache(tiny(data), out, 4, "bfloat16")
  found = scalars(tiny(out), tmp_path / "run")
  assert_close(on_the_fly, found, loss=5e-4, grad_norm=5e-3)
  differences = [a["loss"] - b["loss"] for a, b in zip(on_the_fly, found)]
  assert max(map(abs, differences)) > 1e-7


def conditions(path):
  """`{record id: (sample, states of the four conditions)}`."""
  dataset = FeatureDataset(path)
  programs = list(dataset._programs)
  found = {}
  for i in range(len(dataset)):
    for number in dataset._programs_RM[:, i]:
      try:
        sample = dataset.sample(i, programs[number])
      except ValueError:
        continue
      found[sample["id"]] = (
        sample,
        {
          key: sample["condition"](*key)
          for key in itertools.product([False, True], repeat=2)
        },
      )
  return found


def test_only_what_differs_is_stored(whole, monkeypatch):
  stored = []
  original = FeatureDataset._joined

  def spy(self, row, states):
    stored.append((row.task, states))
    return original(self, row, states)

  monkeypatch.setattr(FeatureDataset, "_joined", spy)
  found = conditions(whole)
  assert len(found) == 27
  slots = 4  # of a reference of 64 px
  for task, states in stored:
    if task == "t2i":
      assert states.base == "shared" and states.skip >= 2
    elif states.base:
      assert states.skip > slots  # all slots, and the header before them
      assert len(states.rows) < 16
  kinds = {(task, states.base) for task, states in stored}
  assert kinds == {
    ("t2i", "shared"), ("ti2i", ""), ("ti2i", "full"), ("ti2i", "shared"),
  }  # fmt: skip
  for sample, states in found.values():
    lengths = {key: len(value) for key, (value, _) in states.items()}
    assert lengths[False, False] > lengths[True, False]  # nothing is padded
    edit = sample["task"] == "ti2i"
    different = len({value.tobytes() for value, _ in states.values()})
    assert different == (4 if edit else 2)


def test_interrupted_and_other_batches(data, whole, tmp_path, monkeypatch):
  out, done = str(tmp_path / "again"), []
  original = cache.encode_shard

  def dying(job, folder, shard, *rest):
    if done:
      raise KeyboardInterrupt
    original(job, folder, shard, *rest)
    done.append(shard.name)

  with monkeypatch.context() as patch:
    patch.setattr(cache, "encode_shard", dying)
    with pytest.raises(KeyboardInterrupt):
      cache.build_cache(tiny(data), out, 4, "exact")
  with pytest.raises(ValueError, match=r"another cache \(storage differs\)"):
    cache.build_cache(tiny(data), out, 4, "bfloat16")
  partial = tmp_path / "again.partial"
  first = (partial / done[0]).stat().st_mtime_ns
  cache.build_cache(tiny(data), out, 4, "exact")
  assert pathlib.Path(out, done[0]).stat().st_mtime_ns == first
  names = sorted(p.name for p in pathlib.Path(whole).iterdir())
  assert sorted(p.name for p in pathlib.Path(out).iterdir()) == names
  for name in names:
    if name.endswith((".array_record", ".json")):
      a, b = (pathlib.Path(p, name).read_bytes() for p in (whole, out))
      assert a == b, name
  cache.build_cache(tiny(data), out, 4, "exact")  # complete: does nothing
  with pytest.raises(ValueError, match="already exists and is not this cache"):
    cache.build_cache(tiny(data), out, 4, "bfloat16")


@pytest.mark.parametrize(
  "path, message",
  [
    ("", "is not one dataset folder"),
    ("a,b", "is not one dataset folder"),
    ("/nowhere", "does not exist"),
  ],
)
def test_bad_paths(path, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    cache.build_cache(tiny(path), str(tmp_path / "out"), 4, "exact")


def test_unfit_runs_are_refused(whole, data, tmp_path):
  for config, message in (
    (tiny(whole, **{"text.length": 20}), r"text length \(16 there, 20 here\)"),
    (tiny(f"{whole},{data}"), "use folders of one kind"),
    (tiny(whole, vae, latent_stat_batches=1), "this objective needs pixels"),
    (tiny(whole, **{"data.buckets": ((64, 96),)}), "was made for the buckets"),
  ):
    with pytest.raises(ValueError, match=message):
      train.train(config, str(tmp_path / "run"))
  with pytest.raises(InputError, match="is a feature cache already"):
    cache.build_cache(tiny(whole), str(tmp_path / "out"), 4, "exact")
  with pytest.raises(ValueError, match="holds no images"):
    records.open_dataset(whole)


def models(text_length=16, dtype=jnp.float32):
  """Models around the built-in encoder, with a random VAE."""
  config = tiny("")
  config.text.length = text_length
  mesh = mesh_lib.create_mesh({"data": -1})
  module, variables = build.frozen_vae(config.vae)
  found = frozen.assemble(config, module, variables, mesh)
  encoder = found.conditioner.encoder
  model = encoder.model.clone(
    config=dataclasses.replace(encoder.model.config, dtype=dtype)
  )
  conditioner = dataclasses.replace(
    found.conditioner, encoder=dataclasses.replace(encoder, model=model)
  )
  return dataclasses.replace(found, conditioner=conditioner)


def test_signature_sees_every_model():
  base = models()
  same = cached.signature(base)
  assert same == cached.signature(models())
  assert json.loads(json.dumps(same)) == same

  def changed(**fields):
    other = cached.signature(dataclasses.replace(base, **fields))
    return {name for name in same if other[name] != same[name]}

  def nudge(tree):
    leaves, structure = jax.tree.flatten(tree)
    flat = np.array(leaves[3])
    flat.flat[0] = np.nextafter(flat.flat[0], np.float32(9))
    return structure.unflatten([*leaves[:3], flat, *leaves[4:]])

  params = base.frozen
  assert changed(frozen=params.replace(vae=nudge(params.vae))) == {"vae"}
  assert changed(frozen=params.replace(encoder=nudge(params.encoder))) == {
    "text encoder"
  }
  half = models(dtype=jnp.bfloat16).conditioner
  assert changed(conditioner=half) == {"text encoder"}
  longer = models(20).conditioner
  assert changed(conditioner=longer) == {"text length"}
  encoder = base.conditioner.encoder
  other = dataclasses.replace(encoder, image_mean=(0.4, 0.5, 0.5))
  conditioner = dataclasses.replace(base.conditioner, encoder=other)
  assert changed(conditioner=conditioner) == {"prompt template"}


def test_exact_storage_of_a_bfloat16_encoder_loses_nothing():
  found = models(dtype=jnp.bfloat16)
  conditioner = found.conditioner
  host = conditioner.host("three red circles", (), (64, 64))
  batch = {name: host[name] for name in producer._TEXT_FIELDS}
  batch = stack([batch | {"references": ()}])
  stored = producer._states(
    found.frozen.encoder, batch, conditioner=conditioner, dtype=jnp.bfloat16
  )
  states = jax.jit(conditioner.encode_text)(found.frozen.encoder, batch)
  assert stored.dtype == jnp.bfloat16 and states.dtype == jnp.float32
  np.testing.assert_array_equal(np.asarray(stored, np.float32), states)
  assert np.asarray(states).std() > 0


def test_several_resolutions(data, tmp_path, monkeypatch):
  """Every record has a row per resolution; the encoder is a stand-in."""

  def fake(job, images, texts):
    width = job.models.conditioner.encoder.width
    latents = [
      image[:, ::16, ::16].reshape(len(image), -1, 4).astype(np.float32)
      for image in images
      if image is not None
    ]
    states = {
      name: np.repeat(text["ids"][:, -21:, None], width, axis=2)
      for name, text in texts.items()
    }
    return {"latents": latents, "states": states}

  monkeypatch.setattr(producer, "_encode", fake)
  config = tiny(data, **{"data.reference_dropout": 0.0})
  one = {"buckets": ((64, 64),), "batch_size": 4}
  two = {"buckets": ((32, 32),), "batch_size": 6}
  config.data.resolutions = {"px64": one, "px32": two, "again": one}
  config.data.schedule = ((0, {"px64": 1.0, "px32": 1.0, "again": 1.0}),)
  out = str(tmp_path / "cache")
  cache.build_cache(config, out, 5, "exact")
  assert read_about(out)["buckets"] == [[[64, 64]], [[32, 32]]]

  def tagged(sample, rng):
    pixels = sample["image"] if "image" in sample else sample["latents"]
    image = pixels[::16, ::16] if "image" in sample else pixels
    return {
      "id": np.asarray([ord(c) for c in sample["id"].rjust(30)]),
      "draw": np.float64(rng.random()),
      "pixels": image.reshape(-1, 4).astype(np.float32),
    }

  def batches(path):
    settings = train.loader_config(config.data, (path,), str(tmp_path), 0)
    loader = Loader(settings, tagged)
    made = list(itertools.islice(loader.iterate(), 30))
    loader.close()
    return made

  shapes = set()
  for a, b in zip(batches(str(data)), batches(out), strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    shapes.add(a["pixels"].shape)
  assert shapes == {(4, 16, 4), (6, 4, 4)}


@pytest.mark.slow
def test_two_processes_share_the_shards(data, tmp_path):
  def command(out):
    return [
      sys.executable, "-m", "qi2_jax.cache",
      "--config=experiments/pretrain.py:tiny", f"--config.data.path={data}",
      "--config.data.buckets=((64,64),)",
      "--config.data.reference_dropout=0.4", f"--out={out}", "--batch_size=4",
    ]  # fmt: skip

  one, two = tmp_path / "one", tmp_path / "two"
  log = tmp_path / "one.log"
  finish([start(command(one), log, 4)], 0, log)
  log = tmp_path / "two.0.log"
  finish(start_two(command(two), tmp_path, "two"), 0, log)
  assert "2 shards to encode" in log.read_text()
  assert "1 shards to encode" in (tmp_path / "two.1.log").read_text()
  for name in (p.name for p in one.iterdir() if p.suffix != ".npz"):
    if (one / name).is_file():
      assert (one / name).read_bytes() == (two / name).read_bytes(), name
