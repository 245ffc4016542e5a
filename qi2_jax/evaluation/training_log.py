# SPDX-License-Identifier: Apache-2.0
"""What a training workdir says about its run, as figures and sections."""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from qi2_jax.evaluation import report
from qi2_jax.evaluation.report import Markup


def read(workdir: pathlib.Path) -> list[dict[str, float]]:
  """The rows of metrics.jsonl; a line cut off by a kill is left out."""
  rows = []
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    try:
      row = json.loads(line)
      if "loss" in row:  # Held-out losses have rows of their own.
        rows.append(row)
    except ValueError:
      continue
  return rows


def figures(workdir: pathlib.Path) -> dict[str, Any]:
  """Steps, batch size, last loss, speed and data waiting of one run.

  The first row is left out of speed and waiting: it holds the compilation,
  which would make the share of waiting look smaller than it is.
  """
  rows = read(workdir)
  config = json.loads((workdir / "config.json").read_text())
  steady = rows[1:] or rows
  # Seconds between rows, up to a common factor.
  weights = [1 / row["images_per_second"] for row in steady]
  waits = [row["data_wait_fraction"] for row in steady]
  out = {
    "steps": int(rows[-1]["step"]),
    "batch_size": config["data"]["batch_size"],
    "loss": rows[-1]["loss"],
    "images_per_second": statistics.median(
      row["images_per_second"] for row in steady
    ),
    "data_wait_fraction": sum(w * x for w, x in zip(weights, waits))
    / sum(weights),
  }
  return out | ({"psnr": rows[-1]["psnr"]} if "psnr" in rows[-1] else {})


def table(stages: Mapping[str, Mapping[str, Any]]) -> Markup:
  """Speed of every stage; `stages` is title to `figures`."""
  header = ("Stage", "Steps", "Batch", "Images/s", "Waiting for data", "Loss")
  rows = [
    (
      title,
      f"{f['steps']:,}",
      f["batch_size"],
      f"{f['images_per_second']:,.0f}",
      f"{100 * f['data_wait_fraction']:.1f} %",
      f"{f['loss']:.4f}",
    )
    for title, f in stages.items()
  ]
  return report.table(header, rows)


def plots(stages: Sequence[tuple[str, pathlib.Path]]) -> Markup:
  """Loss (and the VAE's PSNR) over steps, one plot per stage."""
  blocks = []
  for title, workdir in stages:
    rows = read(workdir)
    steps = [row["step"] for row in rows]
    names = [n for n in ("loss", "psnr") if n in rows[0]]
    blocks += [
      report.subsection(
        f"{title}: {'PSNR' if name == 'psnr' else name}",
        report.curves(
          {name: (steps, [row[name] for row in rows])},
          "step",
          "PSNR (dB)" if name == "psnr" else f"{title} {name}",
        ),
      )
      for name in names
    ]
  return report.columns(blocks)
