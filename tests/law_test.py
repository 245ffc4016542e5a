# SPDX-License-Identifier: Apache-2.0
"""The repository's own laws: import direction, file size, SPDX line."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = (
  "qi2_jax", "data_pipelines", "experiments", "benchmarks", "tpu_setup",
  "tests",
)  # fmt: skip
# A module may import itself and what stands before it. Every top-level
# module of qi2_jax that is not listed is an entry point and comes last.
ORDER = (
  "errors", "parallel", "models", "conditioning", "flow", "objectives",
  "interop", "rewards", "evaluation", "training", "enhancer", "pipeline",
)  # fmt: skip
# The one module that runs the other side, for users who have it.
COMPARES_WITH_TORCH = "qi2_jax/verify.py"
TORCH_WORLD = {"torch", "torchvision", "tensorflow", "diffusers"}
NOT_IN_PIPELINES = {
  "jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "torch", "qi2_jax",
}  # fmt: skip
MAX_LINES = 400
MAX_FUNCTION_LINES = 60


def imported(tree: ast.AST, path: str):
  """Yields `(line, dotted name)` of every import, relative ones resolved."""
  package = path.removesuffix(".py").split("/")[:-1]
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else []
      base += [node.module] if node.module else []
      for alias in node.names:
        yield node.lineno, ".".join([*base, alias.name])


def rank(name: str) -> int:
  """Place of `qi2_jax.<name>` in the order; entry points come last."""
  return ORDER.index(name) if name in ORDER else len(ORDER)


def import_error(path: str, name: str) -> str | None:
  """Says why the file at `path` may not import the dotted `name`."""
  own, other = path.removesuffix(".py").split("/"), name.split(".")
  top = other[0]
  if own[0] == "experiments" and top not in ("ml_collections", "experiments"):
    return "experiments may import only ml_collections"
  if own[0] == "data_pipelines" and top in NOT_IN_PIPELINES:
    return "data_pipelines must not import it"
  if own[0] != "qi2_jax":
    return None
  if top in TORCH_WORLD and path != COMPARES_WITH_TORCH:
    return "qi2_jax runs without it"
  entry = rank(own[1]) == len(ORDER) and own[1] != "__init__"
  if top in ("data_pipelines", "experiments") and not entry:
    return "only entry points may import it"
  if top == "tests":
    return "only tests may import it"
  if top != "qi2_jax" or other[1:] in ([], ["__version__"]):
    return None
  if own[1] == "__init__":
    return "the package itself imports nothing"
  if rank(own[1]) < rank(other[1]):
    return f"{own[1]} comes before {other[1]}"
  return None


def violations(path: str, source: str) -> list[str]:
  """Every broken law of one file, as `path:line: sentence`.

  Args:
    path: relative to the repository, with slashes.
    source: text of the file.
  """
  out = []
  lines = source.splitlines()
  if not lines or lines[0] != "# SPDX-License-Identifier: Apache-2.0":
    out.append(f"{path}:1: the first line is not the SPDX line")
  if len(lines) > MAX_LINES:
    out.append(f"{path}: {len(lines)} lines, more than {MAX_LINES}")
  tree = ast.parse(source)
  for line, name in imported(tree, path):
    error = import_error(path, name)
    if error:
      out.append(f"{path}:{line}: imports {name}: {error}")
  # A config is one long table of values.
  walked = () if path.startswith("experiments/") else ast.walk(tree)
  for node in walked:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      length = node.end_lineno - node.lineno + 1
      if length > MAX_FUNCTION_LINES:
        out.append(
          f"{path}:{node.lineno}: {node.name} has {length} lines, more than "
          f"{MAX_FUNCTION_LINES}"
        )
  return out


def test_the_repository_obeys():
  files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py")]
  assert len(files) > 50
  found = []
  for file in files:
    path = file.relative_to(ROOT).as_posix()
    found += violations(path, file.read_text())
  assert not found, "\n".join(found)


SPDX = "# SPDX-License-Identifier: Apache-2.0\n"


@pytest.mark.parametrize(
  "path, source",
  [
    ("qi2_jax/flow/a.py", "from qi2_jax.training import loop"),
    ("qi2_jax/flow/a.py", "from qi2_jax import training"),
    ("qi2_jax/flow/a.py", "import qi2_jax.pipeline"),
    ("qi2_jax/flow/a.py", "from ..training import loop"),
    ("qi2_jax/flow/a.py", "def f():\n  from qi2_jax.training import loop"),
    ("qi2_jax/pipeline.py", "from qi2_jax import train"),
    ("qi2_jax/training/a.py", "from data_pipelines import records"),
    ("qi2_jax/training/a.py", "import experiments.vae"),
    ("qi2_jax/train.py", "import torch.nn"),
    ("qi2_jax/train.py", "import tensorflow as tf"),
    ("qi2_jax/convert.py", "def f():\n  import torch"),
    ("qi2_jax/interop/a.py", "from diffusers import ModelMixin"),
    ("qi2_jax/__init__.py", "from qi2_jax import models"),
    ("experiments/a.py", "import jax"),
    ("data_pipelines/loader/a.py", "import jax.numpy as jnp"),
    ("data_pipelines/loader/a.py", "from qi2_jax.errors import InputError"),
    ("data_pipelines/a.py", "def f():\n  import optax"),
    ("tests/a_test.py", "def f():\n" + "  pass\n" * MAX_FUNCTION_LINES),
    ("tests/a_test.py", "\n" * MAX_LINES),
  ],
)
def test_planted_violations_are_caught(path, source):
  assert len(violations(path, SPDX + source)) == 1


def test_a_missing_spdx_line_is_caught():
  assert len(violations("qi2_jax/flow/a.py", "import jax")) == 1
  assert len(violations("qi2_jax/flow/a.py", "")) == 1


@pytest.mark.parametrize(
  "path, source",
  [
    ("qi2_jax/flow/a.py", "from qi2_jax.models import mmdit"),
    ("qi2_jax/flow/a.py", "from qi2_jax.flow import path"),
    ("qi2_jax/train.py", "from data_pipelines import records"),
    ("qi2_jax/demo.py", "from qi2_jax import train"),
    ("qi2_jax/demo.py", "from qi2_jax import __version__"),
    ("qi2_jax/demo.py", "import qi2_jax"),
    ("qi2_jax/verify.py", "def f():\n  import torch"),
    ("experiments/a.py", "from experiments import common"),
    ("data_pipelines/a.py", "import numpy as np"),
    ("tests/a_test.py", "import torch"),
  ],
)
def test_lawful_imports_pass(path, source):
  assert violations(path, SPDX + source) == []
