# SPDX-License-Identifier: Apache-2.0
"""The Colab notebook runs from top to bottom, with the quickest settings."""

import pathlib

import numpy as np
import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "tpu_setup" / "colab.ipynb"
QUICK = (
  "--config.num_steps=2", "--config.save_every=2", "--config.preview_every=0",
  "--config.data.buckets=((64,64),)", "--config.data.batch_size=4",
  "--config.sampling.steps=2", "--config.sampling.batch_size=8",
)  # fmt: skip


def read():
  return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_small_and_clean():
  notebook = read()
  nbformat.validate(notebook)
  assert len(notebook.cells) < 12
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert cell.outputs == [] and cell.execution_count is None


def test_notebook_trains_samples_and_exports(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
  notebook = read()
  (parameters,) = (
    c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())
  )
  parameters.source += f"\nOUT = {str(tmp_path / 'out')!r}\nMORE = {QUICK!r}"
  # As a laptop starts it: in the folder of the notebook.
  client = nbclient.NotebookClient(
    notebook, timeout=400, kernel_name="python3",
    resources={"metadata": {"path": str(NOTEBOOK.parent)}},
  )  # fmt: skip
  client.execute()
  outputs = [o for c in notebook.cells for o in c.get("outputs", ())]
  pictures = [o for o in outputs if "image/png" in o.get("data", {})]
  assert len(pictures) == 1
  grid = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
  assert grid.shape[1] > 8 * 64 or grid.shape[0] > 64
  exported = tmp_path / "out" / "for_diffusers"
  text = "".join(o.get("text", "") for o in outputs)
  for part in ("transformer", "vae"):
    (weights,) = (exported / part).glob("*.safetensors")
    assert str(weights.relative_to(tmp_path)) in text
