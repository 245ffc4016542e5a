# SPDX-License-Identifier: Apache-2.0
"""A few-step student beside its teacher: rule scores and time, in one run.

    python benchmarks/student_vs_teacher.py --teacher=runs/demo/sft \\
      --student=runs/dmd/best --out=runs/student_vs_teacher

Shapes and glyphs of held-out prompts, made by the teacher in --steps steps
with guidance, by the teacher in as many steps as the student, and by the
student without guidance; the same prompts and the same starting noise. The
score is the share of images with every property right. Writes results.json
and report.html into --out.

The three samplers are timed in alternation on one batch, compiled before; the
time of each is its fastest run, because other programs on the machine can only
add to it. A minute or two on two CPU cores.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence

from absl import flags

from experiments import evaluate as evaluate_config
from qi2_jax import cli
from qi2_jax import evaluate as evaluation
from qi2_jax.errors import InputError
from qi2_jax.evaluation import environment, report, store, suite
from qi2_jax.flow.generate import SamplingConfig
from qi2_jax.pipeline import Pipeline

_SHOWN = 12  # per kind, always the first ones


@dataclasses.dataclass(frozen=True)
class Contender:
  """One way to make the images.

  Attributes:
    name: in tables.
    pipeline: the model.
    sampling: how it is sampled.
    evaluations: forward passes of the network for one image.
  """

  name: str
  pipeline: Pipeline
  sampling: SamplingConfig
  evaluations: int


def contenders(
  teacher: Pipeline, student: Pipeline, steps: int, guidance: float, batch: int
) -> list[Contender]:
  """Teacher slow, teacher fast and student.

  Raises:
    InputError: the second model has no noise levels of its own.
  """
  sigmas = student.sampling.sigmas
  if sigmas is None:
    raise InputError(
      "--student has no noise levels of its own; pass a workdir or folder of a "
      "distilled model."
    )
  passes = 1 if guidance == 1.0 else 2

  def slow(count: int) -> Contender:
    how = dataclasses.replace(
      teacher.sampling, steps=count, guidance=guidance, batch_size=batch
    )
    return Contender(f"teacher, {count} steps", teacher, how, passes * count)

  how = dataclasses.replace(student.sampling, batch_size=batch)
  few = len(sigmas)
  last = Contender(f"student, {few} steps", student, how, few)
  return [slow(steps), slow(max(few, 2)), last]


def seconds_per_image(
  models: Sequence[Contender], config, cases, repeats: int
) -> list[float]:
  """Fastest seconds per image of each, in alternation; one batch each."""
  times = [[] for _ in models]
  for number in range(repeats + 1):
    for model, seen in zip(models, times):
      some = cases[: model.sampling.batch_size]
      make = evaluation.sampler(
        model.pipeline, config, model.sampling, model.name
      )
      start = time.perf_counter()
      make(some)
      if number:  # the first call compiles
        seen.append((time.perf_counter() - start) / len(some))
  return [min(seen) for seen in times]


def scores(judged, kinds: Sequence[str]) -> dict[str, float]:
  """Share of right images by kind, and their mean."""
  out = {
    kind: suite.mean(judged, "all", "model", kind, "held_out") for kind in kinds
  }
  return out | {"mean": statistics.fmean(out.values())}


def page(results: dict, judged: dict, images: dict) -> str:
  """The report: a table, then three grids side by side for each kind."""
  names = list(results["models"])
  header = ("Model", "Evaluations", "Seconds per image", *results["kinds"],
            "mean")  # fmt: skip
  rows = []
  for name in names:
    cell = results["models"][name]
    rows.append(
      (
        name, cell["evaluations"], f"{cell['seconds_per_image']:.3f}",
        *(f"{v:.2f}" for v in cell["scores"].values()),
      )
    )  # fmt: skip
  sections = [report.section("Scores and time", report.table(header, rows))]
  for kind in results["kinds"]:
    halves = []
    for name in names:
      figures = [
        report.figure(image, j.case.prompt, bool(j.figures["all"]))
        for j, image in zip(judged[name], images[name])
        if j.case.kind == kind and j.case.index < _SHOWN
      ]
      cell = results["models"][name]
      label = f"{name}: {cell['seconds_per_image']:.3f} s per image"
      halves.append(report.labelled_gallery(label, figures))
    sections.append(report.section(kind, report.columns(halves)))
  lead = [
    f"{results['n']} held-out prompts per kind, equal prompts and noise, "
    f"{results['machine']}; the student is {results['speedup']:.1f} times as "
    "fast as its teacher. First samples of every kind, not chosen.",
    *(report.note(note) for note in results["notes"]),
  ]
  return report.page("Student and teacher", lead, sections)


def run(values) -> dict:
  """Samples, judges and times; returns what results.json holds."""
  folder = store.create(values.out)
  config = evaluate_config.get_config("shapes")
  config.splits, config.n, config.n_edit = ("held_out",), values.n, 0
  cases = evaluation.t2i_cases(config)
  teacher, student = (
    Pipeline.load(path) for path in (values.teacher, values.student)
  )
  models = contenders(
    teacher, student, values.steps, values.guidance, values.batch_size
  )
  seconds = seconds_per_image(models, config, cases, values.repeats)
  judged, images, cells = {}, {}, {}
  for model, each in zip(models, seconds):
    make = evaluation.sampler(
      model.pipeline, config, model.sampling, model.name
    )
    images[model.name] = make(cases)
    judged[model.name] = suite.judge("model", cases, images[model.name])
    cells[model.name] = {
      "evaluations": model.evaluations,
      "seconds_per_image": each,
      "scores": scores(judged[model.name], config.kinds),
    }
  results = {
    "teacher": values.teacher, "student": values.student,
    "student_step": student.step, "guidance": values.guidance,
    "batch_size": values.batch_size, "n": values.n,
    "kinds": list(config.kinds), "models": cells,
    "speedup": seconds[0] / seconds[-1],
    "notes": list(student.notes), "machine": environment.machine(),
    "versions": environment.versions(),
  }  # fmt: skip
  store.write_json(folder / "results.json", results)
  store.write_text(folder / "report.html", page(results, judged, images))
  for name, cell in cells.items():
    print(
      f"{name:22s} {cell['evaluations']:3d} evaluations  "
      f"{cell['seconds_per_image']:.4f} s per image  "
      f"score {cell['scores']['mean']:.3f}"
    )
  print(f"speed-up {results['speedup']:.1f}: {folder / 'report.html'}")
  return results


def _define_flags() -> None:
  flags.DEFINE_string("teacher", None, "Workdir or folder of the teacher.")
  flags.DEFINE_string("student", None, "Workdir or folder of the student.")
  flags.DEFINE_string("out", None, "Folder to write.")
  flags.DEFINE_integer("steps", 40, "Steps of the teacher.", lower_bound=2)
  flags.DEFINE_float("guidance", 3.0, "Guidance of the teacher.")
  flags.DEFINE_integer("n", 100, "Held-out prompts per kind.", lower_bound=1)
  flags.DEFINE_integer("batch_size", 16, "Images per call.", lower_bound=1)
  flags.DEFINE_integer("repeats", 5, "Timed runs of each.", lower_bound=1)
  flags.mark_flags_as_required(["teacher", "student", "out"])


def main() -> int:
  """Entry point."""
  if not math.isfinite(flags.FLAGS.guidance) or flags.FLAGS.guidance < 0:
    raise InputError(f"--guidance={flags.FLAGS.guidance} must be 0 or more.")
  run(flags.FLAGS)
  return 0


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
