# SPDX-License-Identifier: Apache-2.0
"""Training runs of a few steps, and what is in their checkpoints."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from data_pipelines.shapes.generate import Options, generate
from experiments import pretrain
from qi2_jax import train


def render(folder, t2i: int, edits: int) -> str:
  """Renders shapes of 64 px into `folder`; returns its path."""
  generate(
    str(folder), Options(t2i=t2i, edits=edits, sizes=((64, 64),)), workers=1
  )
  return str(folder)


def config(stage, data: str, **fields):
  """A stage's `tiny` variant on batches of 8 of one shape, without pictures.

  Args:
    stage: module of `experiments`.
    data: dataset folder.
    **fields: further fields by dotted name.
  """
  made = stage.get_config("tiny")
  made.data.path = data
  made.data.buckets = ((64, 64),)
  made.data.batch_size = 8
  made.preview_every = 0
  with made.unlocked():
    made.update_from_flattened_dict(fields)
  return made


def pretrained(folder, data: str, learning_rate: float, **fields) -> str:
  """A workdir after two steps so large that the head is far from zero."""
  fields = {
    "num_steps": 2, "ema_decay": 0.0, "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": learning_rate,
  } | fields  # fmt: skip
  assert train.train(config(pretrain, data, **fields), str(folder)) == 0
  return str(folder)


class Killed(Exception):
  """Stands for a power cut: nothing after it runs."""


def train_until(monkeypatch, config, workdir: str, step: int) -> None:
  """Trains until batch `step` is asked for, where the power is cut."""
  original = train.Loader.iterate

  def dying(self, start_step=0):
    for i, batch in enumerate(original(self, start_step), start_step):
      if i == step:
        raise Killed
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(train.Loader, "iterate", dying)
    with pytest.raises(Killed):
      train.train(config, workdir)


def metrics(workdir) -> list[dict]:
  """The rows of metrics.jsonl."""
  text = pathlib.Path(workdir, "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def assert_same_state(workdir, other) -> dict[str, np.ndarray]:
  """The newest checkpoints agree to the bit; returns their arrays."""
  expected, actual = arrays(workdir), arrays(other)
  assert expected.keys() == actual.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
  return expected


def arrays(workdir, step: int | None = None) -> dict[str, np.ndarray]:
  """Every array of a checkpoint, by path; of the newest if `step` is None."""
  folder = pathlib.Path(workdir).absolute() / "checkpoints"
  if step is None:
    step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.restore(folder / str(step) / "state")
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}
