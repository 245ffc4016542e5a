# SPDX-License-Identifier: Apache-2.0
"""What the commands of this package share: how they end."""

import contextlib
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
