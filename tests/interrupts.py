# SPDX-License-Identifier: Apache-2.0
"""Programs that can be interrupted, wherever the tests were started."""

import signal


def heard() -> None:
  """For `preexec_fn`: background jobs of a shell start with SIGINT ignored."""
  signal.signal(signal.SIGINT, signal.default_int_handler)
