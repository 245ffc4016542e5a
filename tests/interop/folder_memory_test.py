# SPDX-License-Identifier: Apache-2.0
"""Peak host memory of importing and exporting, at full tensor size."""

import os
import pathlib
import subprocess
import sys

import pytest

_MEMORY = """
import sys, threading, time
import jax
jax.config.update("jax_platforms", "cpu")
import ml_dtypes, numpy as np
from qi2_jax.interop import mapping, mmdit, model_folder, safetensors_io
from qi2_jax.interop.published import write_json
from qi2_jax.models.mmdit import MMDiTConfig

def rss():
  with open("/proc/self/status") as file:
    return int(next(x for x in file if x.startswith("VmRSS")).split()[1]) / 1e3

def extra(work, held=0.0):
  base = peak = rss()
  done = threading.Event()
  def watch():
    nonlocal peak
    while not done.wait(0.002):
      peak = max(peak, rss())
  thread = threading.Thread(target=watch)
  thread.start()
  out = work()
  done.set()
  thread.join()
  print(round(peak - base - held))
  return out

folder = sys.argv[1]
# Two layers of the full width: every tensor has the size it has at 7 B.
config = MMDiTConfig(num_layers=2)
zero = np.zeros((), ml_dtypes.bfloat16)
fake = jax.tree.map(
  lambda a: np.broadcast_to(zero, a.shape), model_folder.abstract_mmdit(config)
)
plan, _ = mapping.iter_export(fake, mmdit.table)
size = safetensors_io.plan_bytes(plan) / 1e6
rng = np.random.default_rng(0)
def noise():
  for name, shape, _ in plan:
    raw = rng.integers(0, 2**14, shape, dtype=np.uint16)
    yield name, raw.view(ml_dtypes.bfloat16)
safetensors_io.write_tensors(folder, model_folder.STEM, plan, noise())
write_json(folder + "/config.json", mmdit.published(config))
print(round(size))
_, params = extra(lambda: model_folder.load_mmdit(folder), size)
native, out = folder + "/native", folder + "/out"
extra(lambda: model_folder.save_mmdit(native, config, params))
extra(lambda: model_folder.export_mmdit(out, config, params))
del params
extra(lambda: model_folder.export_mmdit(
  out + "2", *model_folder.open_mmdit(native)
))
"""


@pytest.mark.slow
def test_host_memory_is_bounded_by_a_tensor(tmp_path):
  """Peak memory beyond the model, with 2 of the 32 full-size layers."""
  if not sys.platform.startswith("linux"):
    pytest.skip("reads /proc")
  root = pathlib.Path(__file__).parent.parent.parent
  done = subprocess.run(
    [sys.executable, "-c", _MEMORY, str(tmp_path)], cwd=root, text=True,
    capture_output=True, check=True, env={**os.environ, "XLA_FLAGS": ""},
  )  # fmt: skip
  size, load, save, export, lazy = map(int, done.stdout.split())
  print(f"{size} MB; extra MB: import {load}, save {save}, export {export}, "
        f"export from disk {lazy} without the model")  # fmt: skip
  assert size > 1000
  assert load < 300 and save < 300 and export < 300
  # This one does not hold the model at all.
  assert lazy < 500
