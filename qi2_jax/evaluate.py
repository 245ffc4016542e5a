# SPDX-License-Identifier: Apache-2.0
"""Scores a trained workdir and writes a report.

    python -m qi2_jax.evaluate --model=runs/sft \\
      --config=experiments/evaluate.py:shapes

Shapes and glyphs are judged by exact rules, beside reference rows (ground
truth, VAE ceiling, shuffled prompts, untrained; for edits also the unedited
source). With --data=DATASET and --config=experiments/evaluate.py:captions
the captions of a dataset are sampled instead, beside its images; its
held-out part is found as DATASET-held_out. Writes results.json,
per_sample.csv, images/ and report.html into --out.

Prompts and noise of a sample depend on config.seed, its kind, its split and
its number alone: neither the batch size nor other samples change it.

With --config=experiments/evaluate.py:vae VAEs are scored, see `evaluate_vae`.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from data_pipelines import imagefolder
from data_pipelines.images import decode_image
from data_pipelines.loader.buckets import Bucket, fit
from data_pipelines.records import open_dataset
from data_pipelines.shapes import checker, edits, prompts
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.render import render
from qi2_jax import cli, evaluate_vae
from qi2_jax.conditioning.conditioner import to_uint8
from qi2_jax.errors import InputError
from qi2_jax.evaluation import environment, report, sections, store, suite
from qi2_jax.evaluation.images import flatten
from qi2_jax.evaluation.progress import reporter
from qi2_jax.evaluation.suite import Case, Image
from qi2_jax.flow.generate import Request, SamplingConfig
from qi2_jax.pipeline import Pipeline

_SPLITS = prompts.SPLITS


def t2i_cases(config) -> list[Case]:
  """Prompts of `config.kinds`, each with its rules and one right image."""
  cases = []
  for kind, split, index in _numbers(config, config.kinds, config.n):
    rng = _rng(config, "t2i", kind, split, index)
    example = prompts.sample_split(kind, split, rng)
    cases.append(
      Case(
        suite="t2i", kind=kind, split=split, index=index,
        prompt=example.prompt, seed=int(rng.integers(2**31)),
        truth=_draw(example.scene, config), score=_rules(example.atoms),
      )
    )  # fmt: skip
  return cases


def edit_cases(config) -> list[Case]:
  """Instructions of `config.edit_kinds` with source and exact result."""
  cases = []
  for kind, split, index in _numbers(config, config.edit_kinds, config.n_edit):
    rng = _rng(config, "edit", kind, split, index)
    example = edits.sample_edit_split(kind, split, rng)
    source, target = (
      _draw(scene, config) for scene in (example.source, example.target)
    )
    cases.append(
      Case(
        suite="edit", kind=kind, split=split, index=index,
        prompt=example.instruction, seed=int(rng.integers(2**31)),
        truth=target, source=source,
        score=_edit_rules(source, target, example.atoms),
      )
    )  # fmt: skip
  return cases


def caption_cases(config, data: str) -> list[Case]:
  """The first records of a dataset and of its held-out part.

  Raises:
    InputError: `data` is no dataset.
  """
  paths = {"seen": data, "held_out": imagefolder.held_out_path(data)}
  cases = []
  for split in config.splits:
    if split == "held_out" and not os.path.isdir(paths[split]):
      continue
    dataset = open_dataset(paths[split])
    for index in range(min(config.n_captions, len(dataset))):
      record = dataset[index]
      truth = _fit(record.target, config)
      references = [_fit(r, config) for r in record.references[:1]]
      rng = _rng(config, "captions", split, index)
      cases.append(
        Case(
          suite="captions", kind="captions", split=split, index=index,
          prompt=record.caption, seed=int(rng.integers(2**31)), truth=truth,
          source=references[0] if references else None,
          score=_psnr_to(truth),
        )
      )  # fmt: skip
    dataset.close()
  return cases


def _numbers(config, kinds: Sequence[str], count: int):
  return [
    (kind, split, index)
    for kind in kinds
    for split in config.splits
    for index in range(count)
  ]


def _rng(config, *name: Any) -> np.random.Generator:
  """Own stream per sample; the text keeps it apart from training data."""
  return np.random.default_rng(
    [config.seed, *"/".join(map(str, name)).encode()]
  )


def _draw(scene, config) -> Image:
  height, width = config.size
  return render(scene, width, height)


def _fit(encoded, config) -> Image:
  return fit(decode_image(encoded), Bucket(*config.size), 3)


def _rules(atoms: dict) -> Callable[[Image], dict[str, float]]:
  def score(image):
    passed = checker.check(image, atoms)
    parts = [value for name, value in passed.items() if name != "all"]
    figures = {name: float(value) for name, value in passed.items()}
    return figures | {"atoms": statistics.fmean(parts)}

  return score


def _edit_rules(source, target, atoms) -> Callable[[Image], dict[str, float]]:
  rules = _rules(atoms)

  def score(image):
    scores = checker.edit_scores(source, target, image)
    return dict(zip("EPO", scores)) | rules(image)

  return score


def _psnr_to(truth: Image) -> Callable[[Image], dict[str, float]]:
  def score(image):
    error = np.mean((np.float64(image) - np.float64(truth)) ** 2)
    return {"psnr": 10 * math.log10(255**2 / max(error, 1e-3))}

  return score


def sampler(
  pipeline, config, sampling: SamplingConfig, label: str
) -> suite.Model:
  """A pipeline as a function from cases to uint8 images over white."""
  height, width = config.size

  def make(cases: Sequence[Case]) -> list[Image]:
    requests = [
      Request(
        prompt=case.prompt, seed=case.seed, height=height, width=width,
        references=() if case.source is None else (case.source,),
      )
      for case in cases
    ]  # fmt: skip
    images = pipeline.generate(requests, sampling, reporter(label, len(cases)))
    return [flatten(to_uint8(image)) for image in images]

  return make


def sampling_config(config, default: SamplingConfig) -> SamplingConfig:
  """The run's sampling settings with what the config overrides."""
  given = {
    name: config[name]
    for name in ("steps", "guidance", "batch_size")
    if config[name] is not None
  }
  return dataclasses.replace(default, **given)


