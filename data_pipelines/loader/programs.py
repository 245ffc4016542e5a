# SPDX-License-Identifier: Apache-2.0
"""Sorts records into programs (batch shapes) and gives each its weight.

Shapes: P programs, D dataset folders.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.loader.buckets import (
  Bucket,
  Program,
  assign_many,
  check_buckets,
)
from data_pipelines.loader.config import LoaderConfig
from data_pipelines.records import TASKS, Index


class Part(NamedTuple):
  """Records of a program that share its rows with others.

  Attributes:
    records: how many.
    share: of the program's rows.
  """

  records: int
  share: float


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which records feed which program.

  Attributes:
    programs: sorted, so that every host numbers them alike.
    text_lengths: padded length of the captions per program; 0 where captions
      were not looked at. Programs of equal shapes differ in it.
    members: one int array of record numbers per program, rising.
    parts: of the members, in order: one per dataset where datasets have
      weights, else one of all.
    weights: share of the steps per program; they sum to 1.
    dropped: records left out, by (task, reason).
  """

  programs: tuple[Program, ...]
  text_lengths: tuple[int, ...]
  members: tuple[np.ndarray, ...]
  parts: tuple[tuple[Part, ...], ...]
  weights: tuple[float, ...]
  dropped: dict[tuple[str, str], int]


@dataclasses.dataclass(frozen=True)
class ProgramInfo:
  """A batch shape.

  Attributes:
    resolution: its name.
    batch_size: rows of the global batch.
    key: image shapes.
    text_length: padded length of the captions; 0: the transform decides.
    count: number of records.
    weight: share of the steps of its resolution.
    parts: records by what is mixed in a batch, see `Plan`.
  """

  resolution: str
  batch_size: int
  key: Program
  text_length: int
  count: int
  weight: float
  parts: tuple[Part, ...]

  def __str__(self) -> str:
    shapes = "+".join(map(str, (self.key.target, *self.key.references)))
    text = f", {self.text_length} tokens" if self.text_length else ""
    return f"{self.resolution} {self.key.task} {shapes}{text}"


def make_plan(
  name: str,
  indices: Sequence[Index],
  buckets: Sequence[Bucket],
  task_weights: Mapping[str, float],
  max_enlarge: float,
  max_references: int,
  min_bucket_records: int,
  text_lengths: Sequence[np.ndarray] | None = None,
  source_weights: Sequence[float] | None = None,
) -> Plan:
  """Groups the records of all datasets by program.

  Records are numbered through the datasets in order. A task shares its weight
  among its programs by record count, so each record of a task (and with
  weights, of a dataset) is seen equally often; tasks without records leave
  their share to the others.

  Args:
    name: of the resolution, for messages.
    indices: of the datasets.
    buckets: shapes of the resolution.
    task_weights: share of the steps per task.
    max_enlarge: see `assign_many`.
    max_references: records with more are left out.
    min_bucket_records: programs with fewer records are left out.
    text_lengths: per dataset the padded length of each caption; None: one
      for all.
    source_weights: per dataset the share of a task's rows; None: by count.

  Raises:
    InputError: an unknown task, a negative weight, or nothing left to train.
  """
  _check_weights(task_weights)
  groups: dict[tuple[Program, int], list[int]] = collections.defaultdict(list)
  dropped: collections.Counter = collections.Counter()
  starts = np.cumsum([0] + [len(index) for index in indices])
  for which, index in enumerate(indices):
    _group(
      index, int(starts[which]), buckets, max_enlarge, max_references,
      text_lengths and text_lengths[which], groups, dropped,
    )  # fmt: skip

  _drop(groups, dropped, task_weights, min_bucket_records)
  if not groups:
    reasons = "; ".join(f"{n} {t}: {r}" for (t, r), n in dropped.items())
    raise InputError(
      f"No record is left to train on at {name} ({reasons}); use smaller "
      "buckets or change the limits."
    )
  if source_weights is None:
    return _planned(groups, starts[[0, -1]], task_weights, (1.0,), dropped)
  return _planned(groups, starts, task_weights, source_weights, dropped)


def _drop(
  groups: dict[tuple[Program, int], list[int]],
  dropped: collections.Counter,
  task_weights: Mapping[str, float],
  min_bucket_records: int,
) -> None:
  """Moves whole programs from `groups` to `dropped`."""
  for key in list(groups):
    count = len(groups[key])
    if not task_weights.get(key[0].task):
      reason = "the weight of this task is 0"
    elif count < min_bucket_records:
      reason = f"fewer than {min_bucket_records} records in the bucket"
    else:
      continue
    dropped[key[0].task, reason] += count
    del groups[key]


def _planned(
  groups: Mapping[tuple[Program, int], list[int]],
  starts: np.ndarray,
  task_weights: Mapping[str, float],
  source_weights: Sequence[float],
  dropped: Mapping[tuple[str, str], int],
) -> Plan:
  """Groups with their shares; `starts` [D + 1] cuts records into parts."""
  keys = sorted(groups)
  members = tuple(np.array(groups[key]) for key in keys)
  ends_PD = np.stack([np.searchsorted(m, starts) for m in members])
  counts_PD = np.diff(ends_PD, axis=1)
  tasks = [program.task for program, _ in keys]
  steps_PD = _shares(tasks, counts_PD, task_weights, source_weights)
  weights = tuple(steps_PD.sum(axis=1).tolist())
  return Plan(
    tuple(program for program, _ in keys),
    tuple(length for _, length in keys),
    members,
    tuple(map(_parts, counts_PD.tolist(), steps_PD.tolist(), weights)),
    weights,
    dict(dropped),
  )


