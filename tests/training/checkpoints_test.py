# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what stays, damaged files, disks that are full."""

import contextlib
import os
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.training import checkpoints, state
from qi2_jax.training.checkpoints import CheckpointStore

TX = optax.adam(1e-3)


def make(value: int):
  """A state in which every array says `value`; noise does not compress."""
  noise = jax.random.normal(jax.random.key(0), (64, 500))
  params = {"a": {"kernel": noise + value}, "b": jnp.full((7,), float(value))}
  return state.create(params, TX).replace(step=jnp.int32(value))


@pytest.fixture(scope="module")
def abstract():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
    make(0),
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with steps 2 and 4."""
  workdir = tmp_path_factory.mktemp("saved")
  write(workdir, 2, 4)
  return workdir


def write(workdir, *steps, **options):
  with contextlib.closing(CheckpointStore(str(workdir), **options)) as store:
    for step in steps:
      store.save(step, make(step), {"step": step})


def read(workdir, abstract):
  """The step that `restore_newest` finds, after checking all of its arrays."""
  with contextlib.closing(CheckpointStore(str(workdir))) as store:
    out, meta = store.restore_newest(abstract)
  step = meta["step"]
  jax.tree.map(np.testing.assert_array_equal, out, make(step))
  return step


def names(workdir) -> list[str]:
  return sorted(os.listdir(workdir / "checkpoints"), key=int)


@pytest.mark.parametrize(
  "options, left",
  [
    ({}, [10, 12]),
    ({"keep": 1}, [12]),
    ({"keep": 1, "keep_every": 5}, [5, 10, 12]),
    ({"keep": 2, "keep_every": 4}, [4, 8, 10, 12]),
  ],
)
def test_the_last_and_every_nth_stay(options, left, tmp_path):
  write(tmp_path, 2, 4, 5, 8, 10, 12, **options)
  assert names(tmp_path) == [str(s) for s in left]


def damaged_copies(saved, tmp_path):
  """Copies of the workdir; in each, one file of step 4 is cut or missing."""
  root = saved / "checkpoints" / "4"
  files = [p.relative_to(saved) for p in root.rglob("*") if p.is_file()]
  assert len(files) > 8
  for i, name in enumerate(sorted(files)):
    for kind in ("cut", "gone"):
      copy = tmp_path / f"{i}_{kind}"
      shutil.copytree(saved, copy)
      content = (copy / name).read_bytes()
      (copy / name).unlink()
      if kind == "cut":
        (copy / name).write_bytes(content[: len(content) // 2])
      yield name, copy


def test_damage_is_harmless_or_goes_back_one_step(
  saved, abstract, tmp_path, monkeypatch
):
  said = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *a: said.append(text % a)
  )
  gone_back = 0
  for name, copy in damaged_copies(saved, tmp_path):
    said.clear()
    step = read(copy, abstract)
    said_so = [s for s in said if "checkpoint 4" in s and "step 2" in s]
    aside = list(copy.glob("unreadable_checkpoints/4_*/state"))
    assert (len(said_so), len(aside)) == ((0, 0) if step == 4 else (1, 1)), name
    if step == 2 and not gone_back:
      # The run goes on and saves the lost step again.
      assert names(copy) == ["2"]
      write(copy, 4)
      assert read(copy, abstract) == 4
    gone_back += step == 2
    shutil.rmtree(copy)
  # All arrays lie in a few files; Orbax's own notes may go.
  assert gone_back >= 6


def test_nothing_readable_is_said_and_nothing_moved(saved, abstract, tmp_path):
  work = tmp_path / "run"
  shutil.copytree(saved, work)
  cut(work, 2)
  cut(work, 4)
  store = CheckpointStore(str(work))
  with pytest.raises(InputError, match=r"no checkpoint under .* can be read"):
    store.restore_newest(abstract)
  store.close()
  assert names(work) == ["2", "4"]
  assert not (work / "unreadable_checkpoints").exists()
  assert CheckpointStore(str(tmp_path / "new")).restore_newest(abstract) is None


def cut(workdir, step: int) -> None:
  """Empties the list of arrays of one checkpoint."""
  path = workdir / "checkpoints" / str(step) / "state" / "manifest.ocdbt"
  path.write_bytes(b"")


def test_a_reader_of_one_part_goes_back_too(
  saved, abstract, tmp_path, monkeypatch
):
  said = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *a: said.append(text % a)
  )
  work = tmp_path / "run"
  shutil.copytree(saved, work)
  cut(work, 4)
  store = CheckpointStore(str(work), read_only=True)
  part = lambda step: store.restore_part(step, "ema", abstract.ema)  # noqa: E731
  step, ema = store.newest(part)
  assert step == 2
  jax.tree.map(np.testing.assert_array_equal, ema, make(2).ema)
  (warning,) = (text for text in said if text.startswith("checkpoint 4"))
  assert "going back to step 2" in warning and "are in" not in warning
  assert names(work) == ["2", "4"]  # A reader moves nothing.
  # Who names a step gets that one or a sentence.
  for read in (part, lambda step: store.restore(step, abstract)):
    with pytest.raises(InputError, match=r"^checkpoint 4 .* another step\.$"):
      read(4)
  with pytest.raises(InputError, match=r"^checkpoint 4 "):
    store.saved_part(4, "ema")
  store.close()


@pytest.mark.parametrize("theirs", ["damaged", "failed"])
def test_one_process_decides_for_all(
  theirs, saved, abstract, tmp_path, monkeypatch
):
  """The other process cannot read step 4, or not for this model."""
  work = tmp_path / "run"
  shutil.copytree(saved, work)
  outcome = getattr(checkpoints, f"_{theirs.upper()}")
  votes = iter([4, outcome, 2, 0])
  monkeypatch.setattr(
    checkpoints, "_largest", lambda own: max(own, next(votes))
  )
  store = CheckpointStore(str(work))
  if theirs == "failed":
    with pytest.raises(InputError, match="another process cannot restore"):
      store.restore_newest(abstract)
    assert names(work) == ["2", "4"]
  else:
    _, meta = store.restore_newest(abstract)
    assert meta == {"step": 2} and names(work) == ["2"]
    assert next(votes, None) is None
  store.close()


def test_another_model_is_no_damage(saved, abstract, tmp_path):
  work = tmp_path / "run"
  shutil.copytree(saved, work)
  kernel = jax.ShapeDtypeStruct((3, 3), jnp.float32)
  other = abstract.replace(params={"a": {"kernel": kernel}})
  store = CheckpointStore(str(work))
  with pytest.raises(InputError, match=r"^checkpoint 4 is of another model"):
    store.restore_newest(other)
  store.close()
  assert names(work) == ["2", "4"]


@contextlib.contextmanager
def full_disk(limit: int):
  """No file may grow beyond `limit` bytes: writes fail as on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [50_000, 100])
