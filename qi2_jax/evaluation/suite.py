# SPDX-License-Identifier: Apache-2.0
"""Scores a model beside its reference rows.

A number means little alone. Each suite therefore judges, on the same samples
and with the same rules, what bounds it from above (the ground truth, and the
ground truth through the VAE) and from below (prompts that belong to other
samples, an untrained model, the unedited source).

Models arrive as callables from cases to images, rules as `Case.score`, so
nothing here knows which task is scored.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from qi2_jax.evaluation.intervals import wilson

Image = np.ndarray  # uint8 [H, W, 3]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """One thing to ask for, and how to judge the answer.

  Attributes:
    suite: 't2i', 'edit' or 'captions'.
    kind: of the task, e.g. 'glyph'.
    split: 'seen' or 'held_out'.
    index: number within kind and split.
    prompt: prompt or instruction.
    seed: of the starting noise.
    truth: a right answer.
    score: image to named figures; a share of right answers is 0 or 1 each.
    source: the image to edit, if any.
  """

  suite: str
  kind: str
  split: str
  index: int
  prompt: str
  seed: int
  truth: Image
  score: Callable[[Image], dict[str, float]]
  source: Image | None = None

  @property
  def id(self) -> str:
    """Unique within the suite; names files."""
    return f"{self.kind}-{self.split}-{self.index:04d}"


Model = Callable[[Sequence[Case]], list[Image]]


@dataclasses.dataclass(frozen=True)
class Judged:
  """The figures of one image in one row of the table."""

  row: str
  case: Case
  figures: dict[str, float]


def judge(
  row: str, cases: Sequence[Case], images: Sequence[Image]
) -> list[Judged]:
  """Scores image i by the rules of case i."""
  return [
    Judged(row, case, case.score(image))
    for case, image in zip(cases, images, strict=True)
  ]


def partners(cases: Sequence[Case]) -> list[Case]:
  """Another case of the same kind and split for each; alone: none.

  Neighbours were drawn independently, so this is a shuffle. Equal prompts
  may meet, as they should: chance includes them.
  """
  groups: dict[tuple, list[Case]] = {}
  for case in cases:
    groups.setdefault((case.kind, case.split), []).append(case)
  following = {
    case.id: after
    for group in groups.values()
    for case, after in zip(group, [*group[1:], group[0]])
  }
  return [following[case.id] for case in cases]


def run_t2i(
  cases: Sequence[Case],
  images: Sequence[Image],
  *,
  untrained: Model,
  untrained_count: int,
  roundtrip: Callable[[list[Image]], list[Image]],
  split: str,
) -> list[Judged]:
  """Judges text-to-image samples and their reference rows.

  Args:
    cases: all kinds and splits.
    images: what the model made of them.
    untrained: the same model with random weights.
    untrained_count: cases per kind to ask it for.
    roundtrip: VAE encoding and decoding.
    split: whose cases the reference rows use.

  Returns:
    Rows 'model' (all cases); 'ground_truth', 'vae_ceiling', 'chance' (own
    images against prompts of others) and 'untrained' (cases of `split`).
  """
  chosen = [i for i, case in enumerate(cases) if case.split == split]
  some = [cases[i] for i in chosen]
  truth = [case.truth for case in some]
  few = [case for case in some if case.index < untrained_count]
  return [
    *judge("model", cases, images),
    *judge("ground_truth", some, truth),
    *judge("vae_ceiling", some, roundtrip(truth)),
    *judge("chance", partners(some), [images[i] for i in chosen]),
    *judge("untrained", few, untrained(few)),
  ]


def run_edit(
  cases: Sequence[Case],
  images: Sequence[Image],
  *,
  model: Model,
  roundtrip: Callable[[list[Image]], list[Image]],
  split: str,
) -> list[Judged]:
  """Judges edits and their reference rows; see `run_t2i`.

  Returns:
    Rows 'model'; 'copy_source' (nothing changed), 'vae_ceiling' (the exact
    result through the VAE) and 'chance' (the instruction of another sample
    on this one's source), on the cases of `split`.
  """
  some = [case for case in cases if case.split == split]
  mixed = [
    dataclasses.replace(case, prompt=other.prompt)
    for case, other in zip(some, partners(some))
  ]
  return [
    *judge("model", cases, images),
    *judge("copy_source", some, [case.source for case in some]),
    *judge("vae_ceiling", some, roundtrip([case.truth for case in some])),
    *judge("chance", some, model(mixed)),
  ]


def mean(
  judged: Iterable[Judged], figure: str, row: str, kind: str, split: str
) -> float | None:
  """Mean of a figure in one cell of the table; None for an empty cell."""
  values = [
    j.figures[figure]
    for j in judged
    if (j.row, j.case.kind, j.case.split) == (row, kind, split)
  ]
  return statistics.fmean(values) if values else None


def t2i_results(judged: Sequence[Judged], split: str) -> dict[str, Any]:
  """Per kind and on average: score per split, interval, reference rows.

  Args:
    judged: what `run_t2i` returned.
    split: as given there.

  Returns:
    `{kind: {seen, held_out, chance, vae_ceiling, ground_truth, untrained,
    n, prompts, interval, atoms}}` and the mean over kinds as 'mean'. `n` is
    the samples per split and `prompts` the different prompts among those of
    `split`, `atoms` the mean share of right properties. Missing splits are
    None.
  """
  out = {}
  for kind in _kinds(judged):
    ours = [j for j in judged if j.case.kind == kind]
    cases = [j.case for j in ours if j.row == "model"]
    some = [case for case in cases if case.split == split]
    out[kind] = {
      s: mean(ours, "all", "model", kind, s) for s in ("seen", "held_out")
    } | {
      row: mean(ours, "all", row, kind, split)
      for row in ("chance", "vae_ceiling", "ground_truth", "untrained")
    }
    out[kind]["n"] = len(some)
    out[kind]["prompts"] = len({case.prompt for case in some})
    out[kind]["interval"] = {
      s: _interval(out[kind][s], len([c for c in cases if c.split == s]))
      for s in ("seen", "held_out")
    }
    out[kind]["atoms"] = {
      s: mean(ours, "atoms", "model", kind, s) for s in ("seen", "held_out")
    }
  return _with_mean(out)


def edit_results(judged: Sequence[Judged], split: str) -> dict[str, Any]:
  """Per edit kind and on average: E, P, O and the O of the reference rows.

  Args:
    judged: what `run_edit` returned.
    split: as given there.

  Returns:
    `{kind: {E, P, O, all, copy_source_O, chance_O, vae_ceiling_O, n, seen,
    interval}}` and 'mean'. The figures are those of `split`, `seen` has the
    same four for seen cases; the interval belongs to `all`.
  """
  figures = ("E", "P", "O", "all")
  out = {}
  for kind in _kinds(judged):
    ours = [j for j in judged if j.case.kind == kind]
    count = len([j for j in ours if j.row == "model" and j.case.split == split])
    out[kind] = {f: mean(ours, f, "model", kind, split) for f in figures}
    for row in ("copy_source", "chance", "vae_ceiling"):
      out[kind][f"{row}_O"] = mean(ours, "O", row, kind, split)
    out[kind]["n"] = count
    out[kind]["seen"] = {
      f: mean(ours, f, "model", kind, "seen") for f in figures
    }
    out[kind]["interval"] = _interval(out[kind]["all"], count)
  return _with_mean(out)


def _with_mean(cells: dict[str, Any]) -> dict[str, Any]:
  """Adds the mean over kinds; no kinds, no mean."""
  return cells and cells | {"mean": _mean_of(list(cells.values()))}


def _kinds(judged: Sequence[Judged]) -> list[str]:
  return list(dict.fromkeys(j.case.kind for j in judged))


def _interval(share: float | None, count: int) -> tuple[float, float] | None:
  return None if share is None else wilson(round(share * count), count)


def _mean_of(cells: list[dict[str, Any]]) -> dict[str, Any]:
  """Mean over kinds of every plain figure, nested ones included."""
  out: dict[str, Any] = {}
  for key in cells[0]:
    values = [cell[key] for cell in cells]
    if key in ("interval", "prompts"):
      continue
    if isinstance(values[0], dict):
      out[key] = _mean_of(values)
    elif None in values:
      out[key] = None
    else:
      out[key] = sum(values) if key == "n" else statistics.fmean(values)
  return out
