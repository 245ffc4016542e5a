# SPDX-License-Identifier: Apache-2.0
"""Report sections from an evaluation folder (see `store`)."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

from qi2_jax.evaluation import report, store
from qi2_jax.evaluation.report import Markup

_SPLITS = {"seen": "Seen prompts", "held_out": "Held-out prompts"}


def scores(folder: str | os.PathLike, pictures: int = 12) -> list[Markup]:
  """All sections about scores and samples.

  Args:
    folder: what `python -m qi2_jax.evaluate` wrote.
    pictures: samples to show per kind and split, of edits half as many;
      always the first ones.
  """
  results = store.read_results(folder)
  samples = store.read_samples(folder, pictures)
  by_suite = {
    suite: [s for s in samples if s.suite == suite]
    for suite in ("t2i", "edit", "captions")
  }
  out = []
  if results.get("t2i"):
    out += [_t2i_table(results), _t2i_samples(by_suite["t2i"])]
  if results.get("edit"):
    out += [
      _edit_table(results),
      _edit_samples(by_suite["edit"], pictures // 2),
    ]
  if results.get("captions"):
    out += [_captions(results["captions"], by_suite["captions"])]
  return out


def summary(results: dict[str, Any]) -> str:
  """The scores in one line."""
  parts = [
    f"{kind} {_number(cell['held_out'])}"
    for kind, cell in results["t2i"].items()
  ]
  if results["edit"]:
    mean = results["edit"]["mean"]
    parts.append(f"edit O {_number(mean['O'])}")
  parts += [
    f"VAE PSNR {split} {cell['vae_psnr']:.1f} dB"
    for split, cell in results["captions"].items()
  ]
  return "held out: " + ", ".join(parts) if results["t2i"] else ", ".join(parts)


def notes(results: dict[str, Any]) -> Markup:
  """What a reader must know of the model, e.g. random stand-ins."""
  return report.join([report.note(text) for text in results["notes"]])


def environment(results: dict[str, Any]) -> Markup:
  """How the images were sampled and with which versions."""
  sampling = results["sampling"]
  rows = [
    ("Model", results["model"]),
    ("Training step", f"{results['step']:,}"),
    ("Sampling", ", ".join(f"{k} {v}" for k, v in sampling.items())),
    ("Machine", results["machine"]),
    ("Device", results["device"]),
    ("Versions", ", ".join(f"{k} {v}" for k, v in results["versions"].items())),
  ]
  return report.section(
    "How this was made",
    *[
      report.paragraph(report.tag("b", f"{name}: "), str(value))
      for name, value in rows
    ],
  )


def _t2i_table(results: dict[str, Any]) -> Markup:
  header = (
    "Kind", "Held out", "Seen", "Properties right", "Chance", "Untrained",
    "VAE ceiling", "Ground truth", "n",
  )  # fmt: skip
  rows = [
    (
      kind,
      report.score(cell["held_out"], cell.get("interval", {}).get("held_out")),
      report.score(cell["seen"], cell.get("interval", {}).get("seen")),
      _number(_first(cell["atoms"])),
      _number(cell["chance"]),
      _number(cell["untrained"]),
      _number(cell["vae_ceiling"]),
      _number(cell["ground_truth"]),
      cell["n"],
    )
    for kind, cell in results["t2i"].items()
  ]
  return report.section(
    "Text to image",
    report.paragraph(
      "Share of images with every property of the prompt right (how many, "
      "which colour, shape, place, relation or text, and nothing else), "
      "judged by exact rules. Small figures are Wilson 95 % intervals. "
      "Held-out prompts never occur in training. “Properties right” gives "
      "partial credit, on held-out prompts."
    ),
    report.table(header, rows),
    report.fine_print(
      "Reference rows, on the held-out samples. Chance: the model's own "
      "images judged by the prompts of other samples. Untrained: the same "
      "network with random weights. VAE ceiling: right images after VAE "
      "encoding and decoding; what the latents lose, the model cannot "
      "regain. Ground truth: right images as rendered."
    ),
  )


def _edit_table(results: dict[str, Any]) -> Markup:
  header = (
    "Edit", "Success E", "Preserved P", "O = √(E·P)", "Fully right",
    "O, seen", "O, copy", "O, shuffled", "O, VAE ceiling", "n",
  )  # fmt: skip
  rows = [
    (
      kind,
      _number(cell["E"]),
      _number(cell["P"]),
      report.score(cell["O"]),
      report.score(cell["all"], cell.get("interval")),
      _number(cell["seen"]["O"]),
      _number(cell["copy_source_O"]),
      _number(cell["chance_O"]),
      _number(cell["vae_ceiling_O"]),
      cell["n"],
    )
    for kind, cell in results["edit"].items()
  ]
  return report.section(
    "Editing",
    report.paragraph(
      "Every instruction has one exact result. E is the share of pixels that "
      "had to change and are right (within CIE76 ΔE 10), P the same for "
      "pixels that had to stay. Figures are on held-out pairs of source and "
      "instruction. “Fully right” asks the rules of text to image of the "
      "edited image."
    ),
    report.table(header, rows),
    report.fine_print(
      "Reference rows. Copy: the source unchanged, whose E is 0 by "
      "definition. Shuffled: the model, asked for the instruction of "
      "another sample. VAE ceiling: the exact result after VAE encoding and "
      "decoding."
    ),
  )


def _t2i_samples(samples: Sequence[store.Sample]) -> Markup:
  blocks = [
    report.subsection(
      kind, report.columns(list(map(_split_gallery, _by_split(group))))
    )
    for kind, group in _by_kind(samples)
  ]
  return report.section(
    "Text-to-image samples",
    report.paragraph(
      "The first samples of every kind, not chosen: green frames have all "
      "properties right."
    ),
    *blocks,
  )


def _split_gallery(group: Sequence[store.Sample]) -> Markup:
  figures = [
    report.figure(s.images["model"], s.prompt, bool(s.figures["all"]))
    for s in group
  ]
  return report.labelled_gallery(_SPLITS[group[0].split], figures)


def _edit_samples(samples: Sequence[store.Sample], count: int) -> Markup:
  labels = {"source": "source", "model": "result", "truth": "exact target"}
  held_out = [s for s in samples if s.split == "held_out"] or samples
  blocks = []
  for kind, group in _by_kind(held_out):
    items = [
      report.strip(
        [(labels[role], s.images[role]) for role in labels],
        report.join(
          [s.prompt, report.tag("small", f" O {s.figures['O']:.2f}")]
        ),
        bool(s.figures["all"]),
      )
      for s in group[:count]
    ]
    blocks.append(report.subsection(kind, report.strips(items)))
  return report.section(
    "Edits",
    report.paragraph(
      "The first held-out samples of every kind, not chosen: source, "
      "instruction, what the model made, and the one right result. Green "
      "strips are fully right."
    ),
    *blocks,
  )


def _captions(
  results: dict[str, Any], samples: Sequence[store.Sample]
) -> Markup:
  labels = {
    "source": "source", "truth": "your image", "vae": "VAE", "model": "sample",
  }  # fmt: skip
  rows = [
    (_SPLITS[split], f"{cell['vae_psnr']:.2f} dB", cell["n"])
    for split, cell in results.items()
  ]
  blocks = [
    report.subsection(
      _SPLITS[group[0].split],
      report.strips(
        [
          report.strip(
            [(labels[r], s.images[r]) for r in labels if r in s.images],
            s.prompt,
          )
          for s in group
        ]
      ),
    )
    for group in _by_split(samples)
  ]
  return report.section(
    "Your captions",
    report.paragraph(
      "The first images of your folder and of its held-out part: the image, "
      "the image after VAE encoding and decoding, and what the model makes "
      "of the caption. No rule can judge these; the PSNR is that of the VAE."
    ),
    report.table(("Part", "VAE PSNR", "n"), rows),
    *blocks,
  )


def _by_kind(samples):
  return [
    (kind, list(group))
    for kind, group in itertools.groupby(samples, lambda s: s.kind)
  ]


def _by_split(samples):
  """Samples of each split that has any, 'seen' first."""
  groups = [[s for s in samples if s.split == split] for split in _SPLITS]
  return [group for group in groups if group]


def _first(by_split: dict[str, Any]) -> float | None:
  held_out = by_split.get("held_out")
  return by_split.get("seen") if held_out is None else held_out


def _number(value: float | None) -> str:
  return "–" if value is None else f"{value:.2f}"
