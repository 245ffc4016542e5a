# SPDX-License-Identifier: Apache-2.0
"""Trains any stage: VAE, pre-training, fine-tuning.

    python -m qi2_jax.train --config=experiments/pretrain.py:tiny \\
      --workdir=runs/pretrain

Run the same command again to resume: parameters, optimizer, EMA and data
order continue bit for bit, on another mesh too (--config.mesh.fsdp=8; there
up to rounding). Any config field can be overridden:
--config.optimizer.learning_rate=3e-4. The workdir receives checkpoints/,
config.json, metrics.jsonl, samples/*.png and tensorboard/; profile/ on request
(--config.profile_steps=5).

Exit status, for launchers:

    0          all steps are done
    143        stopped by SIGTERM; what was trained is saved and the same
               command goes on: restart it
    130        the same after Ctrl-C; somebody wanted it to stop
    2          bad input, a run that diverged, a full disk: one sentence says
               what to change; a restart alone would not help
    other      a crash; the same command goes on from the newest checkpoint
"""

import contextlib
import dataclasses
import functools
import json
import math
import os

import jax
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from data_pipelines.features import check as features
from data_pipelines.images import decode_image
from data_pipelines.loader.buckets import assign, check_buckets, fit
from data_pipelines.loader.config import (
  LoaderConfig,
  Phase,
  Resolution,
  check_schedule,
)
from data_pipelines.loader.curriculum import leading
from data_pipelines.loader.loader import Loader
from data_pipelines.records import open_dataset, read_manifest
from data_pipelines.shapes.generate import Options, generate
from qi2_jax import captions, cli, judging, validation
from qi2_jax.errors import InputError
from qi2_jax.parallel import distributed
from qi2_jax.parallel import mesh as mesh_lib
from qi2_jax.training import (
  adapter,
  checkpoints,
  health,
  loop,
  profile,
  program,
  progress,
  steps,
  weights,
)
from qi2_jax.training.metrics import Silent, Writers
from qi2_jax.training.tasks import TASKS

# Fields that may differ when a run is resumed: they do not change the result.
_FREE_FIELDS = (
  "log_every", "save_every", "preview_every", "keep_checkpoints", "keep_every",
  "max_skipped_steps", "loss_spike", "profile_start", "profile_steps", "mesh",
  "model.remat", "model.kernel", "data.threads", "data.path",
  "data.repeat_small", "vae.path", "text.path", "init", "sampling",
  "validation", "optimizer.accumulate",
)  # fmt: skip
_PREVIEW_IMAGES = 8


def prepare_workdir(workdir: str, config: dict) -> None:
  """Creates the workdir, or checks that it belongs to this config.

  A config without any checkpoint binds nobody: it is replaced.

  Raises:
    InputError: it cannot be written or holds another config.
  """
  path = os.path.join(workdir, "config.json")
  try:
    os.makedirs(workdir, exist_ok=True)
    if not (os.path.exists(path) and checkpoints.has_checkpoint(workdir)):
      with open(path + ".tmp", "w") as file:
        json.dump(config, file, indent=2)
      os.replace(path + ".tmp", path)
      return
    with open(path) as file:
      old = json.load(file)
  except OSError as error:
    raise InputError(
      f"cannot write to workdir {workdir} ({error.strerror}); choose another."
    ) from error
  new = json.loads(json.dumps(config))
  for name in sorted(old.keys() | new.keys()):
    difference = _difference(name, old.get(name), new.get(name))
    if difference:
      raise InputError(
        f"workdir {workdir} holds a run with another config ({difference}); "
        "use a new workdir or the old config."
      )


def _difference(name: str, old, new) -> str:
  """First differing field below `name`, as `name: old -> new`, or ''."""
  if name in _FREE_FIELDS or old == new:
    return ""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(old.keys() | new.keys()):
      found = _difference(f"{name}.{key}", old.get(key), new.get(key))
      if found:
        return found
    return ""
  return f"{name}: {old!r} there, {new!r} here"


def data_paths(config, workdir: str) -> tuple[str, ...]:
  """The dataset folders; with none given, renders shapes into the workdir.

  Raises:
    InputError: a folder is no dataset (found before anything is built).
  """
  if config.path:
    paths = tuple(p.strip() for p in config.path.split(","))
    for path in paths:
      read_manifest(path)
    return paths
  path = os.path.join(workdir, "data")
  logging.warning("config.data.path is empty: training on rendered shapes")
  shapes = [b for r in curriculum(config)[0].values() for b in r.buckets]
  sizes = tuple((w, h) for h, w in dict.fromkeys(shapes))
  options = Options(
    t2i=config.rendered_t2i, edits=config.rendered_edits, sizes=sizes,
  )  # fmt: skip
  distributed.on_first(lambda: generate(path, options, workers=1))
  return (path,)


