# SPDX-License-Identifier: Apache-2.0
"""Programs of benchmarks/ as modules: they are no package."""

import contextlib
import importlib.util
import pathlib
import sys

_FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@contextlib.contextmanager
def loaded(name: str):
  """The program `name` as a module, importable by that name meanwhile."""
  spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  yield module
  del sys.modules[name]
