# SPDX-License-Identifier: Apache-2.0
"""Every slow acceptance check of the project, as one table.

    make acceptance
    python tests/acceptance/run.py --only=demo
    python tests/acceptance/run.py --list

Writes runs/acceptance.json after each check, so an interrupted run keeps
what it found; ends with status 1 if any check fails. To add a check, add a
name and a function without arguments that returns an `Outcome` to CHECKS.
"""

import datetime
import os
import sys
import time
from collections.abc import Callable

from absl import app, flags

# `python tests/acceptance/run.py` puts only this folder on the path.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.dirname(os.path.dirname(sys.path[0])))

import checks
from checks import DEMO, ROOT, Check, Outcome, at_least, at_most, tests_pass

from qi2_jax.evaluation import environment, store

CHECKS: dict[str, Check] = {
  "demo: position, held out": at_least(
    0.70, lambda: checks.demo()["t2i"]["position"]["held_out"]
  ),
  "demo: glyph, held out": at_least(
    0.35, lambda: checks.demo()["t2i"]["glyph"]["held_out"]
  ),
  "demo: edits, mean O, twice that of copying the source": lambda: _edits(
    lambda mean: 2 * mean["copy_source_O"]
  ),
  # Copying scores 0 by definition and a blank image about 0.4 (much of what
  # has to change becomes background), so this is the bar that can fail.
  "demo: edits, mean O, 0.1 above shuffled instructions": lambda: _edits(
    lambda mean: mean["chance_O"] + 0.1
  ),
  "demo: share of time waiting for data": at_most(0.05, checks.worst_data_wait),
  "demo: seconds of all phases": at_most(
    900, lambda: checks.demo()["seconds"]["total"]
  ),
  "demo: on a folder of 200 captioned images": checks.folder_demo(200),
  "MMDiT and VAE equal diffusers to 1e-5": tests_pass(
    "tests/interop/diffusers_parity_test.py"
  ),
  "Qwen3-VL equals transformers to 5e-6": tests_pass(
    "tests/interop/qwen3_vl_parity_test.py"
  ),
  "pipeline equals QwenImage21Pipeline, 60 dB": tests_pass(
    "tests/pipeline_parity_test.py", "tests/workdir_export_test.py"
  ),
  "folders round trip bit for bit": tests_pass(
    "tests/convert_test.py",
    "tests/interop/model_folder_test.py",
    "tests/interop/full_size_test.py",
  ),
  "folders stream: extra memory of a 1 GB model": tests_pass(
    "tests/interop/folder_memory_test.py"
  ),
  "LoRA equals PEFT and round trips": tests_pass(
    "tests/interop/lora_parity_test.py", "tests/interop/lora_files_test.py"
  ),
  "kill -9 and resume is bit-identical": tests_pass(
    "tests/training/kill_test.py"
  ),
  "8 devices equal one": tests_pass("tests/parallel"),
  "VAE: tiny recipe, 26 dB and SSIM 0.90": tests_pass(
    "tests/evaluation/vae_recipe_test.py"
  ),
  "VAE: a photograph and a page through train, score, report": tests_pass(
    "tests/evaluation/vae_photo_test.py"
  ),
  "CLIP and SigLIP equal transformers to 1e-5": tests_pass(
    "tests/interop/image_text_parity_test.py"
  ),
  "filters on 5,000 dirty files: precision and recall": tests_pass(
    "tests/data_pipelines/dirty_corpus_test.py"
  ),
  "offline pipeline: killed, on other runners, retried": tests_pass(
    "tests/data_pipelines/stage_test.py",
    "tests/data_pipelines/stage_lineage_test.py",
  ),
  "make test: seconds": at_most(
    720, lambda: checks.seconds_of(["make", "test"])
  ),
}


def _edits(bar: Callable[[dict], float]) -> Outcome:
  mean = checks.demo()["edit"]["mean"]
  low = bar(mean)
  passed = mean["O"] > 0 and mean["O"] >= low
  return Outcome(f"{mean['O']:.4g}", f">= {low:.4g}", passed)


def measure(name: str) -> dict:
  """Runs one check; an error of any kind is a failure with its reason."""
  start = time.monotonic()
  try:
    outcome = CHECKS[name]()
  except Exception as error:  # one broken check must not hide the others
    outcome = Outcome(f"{type(error).__name__}: {error}", "no error", False)
  seconds = round(time.monotonic() - start, 1)
  return {
    "name": name, "figure": outcome.figure, "bar": outcome.bar,
    "pass": bool(outcome.passed), "seconds": seconds,
  }  # fmt: skip


def table(rows: list[dict]) -> str:
  """The rows as aligned text."""
  cells = [("check", "figure", "bar", "pass")] + [
    (r["name"], r["figure"], r["bar"], "yes" if r["pass"] else "NO")
    for r in rows
  ]
  widths = [max(len(row[i]) for row in cells) for i in range(4)]
  return "\n".join(
    "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells
  )


def main(argv: list[str]) -> None:
  """Runs what was asked for and reports."""
  values = flags.FLAGS
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  names = [name for name in CHECKS if values.only in name]
  if not names:
    raise app.UsageError(
      f"No check is called like {values.only!r}; see --list."
    )
  if values.list:
    print("\n".join(names))
    return
  rows = []
  (ROOT / "runs").mkdir(exist_ok=True)
  for number, name in enumerate(names, 1):
    print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
    rows.append(measure(name))
    report = {
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "complete": number == len(CHECKS),
      "versions": environment.versions(),
      "machine": environment.machine(),
      "demo": str(DEMO.relative_to(ROOT)),
      "checks": rows,
    }
    store.write_json(ROOT / "runs" / "acceptance.json", report)
  print(table(rows))
  failed = sum(not row["pass"] for row in rows)
  print(f"{len(rows) - failed} of {len(rows)} pass; runs/acceptance.json")
  sys.exit(1 if failed else 0)


if __name__ == "__main__":
  flags.DEFINE_string("only", "", "Run the checks whose name contains this.")
  flags.DEFINE_bool("list", False, "Print the names and stop.")
  try:
    app.run(main)
  except KeyboardInterrupt:
    print("Interrupted; runs/acceptance.json holds the checks that ended.")
    sys.exit(130)