def test_a_full_disk_loses_nothing(limit, abstract, tmp_path):
  write(tmp_path, 2, keep=1)
  store = CheckpointStore(str(tmp_path), keep=1)
  sentence = r"^cannot save .*/checkpoints \(File too large\); .* step 2 has "
  with full_disk(limit):
    # Saves are asynchronous: the failure shows here or at the next one.
    with pytest.raises(InputError, match=sentence):
      store.save(4, make(4), {"step": 4})
      store.save(6, make(6), {"step": 6})
    with contextlib.suppress(InputError):
      store.close()
  assert read(tmp_path, abstract) == 2
  assert names(tmp_path) == ["2"]
  write(tmp_path, 4, keep=1)
  assert read(tmp_path, abstract) == 4


def test_a_full_disk_shows_at_the_last_save_too(abstract, tmp_path):
  write(tmp_path, 2)
  store = CheckpointStore(str(tmp_path))
  with full_disk(50_000), pytest.raises(InputError, match="step 2 has been"):
    store.save(4, make(4), {"step": 4})
    store.close()
  assert read(tmp_path, abstract) == 2


def test_a_place_that_cannot_be_written(tmp_path):
  pathlib.Path(tmp_path / "checkpoints").write_text("a file is in the way")
  with pytest.raises(InputError, match="cannot write checkpoints to"):
    CheckpointStore(str(tmp_path))
  with pytest.raises(InputError, match="holds no checkpoints"):
    CheckpointStore(str(tmp_path / "nowhere"), read_only=True)
