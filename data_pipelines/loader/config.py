# SPDX-License-Identifier: Apache-2.0
"""What the loader reads: datasets, resolutions and their schedule."""

import dataclasses
import itertools
from collections.abc import Mapping

from data_pipelines.errors import InputError
from data_pipelines.loader.buckets import check_buckets


@dataclasses.dataclass(frozen=True)
class Resolution:
  """Image shapes that share a batch size.

  Attributes:
    buckets: (height, width) in pixels, for targets and references alike.
    batch_size: rows of the global batch, over all hosts.
  """

  buckets: tuple[tuple[int, int], ...]
  batch_size: int


@dataclasses.dataclass(frozen=True)
class Phase:
  """A mixture of resolutions, until the next phase starts.

  Attributes:
    start: first step.
    shares: share of the steps by name of the resolution; need not sum to 1.
  """

  start: int
  shares: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
  """What to read, in which shapes, and when.

  Attributes:
    paths: dataset folders.
    weights: of the folders, above 0: their shares of the rows of a task, in
      every batch that both have records for; a task shares among the folders
      that hold it. None: every record of a task is seen equally often.
    resolutions: by name. A record belongs to every one it is large enough
      for.
    schedule: phases in order; the first starts at step 0, the last is endless.
    task_weights: share of the steps per task, at every resolution; need not
      sum to 1.
    channels: 4 keeps alpha, 3 composites over white.
    max_enlarge: images needing more linear magnification are left out.
    min_bucket_records: programs with fewer records are left out.
    repeat_small: programs with fewer records than a batch repeat them within
      a batch; otherwise they are an error.
    text_lengths: rising numbers of encoder tokens. A batch holds captions of
      which each fits into the same of these and into none before it; the
      last also takes those that are longer. (): captions are not looked at.
    max_references: records with more references are left out.
    seed: of the order and of the transform's randomness.
    threads: decoding threads; 0 reads in the calling thread.
    quarantine_path: JSON-lines file to which damaged records are appended.
  """

  paths: tuple[str, ...]
  resolutions: Mapping[str, Resolution]
  schedule: tuple[Phase, ...]
  weights: tuple[float, ...] | None = None
  text_lengths: tuple[int, ...] = ()
  task_weights: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {"t2i": 0.9, "ti2i": 0.1}
  )
  channels: int = 4
  max_enlarge: float = 1.5
  min_bucket_records: int = 1
  repeat_small: bool = False
  max_references: int = 4
  seed: int = 0
  threads: int = 4
  quarantine_path: str | None = None


def check_config(
  config: LoaderConfig, host_index: int = 0, host_count: int = 1
) -> None:
  """Checks all that can be checked without data.

  Args:
    config: what to read.
    host_index: this host.
    host_count: number of hosts; divides every batch size.

  Raises:
    InputError: a field is unusable.
  """
  if not config.paths:
    raise InputError("The loader has no dataset; give at least one path.")
  _check_weights(config)
  lengths = config.text_lengths
  if min(lengths, default=1) < 1 or list(lengths) != sorted(set(lengths)):
    raise InputError(
      f"Text lengths {lengths} are unusable; give rising numbers of tokens."
    )
  if config.channels not in (3, 4):
    raise InputError(f"Images have 3 or 4 channels, not {config.channels}.")
  if not 0 <= host_index < host_count:
    raise InputError(
      f"Host {host_index} of {host_count} does not exist; count from 0."
    )
  for resolution in config.resolutions.values():
    check_buckets(resolution.buckets)
    if resolution.batch_size < 1 or resolution.batch_size % host_count:
      raise InputError(
        f"Batch size {resolution.batch_size} is not a positive multiple of the "
        f"{host_count} hosts; change batch_size."
      )
  check_schedule(config.schedule, config.resolutions)


def _check_weights(config: LoaderConfig) -> None:
  weights = config.weights
  if weights is None:
    return
  if len(weights) != len(config.paths):
    raise InputError(
      f"There are {len(weights)} weights for {len(config.paths)} dataset "
      "folders; give one number per folder."
    )
  for path, weight in zip(config.paths, weights):
    if not 0 < weight < float("inf"):
      raise InputError(
        f"Weight {weight} of dataset {path} is unusable; give a number above "
        "0, or leave the folder out."
      )


def check_schedule(
  schedule: tuple[Phase, ...], resolutions: Mapping[str, Resolution]
) -> None:
  """Checks that the phases fit the resolutions.

  Raises:
    InputError: they do not start at 0 and rise, name an unknown resolution,
      have unusable shares, or leave a resolution out for good.
  """
  starts = [phase.start for phase in schedule]
  if starts[:1] != [0] or any(b <= a for a, b in itertools.pairwise(starts)):
    raise InputError(
      f"The phases of the schedule start at steps {starts}; let the first "
      "start at 0 and every other after the one before."
    )
  used = set()
  for phase in schedule:
    for name, share in phase.shares.items():
      if name not in resolutions or not 0 <= share < float("inf"):
        raise InputError(
          f"Share {name!r}: {share} from step {phase.start} on is unusable; "
          f"the resolutions are {sorted(resolutions)}, the shares at least 0."
        )
    positive = {name for name, share in phase.shares.items() if share}
    if not positive:
      raise InputError(
        f"The schedule has no share above 0 from step {phase.start} on; give "
        "one to at least one resolution."
      )
    used |= positive
  if idle := sorted(set(resolutions) - used):
    raise InputError(
      f"Resolutions {idle} are in no phase of the schedule; give them a share "
      "or remove them."
    )
