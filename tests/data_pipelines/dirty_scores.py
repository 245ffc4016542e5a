# SPDX-License-Identifier: Apache-2.0
"""Runs the pipeline on a dirty corpus and compares it with the truth."""

import collections
import dataclasses
import pathlib

import pyarrow.parquet as pq
from dirty_corpus import PROMPT, make
from dirty_tools import KEPT, SIDE, UNREADABLE, Truth

from data_pipelines.engine import stage
from data_pipelines.engine.config import parse
from experiments import data

__all__ = ["Count", "Truth", "compare", "describe", "outcomes", "run"]
EXACT, ALIKE = "exact_duplicate", "perceptual_duplicate"


@dataclasses.dataclass
class Count:
  """Decisions of one filter."""

  right: int = 0
  wrong: int = 0
  missed: int = 0

  @property
  def precision(self) -> float:
    return self.right / max(self.right + self.wrong, 1)

  @property
  def recall(self) -> float:
    return self.right / max(self.right + self.missed, 1)


def filters(prompts: pathlib.Path) -> dict[str, dict]:
  """Every filter of the six stages, for pictures of about SIDE pixels."""
  return {
    "broken": {},
    "decontaminate": {
      "prompts": [str(prompts)],
      "ngram": 8,
      "min_overlap": 0.5,
      "max_phash": 8,
      "max_colour": 10.0,
    },
    "resolution": {"min_short_side": SIDE},
    "aspect": {"max_aspect": 4.0},
    "animated": {"max_frames": 1},
    "transparency": {"max_transparent_share": 0.95},
    EXACT: {},
    ALIKE: {"max_phash": 8, "max_dhash": 10, "max_colour": 12.0},
    "nsfw": {"max_nsfw": 0.95},
    "rotation": {"max_orientation_conflict": 0},
    "entropy": {"min_entropy": 3.0, "max_entropy": 7.98},
    "alignment": {"min_clip_alignment": 0.18},
    "token_length": {
      "min_tokens": 2,
      "max_tokens": 1024,
      "max_invalid_characters": 0,
    },
    "edit": {"min_edit_change": 0.03, "min_edit_similarity": 0.05},
    "quality": {"min_sharpness": 20.0},
    "aesthetic": {"min_aesthetic": 3.9},
    "compression": {"min_jpeg_quality": 60.0, "max_blockiness": 1.5},
  }


def run(folder: pathlib.Path, count: int, seed: int = 0):
  """Makes a corpus under `folder` and runs a stage on it.

  Returns:
    The truth by id, and the manifest.
  """
  corpus = make(folder / "in", count, seed)
  prompts = folder / "prompts.txt"
  prompts.write_text("\n".join(PROMPT.format(i) for i in range(5)))
  config = data.get_config("tiny").to_dict()
  options = filters(prompts)
  config |= {
    "filters": options,
    "filter_order": list(options),
    "shard_records": 500,
    "score": {"all": {"stand_ins": ["nsfw", "aesthetic", "alignment"]}},
  }
  manifest = stage.run(
    stage.Run(
      config=parse(config),
      out=folder / "out",
      inputs=(str(folder / "in"),),
      processes=1,
    )
  )
  return corpus.truth, manifest


def outcomes(out: pathlib.Path) -> dict[str, str]:
  """What became of every item: KEPT, UNREADABLE or the filter."""
  found = {}
  for path in sorted((out / "ingest").glob("part-*.parquet")):
    for row in pq.read_table(path).to_pylist():
      if row["status"] == "quarantined":
        found[_name(row["id"])] = UNREADABLE
  for row in pq.read_table(out / "decide" / "verdicts.parquet").to_pylist():
    outcome = row["filter"] or KEPT
    found[_name(row["id"])] = UNREADABLE if outcome == "broken" else outcome
  return found


def _name(id: str) -> str:
  return id.partition("/")[2]  # the first part is the input's own name


def compare(truth, found) -> dict[str, Count]:
  """Precision and recall of every filter, and of UNREADABLE.

  Of a group of duplicates one stays; which one is not part of the truth.
  """
  counts: dict[str, Count] = collections.defaultdict(Count)
  groups = collections.defaultdict(list)
  twins = {t.twin for t in truth.values() if t.twin}
  for name, entry in truth.items():
    if entry.twin or name in twins:
      groups[entry.twin or name].append(name)
      continue
    _judge(counts, entry.outcome, found[name])
  for names in groups.values():
    expected = collections.Counter(truth[name].outcome for name in names)
    seen = collections.Counter(found[name] for name in names)
    for outcome in (KEPT, EXACT, ALIKE):
      right = min(expected[outcome], seen[outcome])
      counts[outcome].right += right
      counts[outcome].wrong += seen[outcome] - right
      counts[outcome].missed += expected[outcome] - right
    for outcome in set(seen) - {KEPT, EXACT, ALIKE}:
      counts[outcome].wrong += seen[outcome]
  return dict(counts)


def _judge(counts, expected: str, seen: str) -> None:
  if expected == seen:
    counts[seen].right += 1
  else:
    counts[seen].wrong += 1
    counts[expected].missed += 1


def describe(counts) -> str:
  """A table for people."""
  lines = [f"{'filter':<22} right wrong missed  precision recall"]
  lines += [
    f"{name:<22} {c.right:5} {c.wrong:5} {c.missed:6}  "
    f"{c.precision:9.4f} {c.recall:6.4f}"
    for name, c in sorted(counts.items())
  ]
  return "\n".join(lines)