def check_config(config, data: str | None) -> None:
  """Raises InputError for settings that cannot be evaluated."""
  for what, values, known in (
    ("splits", config.splits, _SPLITS),
    ("kinds", config.kinds, vocab.T2I_KINDS),
    ("edit_kinds", config.edit_kinds, vocab.EDIT_KINDS),
  ):
    unknown = [value for value in values if value not in known]
    if unknown or not values:
      raise InputError(
        f"config.{what} holds {unknown or 'nothing'}; use {', '.join(known)}."
      )
  if bool(data) != bool(config.n_captions):
    raise InputError(
      "--data and --config=experiments/evaluate.py:captions belong together; "
      "give both or neither."
    )
  if not config.n + config.n_edit + config.n_captions:
    raise InputError("Nothing to evaluate; raise config.n or config.n_edit.")


def evaluate(pipeline, config, folder, data: str | None = None) -> dict:
  """Samples and judges all suites of the config; writes images and figures.

  Args:
    pipeline: a `Pipeline` or anything that behaves like one.
    config: of experiments/evaluate.py.
    folder: what `store.create` returned.
    data: dataset folder of the captions suite.

  Returns:
    The scores, as in results.json.
  """
  split = "held_out" if "held_out" in config.splits else config.splits[0]
  sampling = sampling_config(config, pipeline.sampling)

  def model(label, of=pipeline):
    return sampler(of, config, sampling, label)

  t2i, edit, captions = [], [], []
  if cases := t2i_cases(config):
    images = model("text to image")(cases)
    store.write_images(folder, cases, model=images)
    t2i = suite.run_t2i(
      cases, images, untrained=model("untrained", pipeline.untrained()),
      untrained_count=config.n_untrained, roundtrip=pipeline.roundtrip,
      split=split,
    )  # fmt: skip
  if cases := edit_cases(config):
    images = model("edits")(cases)
    store.write_images(folder, cases, model=images)
    edit = suite.run_edit(
      cases, images, model=model("shuffled instructions"),
      roundtrip=pipeline.roundtrip, split=split,
    )  # fmt: skip
  if data and (cases := caption_cases(config, data)):
    images = model("captions")(cases)
    coded = pipeline.roundtrip([case.truth for case in cases])
    store.write_images(folder, cases, model=images, vae=coded)
    captions = suite.judge("model", cases, images)
    captions += suite.judge("vae_ceiling", cases, coded)
  store.write_samples(folder, [*t2i, *edit, *captions])
  return {
    "t2i": suite.t2i_results(t2i, split),
    "edit": suite.edit_results(edit, split),
    "captions": _caption_results(captions, config.splits),
  }


