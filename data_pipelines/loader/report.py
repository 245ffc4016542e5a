# SPDX-License-Identifier: Apache-2.0
"""What a loader will train on, and what not and why, as text for a log."""

import math
from collections.abc import Mapping, Sequence

from data_pipelines.loader.programs import ProgramInfo


def bucket_report(
  programs: Sequence[ProgramInfo], dropped: Mapping[tuple[str, str], int]
) -> str:
  """A text table of the programs of one resolution.

  Args:
    programs: all of that resolution.
    dropped: records left out, by (task, reason).

  Returns:
    Lines for a log; the counts add up to all records.
  """
  batch_size = programs[0].batch_size
  kept = sum(info.count for info in programs)
  total = kept + sum(dropped.values())
  texts = any(info.text_length for info in programs)
  lines = [
    f"{kept} of {total} records in {len(programs)} programs; one pass is "
    f"about {math.ceil(kept / batch_size)} steps of {batch_size}",
    f"{'task':<5} {'target':>10} {'references':<24} "
    f"{'text ' if texts else ''}{'records':>9} {'share':>7} {'steps':>7}",
  ]
  for info in programs:
    references = " ".join(map(str, info.key.references)) or "-"
    text = f"{info.text_length:>4} " if texts else ""
    lines.append(
      f"{info.key.task:<5} {info.key.target!s:>10} {references:<24} {text}"
      f"{info.count:>9} {info.count / total:>7.2%} {info.weight:>7.2%}"
    )
  small = sum(info.count < batch_size for info in programs)
  if small:
    lines.append(
      f"{small} programs have fewer records than a batch, so their batches "
      "repeat records; raise min_bucket_records to leave them out"
    )
  for (task, reason), count in sorted(dropped.items()):
    lines.append(f"{task:<5} dropped {count:>9} {count / total:>7.2%} {reason}")
  return "\n".join(lines)


def source_report(programs: Sequence[ProgramInfo], paths: Sequence[str]) -> str:
  """A line per dataset: its records and its share of the rows.

  Args:
    programs: all of one resolution, with one part per dataset.
    paths: of the datasets.
  """
  lines = []
  for number, path in enumerate(paths):
    parts = [(info.weight, info.parts[number]) for info in programs]
    records = sum(part.records for _, part in parts)
    share = sum(weight * part.share for weight, part in parts)
    lines.append(f"{records:>9} records, {share:>7.2%} of the rows: {path}")
  return "\n".join(lines)
