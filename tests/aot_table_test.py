# SPDX-License-Identifier: Apache-2.0
"""The table of plans: resumable, and what it says is what the plans hold."""

import json
import subprocess

import pytest

from qi2_jax import aot_table
from qi2_jax.errors import InputError

PLAN = {
  "slices": 1, "mesh": {"data": 1, "fsdp": 64, "seq": 1, "tensor": 1},
  "bucket": [512, 512], "references": 1, "global_batch": 16384,
  "batch_per_chip": 8.0, "accumulate": 4, "hbm_gib_per_chip": 20.0,
  "hbm_limit_gib": 80.0, "flops_per_step": 2.2e15,
  "analytic_flops_per_step": 2e15, "step_seconds_roofline": 7.0,
  "bound_by": "compute", "mfu_roofline": 0.75, "mfu_serial": 0.5,
  "compile_seconds": 60.4, "compile_cpu_seconds": 90.0,
  "roofline_seconds": {"compute": 7.0, "hbm": 2.0, "links": 1.0},
  "collectives": {
    "all-gather": {"count": 3, "bytes": 8e9},
    "all-gather-by-all-reduce": {"count": 3, "bytes": 4e9},
    "collective-permute": {"count": 3, "bytes": 16e9},
    "all-reduce": {"count": 3, "bytes": 2e9},
  },
}  # fmt: skip


@pytest.fixture
def planner(monkeypatch):
  """Stands in for the process that compiles; returns what it was asked."""
  calls = []

  def fake(command, **_):
    calls.append(command)
    path = next(a for a in command if a.startswith("--json=")).partition("=")[2]
    if "512_v6e" not in path:
      with open(path, "w") as file:
        json.dump(PLAN, file)
    return subprocess.CompletedProcess(command, 1, "a log line\nno pod\n")

  monkeypatch.setattr(subprocess, "run", fake)
  return calls


def test_rows_are_planned_once(tmp_path, planner):
  for _ in range(2):
    aot_table.run(aot_table.ROWS[0], str(tmp_path))
  assert len(planner) == 1
  assert "--config=experiments/pretrain.py:256" in planner[0]
  with pytest.raises(InputError, match="no plan for 512_v6e: no pod"):
    row = next(r for r in aot_table.ROWS if r.name == "512_v6e")
    aot_table.run(row, str(tmp_path))


def test_the_document_keeps_what_is_around(tmp_path, planner):
  aot_table.run(aot_table.ROWS[0], str(tmp_path))
  with open(tmp_path / "512_v5p.json", "w") as file:
    json.dump({"hbm_gib_per_chip": 120.5, "hbm_limit_gib": 95.74}, file)
  doc = tmp_path / "scale.md"
  doc.write_text(f"before\n{aot_table.BEGIN}\nold\n{aot_table.END}\nafter\n")
  aot_table.write(str(doc), aot_table.table(str(tmp_path)))
  text = doc.read_text()
  assert text.startswith("before\n") and text.endswith("\nafter\n")
  assert "old" not in text
  for cell in (
    "v5e:16x16, fsdp 64", "512 x 512 + 1 ref.", "16,384", "8 x 4",
    "20.0 of 80.00 (75%)", "2 (1.100)", "3.0 / 4.0 / 0.5", "7.0 / 2.0 / 1.0",
    "7.0, compute", "75% / 50%", "60 (90)", "120.5 of 95.74 | does not fit",
  ):  # fmt: skip
    assert f"| {cell} |" in text, cell
  doc.write_text("no markers")
  with pytest.raises(InputError, match="lacks the lines"):
    aot_table.write(str(doc), "x")


def test_names_and_configs_are_distinct():
  assert len({row.name for row in aot_table.ROWS}) == len(aot_table.ROWS)
  assert len({tuple(r.arguments) for r in aot_table.ROWS}) == len(
    aot_table.ROWS
  )
