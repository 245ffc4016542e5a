# SPDX-License-Identifier: Apache-2.0
"""What every entry point shares: clean errors, logging, compile cache."""

import os
import sys
from collections.abc import Callable

from absl import app, logging

from data_pipelines.errors import InputError as DataInputError
from qi2_jax.errors import InputError


def setup() -> None:
  """Turns on the persistent compilation cache and one-line logs.

  The cache lies in `$JAX_COMPILATION_CACHE_DIR`, by default
  `~/.cache/qi2_jax/xla`; it makes a second start of the same program fast.
  """
  import jax

  default = os.path.join(os.path.expanduser("~"), ".cache", "qi2_jax", "xla")
  jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", default),
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  logging.set_verbosity(logging.INFO)
  logging.use_absl_handler()
  logging.get_absl_handler().setFormatter(_Formatter())
  # Library chatter (Orbax logs every save at INFO) hides the progress.
  import logging as std

  std.getLogger().addFilter(lambda record: True)
  handler = logging.get_absl_handler()
  handler.addFilter(
    lambda record: record.levelno >= std.WARNING
    or "qi2_jax" in record.pathname
  )


class _Formatter:
  """`12:34:56 message`, with the level where it is not INFO."""

  def format(self, record) -> str:
    import time

    stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
    level = "" if record.levelname == "INFO" else f"{record.levelname}: "
    return f"{stamp} {level}{record.getMessage()}"


def run(main: Callable[[], int | None]) -> None:
  """Runs `main` under absl; user errors become one sentence and status 2."""

  def guarded(argv):
    if len(argv) > 1:
      _fail(f"unexpected argument {argv[1]!r}; flags start with --.")
    try:
      setup()
      sys.exit(main() or 0)
    except (InputError, DataInputError, PermissionError) as error:
      _fail(str(error))
    except KeyboardInterrupt:
      _fail("interrupted.", status=130)

  try:
    app.run(guarded, flags_parser=_parse)
  except (InputError, ValueError, AttributeError, KeyError) as error:
    _fail(str(error))


def _parse(argv):
  """absl's parser, with config errors as sentences instead of tracebacks."""
  return app.parse_flags_with_usage(argv)


def _fail(message: str, status: int = 2) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(status)
