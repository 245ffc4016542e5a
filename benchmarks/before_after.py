# SPDX-License-Identifier: Apache-2.0
"""A model before and after reinforcement learning: rule rewards and pictures.

    python benchmarks/before_after.py --before=runs/demo/sft \\
      --after=runs/grpo --out=runs/grpo_gain

Held-out prompts and edits of shapes and glyphs, the same starting noise for
both, each sampled as its own run says (--steps and --guidance override it for
both). The reward is that of training: half the share of right properties and
half whether all are right, of edits times the share of pixels that were left
alone (P). The share of images with every property right stands beside it, and
of edits O, which goes by pixels alone. Writes results.json and
report.html with the pictures of both side by side. About a minute on two CPU
cores.
"""

import statistics
from collections.abc import Sequence

from absl import flags

from experiments import evaluate as evaluate_config
from qi2_jax import cli
from qi2_jax import evaluate as evaluation
from qi2_jax.evaluation import environment, report, store, suite
from qi2_jax.evaluation.intervals import wilson
from qi2_jax.pipeline import Pipeline

_SHOWN = 12  # per kind, always the first ones
_SIDES = ("before", "after")


def reward(judged: suite.Judged) -> float:
  """The rule reward of one image, as `rewards.rules` gives it."""
  figures = judged.figures
  marks = 0.5 * (figures["atoms"] + figures["all"])
  return marks * figures["P"] if judged.case.suite == "edit" else marks


def cell(judged: Sequence[suite.Judged]) -> dict:
  """Mean reward, share of right images with its interval, number."""
  right = [bool(j.figures["all"]) for j in judged]
  found = {
    "reward": statistics.fmean(map(reward, judged)),
    "all": statistics.fmean(right),
    "interval": wilson(sum(right), len(right)),
    "n": len(right),
  }
  if all("O" in j.figures for j in judged):
    found["O"] = statistics.fmean(j.figures["O"] for j in judged)
  return found


def scores(judged: Sequence[suite.Judged]) -> dict[str, dict]:
  """Cells by kind, and the mean over kinds."""
  kinds = dict.fromkeys(j.case.kind for j in judged)
  out = {k: cell([j for j in judged if j.case.kind == k]) for k in kinds}
  means = {
    name: statistics.fmean(c[name] for c in out.values())
    for name in ("reward", "all", "O")
    if all(name in c for c in out.values())
  }
  return out | {"mean": means}


def gain_table(sides: dict[str, dict]) -> str:
  """One row per kind: both rewards, the gain, both shares, of edits both O."""
  header = ["Kind", "Reward before", "after", "gain", "All right before",
            "after"]  # fmt: skip
  pixels = "O" in sides["before"]["mean"]
  if pixels:
    header += ["O before", "after"]
  rows = []
  for kind in sides["before"]:
    old, new = (sides[side][kind] for side in _SIDES)
    row = [
      kind, f"{old['reward']:.3f}", f"{new['reward']:.3f}",
      f"{new['reward'] - old['reward']:+.3f}", f"{old['all']:.2f}",
      f"{new['all']:.2f}",
    ]  # fmt: skip
    rows.append(row + [f"{c['O']:.2f}" for c in (old, new) if pixels])
  return report.table(header, rows)


def _pictures(kind: str, judged: dict, images: dict) -> str:
  """The first images of a kind, before and after side by side."""
  halves = []
  for side in _SIDES:
    figures = []
    for one, image in zip(judged[side], images[side]):
      if one.case.kind != kind or one.case.index >= _SHOWN:
        continue
      if one.case.source is not None:
        figures.append(report.figure(one.case.source, "source", None))
      passed = bool(one.figures["all"])
      figures.append(report.figure(image, one.case.prompt, passed))
    halves.append(report.labelled_gallery(side, figures))
  return report.section(kind, report.columns(halves))


def page(results: dict, judged: dict, images: dict) -> str:
  """The report: tables first, then every kind before and after."""
  sections = []
  for name, sides in results["suites"].items():
    sections.append(report.section(name, gain_table(sides)))
  for name in results["suites"]:
    kinds = [k for k in results["suites"][name]["before"] if k != "mean"]
    sections += [_pictures(k, judged[name], images[name]) for k in kinds]
  lead = [
    f"{results['before']} against {results['after']}: held-out prompts, equal "
    f"starting noise, {results['sampling']}. First samples of every kind, not "
    "chosen.",
    *(report.note(note) for note in results["notes"]),
  ]
  return report.page("Before and after reinforcement learning", lead, sections)


def run(values) -> dict:
  """Samples and judges both models; returns what results.json holds."""
  folder = store.create(values.out)
  config = evaluate_config.get_config("shapes")
  config.splits = ("held_out",)
  config.n, config.n_edit = values.n, values.n_edit
  config.steps, config.guidance = values.steps, values.guidance
  config.batch_size = values.batch_size
  models = {
    side: Pipeline.load(getattr(values, side)) for side in _SIDES
  }  # fmt: skip
  how = {
    side: evaluation.sampling_config(config, model.sampling)
    for side, model in models.items()
  }
  cases = {
    "text to image": evaluation.t2i_cases(config) if values.n else [],
    "edits": evaluation.edit_cases(config) if values.n_edit else [],
  }
  judged, images, suites = {}, {}, {}
  for name, some in cases.items():
    if not some:
      continue
    judged[name], images[name] = {}, {}
    for side, model in models.items():
      make = evaluation.sampler(model, config, how[side], f"{name}, {side}")
      images[name][side] = make(some)
      judged[name][side] = suite.judge("model", some, images[name][side])
    suites[name] = {side: scores(judged[name][side]) for side in _SIDES}
  results = {
    "before": values.before, "after": values.after,
    "sampling": "; ".join(
      f"{side}: {h.steps} steps, guidance {h.guidance:g}"
      for side, h in how.items()
    ),
    "suites": suites, "notes": list(models["after"].notes),
    "machine": environment.machine(), "versions": environment.versions(),
  }  # fmt: skip
  store.write_json(folder / "results.json", results)
  store.write_text(folder / "report.html", page(results, judged, images))
  for name, sides in suites.items():
    old, new = (sides[side]["mean"] for side in _SIDES)
    print(
      f"{name}: reward {old['reward']:.3f} -> {new['reward']:.3f} "
      f"({new['reward'] - old['reward']:+.3f}), all right {old['all']:.3f} -> "
      f"{new['all']:.3f}"
    )
  print(folder / "report.html")
  return results


def _define_flags() -> None:
  flags.DEFINE_string("before", None, "Workdir or folder of the start.")
  flags.DEFINE_string("after", None, "Workdir or folder of the result.")
  flags.DEFINE_string("out", None, "Folder to write.")
  flags.DEFINE_integer("n", 100, "Prompts per kind.", lower_bound=0)
  flags.DEFINE_integer("n_edit", 50, "Edits per kind.", lower_bound=0)
  flags.DEFINE_integer("steps", None, "Steps of both.", lower_bound=2)
  flags.DEFINE_float("guidance", None, "Guidance of both.", lower_bound=0.0)
  flags.DEFINE_integer("batch_size", 32, "Images per call.", lower_bound=1)
  flags.mark_flags_as_required(["before", "after", "out"])


def main() -> int:
  """Entry point."""
  run(flags.FLAGS)
  return 0


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
