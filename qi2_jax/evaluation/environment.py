# SPDX-License-Identifier: Apache-2.0
"""What a result was computed with."""

import os
import pathlib
import platform
import subprocess
from importlib import metadata

_PACKAGES = (
  "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
  "pillow",
)  # fmt: skip


def versions(*more: str) -> dict[str, str]:
  """Versions of Python, the code (git commit) and the packages in use.

  Args:
    *more: packages beyond those of every run.
  """
  found = {"python": platform.python_version(), "commit": _commit()}
  for name in (*_PACKAGES, *more):
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = "none"
  return found


def _commit() -> str:
  folder = pathlib.Path(__file__).parent
  command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
  try:
    done = subprocess.run(
      command, cwd=folder, capture_output=True, text=True, timeout=10
    )
  except (OSError, subprocess.TimeoutExpired):
    return "unknown"
  return done.stdout.strip() or "unknown"


def cores() -> int:
  """CPU cores that this process may use, as XLA counts them too."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not on macOS
    return os.cpu_count() or 1


def machine() -> str:
  """System, processor and number of CPUs in one line."""
  return f"{platform.system()} {platform.machine()}, {_cpu()}, {cores()} CPUs"


def _cpu() -> str:
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    return platform.processor() or "unknown CPU"
  names = [line for line in text.splitlines() if line.startswith("model name")]
  return names[0].partition(":")[2].strip() if names else "unknown CPU"
