# SPDX-License-Identifier: Apache-2.0
"""A progress line with the rate on stderr."""

import sys
import time
from collections.abc import Callable

_SECONDS_BETWEEN_LINES = 2.0


def reporter(label: str, total: int) -> Callable[[float], None]:
  """Returns a function to call with the number of things finished so far."""
  start = time.monotonic()
  last = start

  def report(done: float) -> None:
    nonlocal last
    now = time.monotonic()
    if now - last < _SECONDS_BETWEEN_LINES and done < total:
      return
    last = now
    rate = done / max(now - start, 1e-9)
    line = f"{label}: {done:,.0f}/{total:,}, {rate:.1f}/s"
    print(line, file=sys.stderr, flush=True)

  return report
