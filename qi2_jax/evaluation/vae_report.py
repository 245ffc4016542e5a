# SPDX-License-Identifier: Apache-2.0
"""What an evaluation of VAEs writes: results.json, samples, report.html."""

import csv
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from qi2_jax.evaluation import report, store
from qi2_jax.evaluation.vae_scores import FIGURES, Scored

# Pixels of a side of the shown crops, and how much differences are amplified.
CROP = 192
GAIN = 4
_HEADINGS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "ned": "NED"}
_DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4, "ned": 4}


def worst_window(a: np.ndarray, b: np.ndarray, side: int = CROP):
  """The `side` x `side` window of the largest error, as two slices.

  Args:
    a: uint8 `[H, W, 3]`.
    b: likewise.
    side: pixels; smaller images are shown whole.
  """
  height, width = a.shape[:2]
  rows, columns = min(side, height), min(side, width)
  error = np.abs(np.float32(a) - np.float32(b)).mean(-1)
  # Sums over windows; only those inside the image.
  sums = ndimage.uniform_filter(error, (rows, columns), mode="constant")
  top, left = rows // 2, columns // 2
  inside = sums[
    top : top + height - rows + 1, left : left + width - columns + 1
  ]
  y, x = np.unravel_index(inside.argmax(), inside.shape)
  return slice(int(y), int(y) + rows), slice(int(x), int(x) + columns)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Amplified absolute difference, black where the images agree: uint8."""
  gap = np.abs(np.int16(a) - np.int16(b)) * GAIN
  return np.uint8(gap.clip(0, 255))


def write_samples(
  folder: pathlib.Path, scored: Mapping[str, Sequence[dict[str, Any]]]
) -> None:
  """Writes per_sample.csv.

  Args:
    folder: of the evaluation.
    scored: model to one flat dict per image.
  """
  path = folder / "per_sample.csv"
  temporary = path.with_suffix(f".tmp-{os.getpid()}")
  columns = ["model", "name", "height", "width", *FIGURES]
  columns += ["text", "text_reconstruction"]
  with temporary.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    for model, rows in scored.items():
      writer.writerows({"model": model} | row for row in rows)
  os.replace(temporary, path)


def sample_row(scored: Scored) -> dict[str, Any]:
  """One line of per_sample.csv, but for the model."""
  height, width = scored.original.shape[:2]
  texts = scored.texts or ("", "")
  return {
    "name": scored.name, "height": height, "width": width,
    **{k: f"{v:.6g}" for k, v in scored.figures.items()},
    "text": texts[0], "text_reconstruction": texts[1],
  }  # fmt: skip


def _cell(figures: Mapping[str, Any], name: str) -> report.Text:
  if name not in figures:
    return report.Markup("&ndash;")
  digits, value = _DIGITS[name], figures[name]
  return f"{value['mean']:.{digits}f} ± {value['half_width']:.{digits}f}"


def _table(results: Mapping[str, Any]) -> report.Markup:
  rows = []
  for label, model in results["models"].items():
    size = " / ".join(f"{n / 1e6:.2f}" for n in model["parameters"].values())
    cells = [_cell(model["figures"], name) for name in FIGURES]
    rows.append([label, size, str(model["images"]), *cells])
  headings = [_HEADINGS[name] for name in FIGURES]
  return report.table(
    ["model", "M parameters, encoder / decoder", "images", *headings], rows
  )


def _strip(scored: Scored) -> report.Markup:
  where = worst_window(scored.original, scored.reconstruction)
  a, b = scored.original[where], scored.reconstruction[where]
  figures = ", ".join(
    f"{k.upper()} {v:.{_DIGITS[k]}f}" for k, v in scored.figures.items()
  )
  caption = f"{scored.name}: {figures}"
  if scored.texts:
    caption += f"; read {scored.texts[0]!r} and {scored.texts[1]!r}"
  cells = [
    ("original", a),
    ("reconstruction", b),
    (f"difference x {GAIN}", difference(a, b)),
  ]
  return report.strip(cells, caption)


def write(
  folder: pathlib.Path, results: Mapping[str, Any],
  pictures: Mapping[str, Sequence[Scored]],
) -> None:  # fmt: skip
  """Writes results.json and report.html.

  Args:
    folder: of the evaluation.
    results: what results.json holds.
    pictures: model to the reconstructions to show, worst first.
  """
  store.write_json(folder / "results.json", results)
  lead = [
    f"Reconstructions of {results['data']}: posterior mode, fp32, rounded to "
    "8 bits; means over images with 95 % intervals of the mean.",
  ]
  notes = [report.note(text) for text in results["notes"]]
  body = [report.section("Scores", *notes, _table(results))]
  for label, scored in pictures.items():
    strips = report.strips([_strip(s) for s in scored])
    crops = f"Crops of {CROP} px at the largest error."
    body.append(
      report.section(f"{label}: worst first", report.paragraph(crops), strips)
    )
  made = ("machine", "device", "versions", "seconds")
  body.append(
    report.section(
      "How this was made",
      *[report.paragraph(f"{name}: {results[name]}") for name in made],
    )
  )
  page = report.page("qi2_jax VAE evaluation", lead, body)
  store.write_text(folder / "report.html", page)
