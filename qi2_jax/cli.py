# SPDX-License-Identifier: Apache-2.0
"""What every entry point shares: clean errors, logging, compile cache."""

import os
import sys
import time
import traceback
from collections.abc import Callable

from absl import app, flags, logging

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
  # transformers would say at every start that torch is missing.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  logging.set_verbosity(logging.INFO)
  logging.use_absl_handler()
  handler = logging.get_absl_handler()
  handler.setFormatter(_Formatter())
  handler.addFilter(_is_news)
  show = sys.unraisablehook
  sys.unraisablehook = lambda event: _is_echo(event) or show(event)


def _is_news(record) -> bool:
  """Whether a log record is shown.

  Library chatter (Orbax logs every save, and warns of its own read-only mode)
  would hide the progress. Errors pass, but not the pages of those that reach
  us as exceptions too: one sentence says them.
  """
  here = os.path.dirname(os.path.abspath(__file__))
  if record.levelname == "ERROR":
    return not (record.exc_info and _is_writer(record.pathname))
  return record.pathname.startswith(here)


def _is_echo(event) -> bool:
  """Whether an unraisable error only follows from a failed read or write.

  Orbax gives up at the first one; the others then find nobody to report to.
  """
  frames = traceback.walk_tb(event.exc_traceback)
  return any(_is_writer(frame.f_code.co_filename) for frame, _ in frames)


def _is_writer(path: str) -> bool:
  """Whether a source file belongs to what reads and writes checkpoints."""
  return bool({"orbax", "asyncio"} & set(os.path.normpath(path).split(os.sep)))


class _Formatter:
  """`12:34:56 message`, with the level where it is not INFO."""

  def format(self, record) -> str:
    stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
    level = "" if record.levelname == "INFO" else f"{record.levelname}: "
    return f"{stamp} {level}{record.getMessage()}"


def run(main: Callable[[], int | None]) -> None:
  """Runs `main` under absl; user errors become one sentence and status 2."""

  def no_words(words):
    if words:
      _fail(f"unexpected argument {words[0]!r}; flags start with --.")
    return main()

  run_words(no_words)


def run_words(main: Callable[[list[str]], int | None]) -> None:
  """`run` for a `main` that takes the words between the flags."""

  def guarded(argv):
    try:
      setup()
      sys.exit(main(argv[1:]) or 0)
    except (InputError, DataInputError, OSError) as error:
      _fail(str(error).strip().splitlines()[-1].strip())
    except KeyboardInterrupt:
      _fail("interrupted.", status=130)

  app.run(guarded, flags_parser=_parse)


def _parse(argv):
  """Parses flags; a config file's or an override's error is one sentence."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, ValueError, TypeError) as error:
    message = str(error).strip().splitlines()[-1].strip()
    _fail(f"{message.removeprefix('ValueError: ')} See --help.")
  except (AttributeError, KeyError) as error:
    name = str(error.args[0]).strip("\"'")
    _fail(f"the config has no field {name!r}; see the config file.")
  except OSError as error:
    _fail(str(error).strip().splitlines()[-1].strip())


def _fail(message: str, status: int = 2) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(status)
