# SPDX-License-Identifier: Apache-2.0
"""The frozen teachers of a distillation, the same in every start of a run.

`teachers.json` in the workdir says which weights the run began with. They are
not copied; a checksum notices when they have changed.
"""

import dataclasses
import json
import os
from collections.abc import Sequence

from qi2_jax.errors import InputError
from qi2_jax.evaluation.store import write_json
from qi2_jax.parallel import distributed
from qi2_jax.training import checkpoints, weights

_FILE = "teachers.json"


def load(paths: Sequence[str], workdir: str, abstract) -> list:
  """Reads the teachers: EMA weights of workdirs, or pipeline folders.

  Args:
    paths: one per teacher. A resumed run may find them in new places.
    workdir: of the distillation; receives `teachers.json`.
    abstract: shapes, dtypes and shardings of each.

  Raises:
    InputError: a path holds no such model, or another one than the run began
      with.
  """
  known = _read(workdir) if checkpoints.has_checkpoint(workdir) else None
  if known is not None and len(known) != len(paths):
    raise InputError(
      f"the run in {workdir} began with {len(known)} teachers, not "
      f"{len(paths)}; give the same ones."
    )
  out, bases = [], []
  for i, path in enumerate(map(os.path.abspath, paths)):
    step = known[i].step if known else None
    params, step = weights.initial(path, abstract, step)
    base = weights.Base(path, step, weights.checksum(params))
    if known and known[i].checksum != base.checksum:
      raise InputError(
        f"the teacher {path} has other weights than those that the run in "
        f"{workdir} began with; put the old ones back."
      )
    out.append(params)
    bases.append(base)
  if bases != known:
    distributed.on_first(lambda: _write(workdir, bases))
  return out


def _read(workdir: str) -> list[weights.Base]:
  path = os.path.join(workdir, _FILE)
  try:
    with open(path, encoding="utf-8") as file:
      return [weights.Base(**fields) for fields in json.load(file)]
  except (OSError, ValueError, TypeError) as error:
    raise InputError(
      f"{path} cannot be read ({error}); it says which teachers the run began "
      "with."
    ) from error


def _write(workdir: str, bases: list[weights.Base]) -> None:
  path = os.path.join(workdir, _FILE)
  write_json(path, [dataclasses.asdict(base) for base in bases])
