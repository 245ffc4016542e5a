# SPDX-License-Identifier: Apache-2.0
"""The pipeline's benchmark runs both sides and agrees on what they kept."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_both_sides_keep_the_same(tmp_path):
  path = tmp_path / "result.json"
  done = subprocess.run(
    [
      sys.executable, "benchmarks/pipeline_throughput.py", "--images=20",
      "--processes=1", "--max_ratio=100", f"--json={path}",
    ],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "ratio: " in done.stdout
  found = json.loads(path.read_text())
  # Two of the twenty are there twice.
  assert found["pool"]["kept"] == found["pipeline"]["kept"] == 18
  for side in found.values():
    assert side["cpu_seconds"] > 0 and side["peak_mb"] > 50
