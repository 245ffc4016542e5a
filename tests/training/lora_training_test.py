# SPDX-License-Identifier: Apache-2.0
"""LoRA training: the factors learn, the base stays, files say the rest."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import short_runs

from experiments import pretrain, sft, vae
from qi2_jax import convert, train
from qi2_jax.errors import InputError
from qi2_jax.interop import lora as lora_files
from qi2_jax.interop import model_folder
from qi2_jax.models import mmdit
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.parallel.sharding import tree_shardings
from qi2_jax.pipeline import Pipeline
from qi2_jax.training import adapter, weights, workdir

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return short_runs.render(tmp_path_factory.mktemp("data") / "shapes", 16, 8)


def short(stage, data, **fields):
  fields = {
    "data.ti2i": 0.0, "num_steps": 4, "save_every": 2, "log_every": 1,
    "optimizer.warmup_steps": 0, "sampling.steps": 2,
    "sampling.guidance": 2.0, "sampling.batch_size": 1,
  } | fields  # fmt: skip
  return short_runs.config(stage, data, **fields)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
  """A base whose head does not start at zero."""
  path = str(tmp_path_factory.mktemp("base") / "pretrain")
  fields = {"optimizer.learning_rate": 0.05, "ema_decay": 0.0, "num_steps": 2}
  assert train.train(short(pretrain, data, **fields), path) == 0
  return path


def lora_config(data, base, **fields):
  fields = {
    "init": base, "vae.path": base, "lora.rank": 2, "lora.alpha": 4.0,
    "optimizer.learning_rate": 0.02, "ema_decay": 0.5,
  } | fields  # fmt: skip
  return short(sft, data, **fields)


@pytest.fixture(scope="module")
def base_before(base):
  return short_runs.arrays(base)


@pytest.fixture(scope="module")
def run(data, base, base_before, tmp_path_factory):
  path = str(tmp_path_factory.mktemp("lora") / "run")
  assert train.train(lora_config(data, base), path) == 0
  return path


def metrics_of(path: str) -> list[str]:
  return pathlib.Path(path, "metrics.jsonl").read_text().splitlines()


def draw(pipeline):
  noise = np.random.default_rng(0).normal(size=(1, 4, 4, 64))
  return pipeline(
    ["the letter B in red"], latents=noise.astype(np.float32), steps=3,
    guidance=1.0, resolution=64, height=64, width=64,
  )[0]  # fmt: skip


def assert_same_arrays(one, other):
  assert one.keys() == other.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_a_checkpoint_holds_the_factors_only(base, run):
  full, small = short_runs.arrays(base), short_runs.arrays(run)
  assert sum(a.size for a in small.values()) < (
    0.2 * sum(a.size for a in full.values())
  )
  for part in ("params", "ema", "opt_state"):
    names = [n for n in small if part in n and "kernel" in n]
    assert names and all(n.endswith(("['a']", "['b']")) for n in names)
  record = json.loads(pathlib.Path(run, "base.json").read_text())
  assert record["path"] == base and record["step"] == 2


@pytest.fixture(scope="module")
def plain(base):
  return Pipeline.load(base)


@pytest.fixture(scope="module")
def image(run):
  return draw(Pipeline.load(run))


def test_the_base_is_left_alone(base, base_before, run):
  assert_same_arrays(base_before, short_runs.arrays(base))
  # What lies under the factors in use is its EMA.
  ours, theirs = workdir.load(run).params, workdir.load(base).params
  for name in ("proj_out", "img_in"):
    jax.tree.map(np.testing.assert_array_equal, ours[name], theirs[name])


def test_the_adapter_makes_the_image_of_the_run(
  base, run, plain, image, tmp_path
):
  assert np.abs(image - draw(plain)).max() > 1e-2
  path = str(tmp_path / "adapter.safetensors")
  convert.export_model(run, path)
  assert lora_files.is_adapter(path)
  merged = plain.with_loras([path])
  np.testing.assert_allclose(draw(merged), image, atol=1e-6)
  with pytest.raises(InputError, match="holds no adapter"):
    convert.export_model(base, str(tmp_path / "x.safetensors"))


def test_the_exported_pipeline_has_the_merged_weights(run, image, tmp_path):
  folder = str(tmp_path / "pipeline")
  convert.export_model(run, folder)
  _, params = model_folder.load_mmdit(folder)
  for a, b in zip(
    jax.tree.leaves(params), jax.tree.leaves(workdir.load(run).params),
    strict=True,
  ):  # fmt: skip
    np.testing.assert_array_equal(a, b)


def test_a_next_stage_starts_from_the_merged_weights(run):
  """On eight devices, though the run had one."""
  merged = workdir.load(run).params
  mesh = create_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
  places = tree_shardings(merged, mmdit.SHARDING_RULES, mesh)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    merged, places,
  )  # fmt: skip
  params = weights.initial_params(run, abstract)
  for a, b, place in zip(*map(jax.tree.leaves, (params, merged, places))):
    assert a.sharding == place
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_a_moved_or_changed_base_is_noticed(data, base, run, tmp_path):
  mine, gone, moved = (str(tmp_path / n) for n in ("run", "gone", "moved"))
  shutil.copytree(run, mine)
  shutil.copytree(base, moved)
  record = json.loads(pathlib.Path(mine, "base.json").read_text())

  def write(**fields):
    pathlib.Path(mine, "base.json").write_text(json.dumps(record | fields))

  write(path=gone)
  with pytest.raises(InputError, match=r"base of the LoRA run .* is gone"):
    workdir.load(mine)
  # The adapter alone needs no base.
  convert.export_model(mine, str(tmp_path / "a.safetensors"))
  # The new place is remembered.
  assert train.train(lora_config(data, moved), mine) == 0
  text = pathlib.Path(mine, "base.json").read_text()
  assert json.loads(text) == record | {"path": moved}
  workdir.load(mine)
  # Other weights under the old name are refused.
  write(checksum=record["checksum"] ^ 1)
  with pytest.raises(InputError, match="other weights"):
    workdir.load(mine)
  pathlib.Path(mine, "base.json").write_text("{}")
  with pytest.raises(InputError, match="cannot be read"):
    workdir.load(mine)


def test_resume_is_bit_identical(data, base, run, tmp_path, monkeypatch):
  broken = str(tmp_path / "broken")
  config = lora_config(data, base)
  short_runs.train_until(monkeypatch, config, broken, 3)
  assert train.train(config, broken) == 0
  assert_same_arrays(short_runs.arrays(run), short_runs.arrays(broken))


def test_a_checksum_sees_every_bit_and_no_sharding():
  tree = {"a": jnp.arange(48.0).reshape(8, 6), "b": jnp.ones(3)}
  mesh = jax.make_mesh((8,), ("x",))
  place = jax.NamedSharding(mesh, jax.P("x"))
  split = tree | {"a": jax.device_put(tree["a"], place)}
  assert weights.checksum(split) == weights.checksum(tree)
  bits = np.asarray(tree["b"]).view(np.uint32).copy()
  bits[1] ^= 1
  changed = tree | {"b": jnp.asarray(bits.view(np.float32))}
  assert weights.checksum(changed) != weights.checksum(tree)


def test_readers_of_a_damaged_run_go_back(base, run, tmp_path):
  mine, theirs = str(tmp_path / "run"), str(tmp_path / "base")
  shutil.copytree(run, mine)
  shutil.copytree(base, theirs)
  older = workdir.load_adapter(mine)
  damage = lambda path, step: pathlib.Path(  # noqa: E731
    path, f"checkpoints/{step}/state/manifest.ocdbt"
  ).write_bytes(b"")
  damage(mine, 4)
  loaded = workdir.load(mine)
  assert loaded.step == 2
  factors = workdir.load_adapter(mine).factors
  assert any(
    np.any(np.asarray(x) != np.asarray(y))
    for x, y in zip(jax.tree.leaves(older.factors), jax.tree.leaves(factors))
  )
  # A base is named by its step, so nothing else will do.
  record = json.loads(pathlib.Path(mine, "base.json").read_text())
  record["path"] = theirs
  pathlib.Path(mine, "base.json").write_text(json.dumps(record))
  damage(theirs, record["step"])
  with pytest.raises(InputError, match=r"^checkpoint 2 under .* cannot be"):
    workdir.load(mine)


@pytest.mark.parametrize(
  "stage, fields, message",
  [
    (sft, {"init": ""}, "needs a base"),
    (vae, {"init": "runs/vae"}, "this run trains a vae"),
  ],
)
def test_configs_without_a_base_are_refused(
  stage, fields, message, data, tmp_path
):
  config = short(stage, data, **{"lora.rank": 2} | fields)
  with pytest.raises(InputError, match=message):
    train.train(config, str(tmp_path / "run"))


def test_bad_bases_and_targets_are_refused(run, tmp_path):
  merged = workdir.load(run).params
  with pytest.raises(InputError, match="is itself a LoRA run"):
    weights.own_base(run, str(tmp_path), merged)
  with pytest.raises(InputError, match="holds no checkpoints"):
    weights.own_base("/nowhere", str(tmp_path), merged)
  assert not list(tmp_path.iterdir())
  for fields, message in (
    ({"targets": ("blocks/nothing",)}, "matches no kernel"),
    ({"rank": -1}, "rank -1 must be at least 1"),
  ):
    config = adapter.LoraConfig(**{"rank": 2, "alpha": 2.0, "targets": ()}
                                | fields)  # fmt: skip
    with pytest.raises(InputError, match=message):
      adapter.init_factors(config, merged, jax.random.key(0))
