# SPDX-License-Identifier: Apache-2.0
"""What a user sees of checkpoints that cannot be written or read."""

import os
import subprocess
import sys
import types

import pytest

from qi2_jax import cli

# Argument 1 says what goes wrong, 2 is the workdir.
PROGRAM = """
import contextlib, errno, os, pathlib, resource, sys, tempfile
import jax, numpy as np
from qi2_jax import cli
from qi2_jax.training.checkpoints import CheckpointStore

case, workdir = sys.argv[1:]
sys.argv[1:] = []
# Several large arrays: after the first one fails, the others are still busy.
random = np.random.default_rng(0)
state = {str(i): random.normal(size=(64, 500)) for i in range(20)}

def files_stay_small():
  hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

def fail(number):
  def raising(*_, **__):
    raise OSError(number, os.strerror(number))
  return raising

def main():
  store = CheckpointStore(workdir)
  store.save(2, state, {"step": 2})
  store.close()
  if case == "damaged":
    for path in pathlib.Path(workdir, "checkpoints").rglob("d/*"):
      path.write_bytes(path.read_bytes()[:60])
    store = CheckpointStore(workdir)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
    store.restore_newest(jax.tree.map(shape, state))
  store = CheckpointStore(workdir)
  if case == "small":
    files_stay_small()
  if case == "full":  # In Orbax's own thread, when all arrays are written.
    os.rename = os.replace = fail(errno.ENOSPC)
  if case == "readonly":  # Root may write anywhere, so this is pretended too.
    os.mkdir = tempfile.TemporaryFile = fail(errno.EROFS)
  with contextlib.closing(store):
    store.save(4, state, {"step": 4})

cli.run(main)
"""


@pytest.mark.parametrize(
  "case, sentence",
  [
    ("small", "cannot save a checkpoint under {}/checkpoints (File too large)"),
    ("full", "cannot save a checkpoint under {}/checkpoints (No space left"),
    ("readonly", "cannot save a checkpoint under {}/checkpoints (Read-only "),
    ("damaged", "no checkpoint under {}/checkpoints can be read ("),
  ],
)
def test_a_failed_save_or_read_is_one_sentence(case, sentence, tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, case, str(tmp_path)], text=True,
    capture_output=True, timeout=120,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert (done.returncode, done.stdout) == (2, ""), done.stderr
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: " + sentence.format(tmp_path))
  assert len(line) < 400


@pytest.mark.parametrize(
  "file, hidden",
  [
    ("/lib/asyncio/base_events.py", True),
    ("/lib/orbax/checkpoint/serialization.py", True),
    ("/lib/other/orbax.py", False),
  ],
)
def test_only_the_writers_echo_is_hidden(file, hidden):
  try:
    exec(compile("raise RuntimeError('Event loop is closed')", file, "exec"))
  except RuntimeError as error:
    event = types.SimpleNamespace(exc_traceback=error.__traceback__)
  assert cli._is_echo(event) is hidden
  error = types.SimpleNamespace(
    levelname="ERROR", exc_info=("x",), pathname=file
  )
  assert cli._is_news(error) is not hidden
  error.exc_info = None
  assert cli._is_news(error)