def curriculum(config) -> tuple[dict[str, Resolution], tuple[Phase, ...]]:
  """Resolutions and schedule of `config.data`.

  `buckets` and `batch_size` alone are one resolution, from start to end.

  Raises:
    InputError: the schedule does not fit the resolutions, or `buckets` and
      `batch_size` are those of none of them.
  """

  def resolution(fields):
    buckets = tuple(tuple(b) for b in fields.buckets)
    return Resolution(buckets, fields.batch_size)

  single = resolution(config)
  if not (config.resolutions or config.schedule):
    name = f"px{round(math.sqrt(math.prod(check_buckets(single.buckets)[0])))}"
    return {name: single}, (Phase(0, {name: 1.0}),)
  resolutions = {n: resolution(r) for n, r in config.resolutions.items()}
  try:
    schedule = tuple(
      Phase(int(start), {n: float(share) for n, share in dict(shares).items()})
      for start, shares in config.schedule
    )
  except (TypeError, ValueError) as error:
    raise InputError(
      f"config.data.schedule={config.schedule!r} cannot be read; write "
      '((0, {"NAME": share, ...}), (step, {...}), ...).'
    ) from error
  check_schedule(schedule, resolutions)
  if single not in resolutions.values():
    raise InputError(
      "config.data.buckets and batch_size are those of no resolution in "
      "config.data.resolutions; set them to the pair that sampling and aot "
      "should take, as `set_curriculum` in experiments/common.py does."
    )
  return resolutions, schedule


def _quarantine_path(workdir: str, process: int) -> str:
  """A file of each process's own: appends to shared storage would mix."""
  suffix = f"_{process}" if process else ""
  return os.path.join(workdir, f"quarantine{suffix}.jsonl")


def loader_config(config, paths, workdir: str, seed: int) -> LoaderConfig:
  """`config.data` as the loader's own dataclass."""
  resolutions, schedule = curriculum(config)
  return LoaderConfig(
    paths=paths,
    resolutions=resolutions,
    schedule=schedule,
    task_weights={"t2i": config.t2i, "ti2i": config.ti2i},
    max_enlarge=config.max_enlarge,
    weights=tuple(config.weights or ()) or None,
    min_bucket_records=config.min_bucket_records,
    repeat_small=config.repeat_small,
    max_references=config.max_references,
    seed=seed,
    threads=config.threads,
    quarantine_path=_quarantine_path(workdir, jax.process_index()),
  )


def preview_samples(config: LoaderConfig, step: int = 0) -> list[dict]:
  """The first records of the data, T2I and edits in turn, for sample grids.

  They have the shapes of the resolution that a step most likely has.
  """
  dataset = open_dataset(features.image_folder(config.paths[0]))
  edit = dataset.index.references > 0
  groups = [np.flatnonzero(edit == kind) for kind in (False, True)]
  half = _PREVIEW_IMAGES // 2
  chosen = np.concatenate([g[:half] for g in groups])
  resolution = config.resolutions[leading(config.schedule, step)]
  buckets = check_buckets(resolution.buckets)

  def pixels(encoded):
    which = assign(encoded.width, encoded.height, buckets, np.inf)
    return fit(decode_image(encoded), buckets[which], config.channels)

  samples = []
  for i in chosen:
    record = dataset[int(i)]
    samples.append(
      {
        "caption": record.caption,
        "image": pixels(record.target),
        "references": tuple(pixels(r) for r in record.references),
      }
    )
  dataset.close()
  return samples


def initial_state(config, task, mesh, store):
  """Resumes, or starts from `config.init`, or from scratch; in this order.

  Returns:
    `(state on the mesh, meta of the checkpoint or None)`.
  """
  key = jax.random.fold_in(jax.random.key(config.seed), 0x1417)
  abstract = program.abstract_state(task.init, task.start, task.rules, mesh)
  shardings = program.shardings_of(abstract)
  restored = store.restore_newest(abstract)
  if restored:
    logging.info("resuming from step %d", restored[1]["step"])
    return restored
  if not config.init or adapter.from_config(config):
    # The factors of a LoRA are new; its base belongs to the task.
    create = lambda key: task.start(task.init(key))  # noqa: E731
    return jax.jit(create, out_shardings=shardings)(key), None
  params = weights.initial_params(config.init, abstract.params)
  start = jax.jit(task.start, donate_argnums=0, out_shardings=shardings)
  return start(params), None


