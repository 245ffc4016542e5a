# SPDX-License-Identifier: Apache-2.0
"""Building blocks of acceptance checks: measure something, compare it."""

import dataclasses
import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = ROOT / "runs" / "demo"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What was found, what was asked for, and whether that is enough."""

  figure: str
  bar: str
  passed: bool


Check = Callable[[], Outcome]


class CheckError(Exception):
  """A check could not be carried out; the message says why."""


def at_least(bar: float, measure: Callable[[], float]) -> Check:
  """Passes if the measured number is `bar` or more."""

  def check() -> Outcome:
    value = measure()
    return Outcome(f"{value:.4g}", f">= {bar:g}", value >= bar)

  return check


def at_most(bar: float, measure: Callable[[], float]) -> Check:
  """Passes if the measured number is `bar` or less."""

  def check() -> Outcome:
    value = measure()
    return Outcome(f"{value:.4g}", f"<= {bar:g}", value <= bar)

  return check


def tests_pass(*arguments: str) -> Check:
  """Passes if pytest does, and found at least one test.

  Args:
    *arguments: files and options, e.g. "tests/training", "-k", "resume".
  """

  def check() -> Outcome:
    # `-m ""` also selects the slow tests.
    command = ["-m", "pytest", "-q", "-m", "", *arguments]
    status, output = run(command)
    lines = [line for line in output.splitlines() if line.strip()]
    counts = re.findall(
      r"\d+ (?:passed|failed|errors?|skipped)", lines[-1] if lines else ""
    )
    figure = ", ".join(counts) or f"pytest status {status}"
    passed = status == 0 and any("passed" in count for count in counts)
    if not passed:
      print(output[-4000:], file=sys.stderr)
    return Outcome(figure, "all pass", passed)

  return check


def run(arguments: list[str], **options) -> tuple[int, str]:
  """Runs Python from the repository root; returns status and output."""
  done = subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT, **options,
  )  # fmt: skip
  return done.returncode, done.stdout


def seconds_of(command: list[str]) -> float:
  """Wall time of a command that must succeed, from the repository root."""
  start = time.monotonic()
  done = subprocess.run(command, cwd=ROOT)
  if done.returncode:
    raise CheckError(f"{' '.join(command)} ended with {done.returncode}")
  return time.monotonic() - start


@functools.cache
def demo() -> dict:
  """runs/demo/results.json; the demo runs first if it is missing."""
  path = DEMO / "results.json"
  if not path.exists():
    done = subprocess.run([sys.executable, "-m", "qi2_jax.demo"], cwd=ROOT)
    if done.returncode:
      raise CheckError(f"the demo ended with status {done.returncode}")
  return json.loads(path.read_text())


def worst_data_wait() -> float:
  """Largest share of waiting for data of the demo's stages."""
  return max(s["data_wait_fraction"] for s in demo()["training"].values())


def folder_demo(count: int) -> Check:
  """Passes if the demo runs on a folder of `count` captioned images."""

  def check() -> Outcome:
    with tempfile.TemporaryDirectory() as temporary:
      photos = pathlib.Path(temporary) / "photos"
      _captioned_images(photos, count)
      workdir = pathlib.Path(temporary) / "demo"
      status, output = run(
        ["-m", "qi2_jax.demo", "--quick", f"--data={photos}",
         f"--workdir={workdir}"]
      )  # fmt: skip
      if status:
        print(output[-4000:], file=sys.stderr)
        return Outcome(f"status {status}", "report", False)
      results = json.loads((workdir / "results.json").read_text())
      page = (workdir / "report.html").read_text()
    parts = results["captions"]
    complete = {"seen", "held_out"} <= parts.keys() and page.count("<img") > 3
    return Outcome(f"report, parts {', '.join(parts)}", "report", complete)

  return check


def _captioned_images(folder: pathlib.Path, count: int) -> None:
  """Writes PNGs of several sizes with a .txt beside each, as a user would."""
  from PIL import Image

  from data_pipelines.shapes.generate import Options, sample
  from data_pipelines.shapes.render import render

  folder.mkdir()
  options = Options(t2i=count, edits=0)
  for i in range(count):
    example, size = sample("t2i", i, options)
    image = Image.fromarray(render(example.scene, *size))
    image.save(folder / f"{i:04d}.png")
    (folder / f"{i:04d}.txt").write_text(example.prompt)