def _check_weights(task_weights: Mapping[str, float]) -> None:
  for task, weight in task_weights.items():
    if task not in TASKS or weight < 0:
      raise InputError(
        f"Task weight {task!r}: {weight} is unusable; the tasks are {TASKS}, "
        "the weights at least 0."
      )


def _group(
  index: Index,
  first: int,
  buckets: Sequence[Bucket],
  max_enlarge: float,
  max_references: int,
  text_lengths: np.ndarray | None,
  groups: dict[tuple[Program, int], list[int]],
  dropped: collections.Counter,
) -> None:
  """Adds the records of one dataset to `groups` or `dropped`."""
  targets = assign_many(
    np.stack([index.width, index.height], axis=1), buckets, max_enlarge
  )
  sizes = np.stack([index.reference_width, index.reference_height], axis=1)
  references = assign_many(sizes, buckets, max_enlarge) if len(sizes) else sizes
  counts = index.references
  ends = np.cumsum(counts)
  for i, task in enumerate(index.task.tolist()):
    own = references[ends[i] - counts[i] : ends[i]].tolist()
    if targets[i] < 0:
      dropped[task, f"target needs enlarging over {max_enlarge}x"] += 1
    elif len(own) > max_references:
      dropped[task, f"more than {max_references} references"] += 1
    elif any(r < 0 for r in own):
      dropped[task, f"reference needs enlarging over {max_enlarge}x"] += 1
    else:
      shapes = tuple(buckets[r] for r in own)
      program = Program(task, buckets[targets[i]], shapes)
      length = 0 if text_lengths is None else int(text_lengths[i])
      groups[program, length].append(first + i)


def _shares(
  tasks: Sequence[str],
  counts_PD: np.ndarray,
  task_weights: Mapping[str, float],
  source_weights: Sequence[float],
) -> np.ndarray:
  """Share of all steps by program and dataset: [P, D], summing to 1."""
  total = sum(task_weights[task] for task in dict.fromkeys(tasks))
  steps_PD = np.zeros(counts_PD.shape)
  for task in dict.fromkeys(tasks):
    own = np.array([other == task for other in tasks])
    count_D = counts_PD[own].sum(axis=0)
    share_D = np.where(count_D > 0, source_weights, 0.0)
    share_D /= share_D.sum()
    steps_PD[own] = (
      task_weights[task] / total * share_D
      * counts_PD[own] / np.maximum(count_D, 1)
    )  # fmt: skip
  return steps_PD


def _parts(
  counts: Sequence[int], steps: Sequence[float], weight: float
) -> tuple[Part, ...]:
  """Parts of one program; a dataset without records in it has share 0."""
  return tuple(Part(n, step / weight) for n, step in zip(counts, steps))


def make_plans(
  config: LoaderConfig,
  indices: Sequence[Index],
  text_lengths: Sequence[np.ndarray] | None,
) -> dict[str, Plan]:
  """`make_plan` for every resolution of a config, by name."""
  return {
    name: make_plan(
      name, indices, check_buckets(resolution.buckets), config.task_weights,
      config.max_enlarge, config.max_references, config.min_bucket_records,
      text_lengths, config.weights,
    )
    for name, resolution in config.resolutions.items()
  }  # fmt: skip


def describe(
  config: LoaderConfig, plans: Mapping[str, Plan]
) -> list[ProgramInfo]:
  """The programs of all plans, in one list."""
  return [
    ProgramInfo(
      name, config.resolutions[name].batch_size, key, length, len(members),
      weight, parts,
    )
    for name, plan in plans.items()
    for key, length, members, weight, parts in zip(
      plan.programs, plan.text_lengths, plan.members, plan.weights, plan.parts
    )
  ]  # fmt: skip


def check_sizes(programs: Sequence[ProgramInfo]) -> None:
  """Refuses programs whose batches would hold a record twice.

  Raises:
    InputError: a part has fewer records than it gives rows to a batch.
  """
  small = [
    f"{info}: {part.records} records for {part.share * info.batch_size:.4g} of "
    f"{info.batch_size} rows"
    for info in programs
    for part in info.parts
    if part.records < round(part.share * info.batch_size, 6)
  ]
  if not small:
    return
  more = f"; and {len(small) - 8} more" if len(small) > 8 else ""
  largest = max(info.batch_size for info in programs)
  raise InputError(
    f"Buckets smaller than a batch would fill it with repeats ("
    f"{'; '.join(small[:8])}{more}); leave them out with "
    f"min_bucket_records={largest}, lower batch_size, merge them (fewer "
    "buckets or text lengths), weigh a small folder less, or allow the "
    "repeats with repeat_small=True."
  )