def train(config, workdir: str) -> int:
  """Runs one stage to its end; returns the process's exit status."""
  if config.objective not in TASKS:
    raise InputError(
      f"config.objective={config.objective!r} is unknown; use one of "
      f"{sorted(TASKS)}."
    )
  mesh = mesh_lib.create_mesh(config.mesh.to_dict())
  for resolution in curriculum(config.data)[0].values():
    steps.check_batch(
      resolution.batch_size, config.optimizer.accumulate, mesh
    )  # fmt: skip
  distributed.on_first(lambda: prepare_workdir(workdir, config.to_dict()))
  paths = data_paths(config.data, workdir)
  data = dataclasses.replace(
    loader_config(config.data, paths, workdir, config.seed),
    text_lengths=captions.lengths(config.text),
  )
  with jax.set_mesh(mesh):
    task = TASKS[config.objective](
      config, workdir, mesh, **judging.arguments(config)
    )
    features.check_models(
      paths, task.signature, config.data.caption_dropout,
      config.data.reference_dropout,
    )  # fmt: skip
    loader = Loader(
      data, task.transform, *distributed.batch_share(mesh),
      captions.measure(data, task),
    )  # fmt: skip
    logging.info("data:\n%s", loader.report())
    try:
      stopped = _run(config, workdir, mesh, task, loader, data)
    finally:
      loader.close()
  if loader.corrupt_count:
    logging.warning(
      "%d damaged records were replaced; see %s",
      loader.corrupt_count, data.quarantine_path,
    )  # fmt: skip
  if stopped:
    logging.warning("stopped; run the same command to continue")
    return 128 + stopped
  logging.info("finished %d steps in %s", config.num_steps, workdir)
  return 0


def _run(config, workdir, mesh, task, loader, data) -> int:
  """Restores the state and runs the loop; returns a signal number or 0."""
  store = checkpoints.CheckpointStore(
    workdir, keep=config.keep_checkpoints, keep_every=config.keep_every
  )
  train_state, meta = initial_state(config, task, mesh, store)
  start = int(train_state.step)
  if meta:
    task.restore(meta.get("task", {}))
  if meta and meta["data"] != loader.fingerprint:
    logging.warning(
      "the data or its decoders changed since step %d; the run continues, "
      "but not with the batches it would have seen", start,
    )  # fmt: skip
  _log_size(train_state.params, mesh)
  batches = loader.iterate(start)
  step_fn = program.jit_step(task.step, program.shardings_of(train_state), mesh)
  settings = loop.LoopConfig(
    config.num_steps, config.log_every, config.save_every,
    config.preview_every,
    config.validation.every if config.validation.path else 0, config.seed,
  )  # fmt: skip
  first = jax.process_index() == 0
  writers = Writers(workdir, start) if first else Silent()
  with (
    contextlib.closing(store),
    contextlib.closing(writers),
    validation.held_out(config, task, data, mesh) as validate,
  ):
    train_state, stopped = loop.run(
      train_state, step_fn, task.encode, batches, settings, mesh=mesh,
      store=store, writers=writers,
      health=health.Health(
        workdir, config.max_skipped_steps, config.loss_spike,
        meta and meta.get("health"),
      ),
      window=profile.ProfileWindow(
        f"{workdir}/profile", config.profile_start, config.profile_steps
      ),
      meta=lambda step: {
        "step": step, "data": loader.fingerprint, "task": task.record(),
      },
      preview=functools.partial(_preview, task, data),
      validate=validate,
      work=lambda features: progress.work_of(config, features),
    )  # fmt: skip
    if not stopped:
      task.finish(train_state.ema, batches)
  return stopped


def _preview(task, data: LoaderConfig, train_state, step: int) -> dict:
  task.watch(train_state)
  # A grid after step n shows what the batches before it taught.
  return task.preview(train_state.ema, preview_samples(data, step - 1))


def _log_size(params, mesh) -> None:
  count = program.elements(params)
  shape = {k: v for k, v in mesh.shape.items() if v > 1}
  device = mesh.devices.flat[0].device_kind
  logging.info(
    "%.2f M parameters on %d x %s, mesh %s",
    count / 1e6, mesh.size, device, shape or "of one device",
  )  # fmt: skip


def _define_flags():
  config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. experiments/pretrain.py:tiny."
  )
  flags.DEFINE_string("workdir", None, "Folder for everything the run writes.")
  flags.mark_flags_as_required(["config", "workdir"])


def main() -> int:
  """Entry point."""
  distributed.initialise()
  if jax.process_index():
    # Process 0 speaks for all; what the others warn of may be theirs alone.
    logging.set_verbosity(logging.WARNING)
  return train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
