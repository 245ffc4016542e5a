# SPDX-License-Identifier: Apache-2.0
"""What the commands of this package share: how they end, and their lock."""

import contextlib
import fcntl
import pathlib
import signal
import sys
from collections.abc import Iterator

from data_pipelines.errors import InputError


@contextlib.contextmanager
def clean_exit() -> Iterator[None]:
  """Ends the command on bad input (2), Ctrl-C (130) or kill (143).

  Bad input is one sentence; kill becomes an exception, so that temporary
  folders are removed on the way out.
  """
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    yield
  except InputError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("Interrupted; nothing was written.", file=sys.stderr)
    sys.exit(130)


@contextlib.contextmanager
def exclusive(out: pathlib.Path) -> Iterator[None]:
  """Creates a folder and keeps other runs out of it meanwhile.

  Two runs in one folder would remove each other's temporary files.

  Raises:
    InputError: it cannot be written, or another run writes to it.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "w")  # noqa: SIM115
  except OSError as error:
    raise InputError(
      f"Cannot write to {out} ({error.strerror}); choose another --out."
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(
        f"Another run is writing to {out}; wait for it or end it."
      ) from error
    yield


def parse_sizes(texts: list[str]) -> tuple[tuple[int, int], ...]:
  """Parses ['64x64', '96x64'] to ((width, height), ...)."""
  sizes = []
  for text in texts:
    width, _, height = text.partition("x")
    try:
      sizes.append((int(width), int(height)))
    except ValueError as error:
      raise InputError(
        f"Size {text!r} is not WIDTHxHEIGHT; write it like 96x64."
      ) from error
  return tuple(sizes)