def _caption_results(judged, splits) -> dict[str, Any]:
  out = {}
  for split in splits:
    psnr = suite.mean(judged, "psnr", "vae_ceiling", "captions", split)
    if psnr is not None:
      count = [j.row == "model" and j.case.split == split for j in judged]
      out[split] = {"vae_psnr": psnr, "n": sum(count)}
  return out


def write_report(folder, pictures: int) -> None:
  """Writes report.html from the other files of the folder."""
  results = store.read_results(folder)
  lead = [
    f"Scores and samples of {results['model']} after "
    f"{results['step']:,} training steps.",
    sections.notes(results),
  ]
  body = [*sections.scores(folder, pictures), sections.environment(results)]
  page = report.page("qi2_jax evaluation", lead, body)
  store.write_text(folder / "report.html", page)


def run(model: str, config, out: str, data: str | None) -> dict[str, Any]:
  """Loads, evaluates and writes everything; returns results.json."""
  start = time.monotonic()
  check_config(config, data)
  pipeline = Pipeline.load(model)
  folder = store.create(out or os.path.join(model, "evaluation"))
  results = evaluate(pipeline, config, folder, data)
  sampling = sampling_config(config, pipeline.sampling)
  results |= {
    "model": model,
    "step": pipeline.step,
    "notes": list(pipeline.notes),
    "parameters": {
      "mmdit": _count(pipeline.params),
      "vae": _count(pipeline.frozen.vae["params"]),
    },
    "sampling": _plain(sampling),
    "config": config.to_dict(),
    "seconds": round(time.monotonic() - start, 1),
    "versions": environment.versions(),
    "machine": environment.machine(),
    "device": jax.devices()[0].device_kind,
  }
  store.write_json(folder / "results.json", results)
  write_report(folder, config.pictures)
  print(f"{folder / 'report.html'}: {sections.summary(results)}")
  return results


def _count(params) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _plain(sampling: SamplingConfig) -> dict[str, Any]:
  fields = dataclasses.asdict(sampling)
  return {k: v for k, v in fields.items() if k != "shift"} | {
    f"shift_{k}": v for k, v in (fields["shift"] or {}).items()
  }


def _define_flags() -> None:
  flags.DEFINE_string(
    "model", None, "Workdir of a pretrain or sft run; VAEs for :vae."
  )
  config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. experiments/evaluate.py:shapes."
  )
  flags.DEFINE_string("out", "", "Folder to write; default: MODEL/evaluation.")
  flags.DEFINE_string("data", None, "Dataset folder, for :captions and :vae.")
  flags.mark_flags_as_required(["model", "config"])


def main() -> int:
  """Entry point."""
  values = flags.FLAGS
  of_vae = values.config.get("what") == "vae"
  score = evaluate_vae.run if of_vae else run
  score(values.model, values.config, values.out, values.data)
  return 0


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
