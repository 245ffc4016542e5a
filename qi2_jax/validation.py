# SPDX-License-Identifier: Apache-2.0
"""The loss of the averaged weights on data that is never trained on.

`config.validation` names the data and how often. Rows, dropped captions,
noise levels and noise are the same every time, so that values of different
steps compare.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import jax
from absl import logging

from data_pipelines.features import check as features
from data_pipelines.loader.config import LoaderConfig
from data_pipelines.loader.loader import Loader
from qi2_jax import captions
from qi2_jax.errors import InputError
from qi2_jax.parallel import distributed
from qi2_jax.parallel.sharding import put_batch
from qi2_jax.training.task import Task

_SEED = 0x7E57


@contextmanager
def held_out(
  config, task: Task, data: LoaderConfig, mesh
) -> Iterator[Callable[[object, int], dict[str, float]]]:
  """Opens the held-out data.

  Args:
    config: of the run.
    task: its parts.
    data: of the training data; shapes, mixture of the last phase, and limits
      are the same here.
    mesh: where batches go.

  Yields:
    `(state, step) -> {"held_out_loss", ...}`; nothing without data.

  Raises:
    InputError: a path is no dataset, or the objective has no such loss.
  """
  section = config.validation
  if not section.path:
    yield lambda state, step: {}
    return
  if task.loss is None:
    raise InputError(
      f"config.objective={config.objective} has no held-out loss; set "
      "config.validation.path to ''."
    )
  paths = tuple(p.strip() for p in section.path.split(","))
  features.check_models(
    paths, task.signature, config.data.caption_dropout,
    config.data.reference_dropout,
  )  # fmt: skip
  last = dataclasses.replace(data.schedule[-1], start=0)
  held = dataclasses.replace(
    data, paths=paths, weights=None, schedule=(last,), seed=_SEED,
    # Held-out sets are small; a batch with a record twice is still a loss.
    repeat_small=True,
  )  # fmt: skip
  loader = Loader(
    held, task.transform, *distributed.batch_share(mesh),
    captions.measure(held, task),
  )  # fmt: skip
  logging.info("held-out data:\n%s", loader.report())
  loss = jax.jit(lambda ema, rows, key: task.loss(ema, rows, key)[0])

  def validate(state, step: int) -> dict[str, float]:
    del step
    values = []
    with closing(loader.iterate(0)) as batches:
      for i in range(section.batches):
        rows = task.encode(state, put_batch(next(batches), mesh))
        key = jax.random.fold_in(jax.random.key(_SEED), i)
        values.append(loss(state.ema, rows, key))
    values = [float(v) for v in jax.device_get(values)]
    return {"held_out_loss": sum(values) / len(values)}

  try:
    yield validate
  finally:
    loader.close()
