# SPDX-License-Identifier: Apache-2.0
"""The program of one process of `pool`: calls functions that it is sent.

Its argument is the file descriptor of a socket to the parent.
"""

import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

from data_pipelines.sources.items import Unusable

# Each process has one core to itself; results must not depend on threads.
_ONE_THREAD = (
  "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
  "OPENCV_FOR_THREADS_NUM",
)  # fmt: skip


def serve(connection: Connection) -> None:
  """Answers (function, arguments, seconds) until the other side is gone.

  An answer is (True, result) or (False, exception).
  """
  # The default action ends the process, even inside a C library that hangs,
  # and without anybody who watches: an orphan cannot run forever.
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
  while True:
    try:
      function, arguments, seconds = connection.recv()
      # The clock does not run while the function's module is imported.
      signal.setitimer(signal.ITIMER_REAL, seconds)
      answer = True, function(*arguments)
    except (EOFError, ConnectionError):
      return
    except Unusable as error:
      answer = False, error
    except Exception as error:  # of any type, which the parent may not have
      text = "".join(traceback.format_exception(error))
      answer = False, RuntimeError(f"in a worker process:\n{text}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    try:
      connection.send(answer)
    except ConnectionError:
      return


def main() -> None:
  """Entry point."""
  for name in _ONE_THREAD:
    os.environ[name] = "1"
  serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
  main()
