# SPDX-License-Identifier: Apache-2.0
"""From nothing to generated images and their scores, in one command.

    python -m qi2_jax.demo
    python -m qi2_jax.demo --data=FOLDER
    python -m qi2_jax.demo --pipeline

Renders the shapes-and-glyphs data, trains a tiny VAE, pre-trains a tiny
MMDiT, fine-tunes it on text to image and edits, scores it and writes
WORKDIR/report.html and WORKDIR/results.json; 7 to 13 minutes on two CPU
cores. With --data the images and captions of your own folder take the place
of the rendered data (see data_pipelines/imagefolder.py for its form). With
--pipeline the shapes, rendered text and edit pairs go through the offline
pipeline first: filters, captions, buckets (see data_pipelines/demo_data.py;
needs the extras `data` and `synthesis`, and takes longer). Every
command is printed, so each can be run by hand. Interrupted, the same command
continues where it stopped.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from qi2_jax import cli
from qi2_jax.errors import InputError
from qi2_jax.evaluation import report, sections, store, training_log
from qi2_jax.phases import Journal, Phase, run

_STAGES = {"vae": "VAE", "pretrain": "Pre-training", "sft": "Fine-tuning"}
# Mostly squares: each further shape costs a compilation per stage.
_SHAPES = (
  "--t2i=20000", "--edits=10000", "--sizes=64x64,96x64",
  "--size_weights=6,1",
  "--kinds=single:2,position:3,counting:2,relation:2,glyph:4,word:2",
)  # fmt: skip
_QUICK_SHAPES = ("--t2i=600", "--edits=400")


def plan(
  workdir: pathlib.Path,
  data: str | None,
  held_out: float,
  quick: bool,
  pipeline: bool = False,
) -> list[Phase]:
  """The commands of the demo, in order.

  Args:
    workdir: where everything goes.
    data: folder of the user's images, or None for rendered data.
    held_out: share of the user's images that training does not see.
    quick: smallest configs, to see that everything runs.
    pipeline: whether the offline pipeline makes the rendered data.
  """
  variant = "tiny" if quick else "demo"
  dataset = f"--config.data.path={workdir}/data"
  if pipeline:
    dataset += "/stage/data"
  vae = f"--config.vae.path={workdir}/vae"

  # The shapes' prompts are short; people's captions are not, and a folder may
  # hold fewer images of some shape than a batch.
  text = ("--config.text.length=40",) if data or pipeline else ()
  few = ("--config.data.repeat_small=True",) if data else ()
  if pipeline:  # each rare shape would cost a compilation per stage
    few = (f"--config.data.min_bucket_records={16 if quick else 64}",)

  def train(stage: str, *more: str) -> Phase:
    arguments = (
      "-m", "qi2_jax.train", f"--config=experiments/{stage}.py:{variant}",
      f"--workdir={workdir}/{stage}", dataset, *few, *more,
    )  # fmt: skip
    return Phase(stage, f"Training: {_STAGES[stage]}", arguments)

  return [
    _pipeline_phase(workdir, quick)
    if pipeline
    else _data_phase(workdir, data, held_out, quick),
    train("vae"),
    train("pretrain", vae, *text),
    train("sft", vae, *text, f"--config.init={workdir}/pretrain"),
    _evaluate_phase(workdir, data, quick),
  ]


def _data_phase(workdir, data, held_out, quick) -> Phase:
  product = workdir / "data" / "manifest.json"
  out = f"--out={workdir}/data"
  if data:
    arguments = (
      "-m", "data_pipelines.imagefolder", f"--input={data}", out,
      f"--held_out={held_out:g}",
    )  # fmt: skip
    return Phase("data", "Converting your images", arguments, product)
  numbers = _QUICK_SHAPES if quick else _SHAPES
  arguments = ("-m", "data_pipelines.shapes", out, *numbers)
  return Phase("data", "Rendering the data", arguments, product)


def _pipeline_phase(workdir, quick) -> Phase:
  product = workdir / "data" / "stage" / "manifest.json"
  arguments = (
    "-m", "data_pipelines.demo_data", f"--out={workdir}/data",
    *(("--quick",) if quick else ()),
  )  # fmt: skip
  return Phase("data", "Preparing the data", arguments, product)


def _evaluate_phase(workdir, data, quick) -> Phase:
  if data:
    small = ("--config.n_captions=4", "--config.steps=4") if quick else ()
    variant, more = "captions", (f"--data={workdir}/data", *small)
  else:
    variant, more = ("tiny" if quick else "demo"), ()
  arguments = (
    "-m", "qi2_jax.evaluate", f"--model={workdir}/sft",
    f"--config=experiments/evaluate.py:{variant}",
    f"--out={workdir}/evaluation", *more,
  )  # fmt: skip
  return Phase("evaluate", "Sampling and scoring", arguments)


def collect(workdir: pathlib.Path, journal: Journal) -> dict[str, Any]:
  """The content of results.json: scores, times, training, commands."""
  results = store.read_results(workdir / "evaluation")
  seconds = journal.seconds()
  return results | {
    "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
    "training": {
      stage: training_log.figures(workdir / stage) for stage in _STAGES
    },
    "commands": {
      name: entry["command"] for name, entry in journal.entries.items()
    },
  }


def write_report(
  workdir: pathlib.Path, results: dict[str, Any], pictures: int
) -> pathlib.Path:
  """Writes report.html from results.json and the folders of the phases."""
  stages = [(title, workdir / stage) for stage, title in _STAGES.items()]
  training = {
    title: results["training"][stage] for stage, title in _STAGES.items()
  }
  page = report.page(
    "qi2_jax demo",
    [_introduction(results), sections.notes(results)],
    [
      _tiles(results),
      *sections.scores(workdir / "evaluation", pictures),
      report.section(
        "Training", training_log.table(training), training_log.plots(stages)
      ),
      _timings(results),
      report.section(
        "Exact commands",
        report.paragraph("Run from the repository root, in this order."),
        report.code("\n".join(results["commands"].values())),
      ),
      sections.environment(results),
    ],
  )
  path = workdir / "report.html"
  store.write_text(path, page)
  return path


def _introduction(results: dict[str, Any]) -> str:
  counts, training = results["parameters"], results["training"]
  seen = sum(
    training[stage]["steps"] * training[stage]["batch_size"]
    for stage in ("pretrain", "sft")
  )
  what = (
    "your images and captions"
    if results["captions"]
    else "rendered shapes and glyphs"
  )
  return (
    f"A VAE of {counts['vae'] / 1e6:.2f} M parameters was trained on {what}, "
    f"and a diffusion transformer (MMDiT) of {counts['mmdit'] / 1e6:.2f} M "
    "parameters in its latents, first to make images from text, then also to "
    f"edit them. The transformer saw {seen:,} images; everything together "
    f"took {_minutes(results['seconds']['total'])} on {results['machine']}. "
    "Nothing was downloaded: all weights started from random numbers."
  )


def _tiles(results: dict[str, Any]) -> report.Markup:
  figures = []
  for kind in ("position", "glyph", "mean"):
    if cell := results["t2i"].get(kind):
      name = "all kinds, mean" if kind == "mean" else kind
      remark = f"chance {_show(cell['chance'])}"
      figures.append((_show(cell["held_out"]), f"{name}, held out", remark))
  if results["edit"]:
    cell = results["edit"]["mean"]
    remark = f"shuffled {_show(cell['chance_O'])}"
    figures.append((_show(cell["O"]), "edits, mean O", remark))
  for split, cell in results["captions"].items():
    name = "seen" if split == "seen" else "held out"
    value = f"{cell['vae_psnr']:.1f} dB"
    figures.append((value, f"VAE PSNR, {name}", f"{cell['n']} images"))
  total = _minutes(results["seconds"]["total"])
  figures.append((total, "all phases", results["device"]))
  return report.tiles(figures)


def _timings(results: dict[str, Any]) -> report.Markup:
  seconds = results["seconds"]
  rows = [(name, f"{value:,.0f}") for name, value in seconds.items()]
  return report.section("Time", report.table(("Phase", "Seconds"), rows))


def _show(value: float | None) -> str:
  return "–" if value is None else f"{value:.2f}"


def _minutes(seconds: float) -> str:
  return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def demo(
  workdir: pathlib.Path, phases: Sequence[Phase], pictures: int = 12
) -> int:
  """Runs the phases, then writes report and results; returns the status."""
  if not pathlib.Path("experiments").is_dir():
    raise InputError(
      "There is no experiments folder here; run the demo from the root of the "
      "repository."
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      f"Cannot create {workdir} ({error.strerror}); choose another --workdir."
    ) from error
  journal = Journal(workdir / "phases.json", phases)
  status = run(phases, journal)
  if status:
    return status
  results = collect(workdir, journal)
  store.write_json(workdir / "results.json", results)
  path = write_report(workdir, results, pictures)
  print(f"\nReport: {path}")
  total = _minutes(results["seconds"]["total"])
  print(f"Result: {sections.summary(results)} ({total})", flush=True)
  return 0


def _define_flags() -> None:
  flags.DEFINE_string(
    "workdir", None, "Default: runs/demo, or runs/demo-NAME with options."
  )
  flags.DEFINE_string(
    "data", None, "Folder of your own images with captions; none: rendered."
  )
  flags.DEFINE_bool(
    "pipeline", False, "Send the rendered data through the offline pipeline."
  )
  flags.DEFINE_float(
    "held_out",
    0.1,
    "With --data: share of the images to keep out of training.",
    lower_bound=0,
    upper_bound=0.99,
  )
  flags.DEFINE_bool(
    "quick", False, "Smallest configs: shows that all runs, learns nothing."
  )


def main() -> int:
  """Entry point."""
  values = flags.FLAGS
  name = "demo-pipeline" if values.pipeline else "demo"
  if values.data and values.pipeline:
    raise InputError(
      "--pipeline is for rendered data; send a folder of your own through "
      "`python -m data_pipelines.run` (docs/data.md)."
    )
  if values.data:
    folder = pathlib.Path(values.data)
    if not folder.is_dir():
      raise InputError(f"--data folder {folder} does not exist; check it.")
    name = f"demo-{folder.resolve().name}"
  workdir = pathlib.Path(values.workdir or f"runs/{name}")
  phases = plan(
    workdir, values.data, values.held_out, values.quick, values.pipeline
  )
  return demo(workdir, phases, pictures=24 if values.data else 12)


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
