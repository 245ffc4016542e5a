# SPDX-License-Identifier: Apache-2.0
"""Sorts records into programs (batch shapes) and gives each its weight."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.loader.buckets import Bucket, Program, assign_many
from data_pipelines.records import TASKS, Index


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which records feed which program.

  Attributes:
    programs: sorted, so that every host numbers them alike.
    members: one int array of record numbers per program.
    weights: share of the steps per program; they sum to 1.
    dropped: records left out, by (task, reason).
  """

  programs: tuple[Program, ...]
  members: tuple[np.ndarray, ...]
  weights: tuple[float, ...]
  dropped: dict[tuple[str, str], int]


def make_plan(
  name: str,
  indices: Sequence[Index],
  buckets: Sequence[Bucket],
  task_weights: Mapping[str, float],
  max_enlarge: float,
  max_references: int,
  min_bucket_records: int,
) -> Plan:
  """Groups the records of all datasets by program.

  Records are numbered through the datasets in order. A task shares its weight
  among its programs by record count, so each record of a task is seen equally
  often; tasks without records leave their share to the others.

  Args:
    name: of the resolution, for messages.
    indices: of the datasets.
    buckets: shapes of the resolution.
    task_weights: share of the steps per task.
    max_enlarge: see `assign_many`.
    max_references: records with more are left out.
    min_bucket_records: programs with fewer records are left out.

  Raises:
    InputError: an unknown task, a negative weight, or nothing left to train.
  """
  _check_weights(task_weights)
  groups: dict[Program, list[int]] = collections.defaultdict(list)
  dropped: collections.Counter = collections.Counter()
  first = 0
  for index in indices:
    _group(index, first, buckets, max_enlarge, max_references, groups, dropped)
    first += len(index)

  for program in list(groups):
    count = len(groups[program])
    if not task_weights.get(program.task):
      reason = "the weight of this task is 0"
    elif count < min_bucket_records:
      reason = f"fewer than {min_bucket_records} records in the bucket"
    else:
      continue
    dropped[program.task, reason] += count
    del groups[program]
  if not groups:
    reasons = "; ".join(f"{n} {t}: {r}" for (t, r), n in dropped.items())
    raise InputError(
      f"No record is left to train on at {name} ({reasons}); use smaller "
      "buckets or change the limits."
    )
  programs = tuple(sorted(groups))
  counts = [len(groups[program]) for program in programs]
  return Plan(
    programs,
    tuple(np.array(groups[program]) for program in programs),
    _weights(programs, counts, task_weights),
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
  groups: dict[Program, list[int]],
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
      groups[Program(task, buckets[targets[i]], shapes)].append(first + i)


def _weights(
  programs: Sequence[Program],
  counts: Sequence[int],
  task_weights: Mapping[str, float],
) -> tuple[float, ...]:
  per_task: collections.Counter = collections.Counter()
  for program, count in zip(programs, counts):
    per_task[program.task] += count
  total = sum(task_weights[task] for task in per_task)
  return tuple(
    task_weights[program.task] / total * count / per_task[program.task]
    for program, count in zip(programs, counts)
  )
