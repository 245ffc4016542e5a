# SPDX-License-Identifier: Apache-2.0
"""A photograph and a scanned page go through import, training and report.

Both come with scikit-image (public domain). Two steps of a small model show
that the path holds, not what a VAE makes of them.
"""

import os
import pathlib

import pytest
from PIL import Image

from data_pipelines import imagefolder
from experiments import evaluate as evaluate_config
from experiments import vae as experiment
from qi2_jax import evaluate_vae, train
from qi2_jax.models import vae

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]
SMALL = vae.VAEConfig(
  patch_size=4, base_dim=8, decoder_base_dim=8, z_dim=8, dim_mult=(1, 1),
  num_res_blocks=1, temporal_downsample=(False,), carry_temporal=False,
)  # fmt: skip


def test_photograph_and_page(tmp_path, monkeypatch):
  skimage = pytest.importorskip("skimage.data")
  monkeypatch.setitem(vae.PRESETS, "tiny", SMALL)
  folder = tmp_path / "images"
  folder.mkdir()
  source = os.path.dirname(skimage.__file__)
  for name in ("astronaut.png", "page.png"):
    with Image.open(os.path.join(source, name)) as image:
      image.convert("RGB").save(folder / name)
    (folder / name).with_suffix(".txt").write_text(name)
  data = str(tmp_path / "data")
  imagefolder.convert(folder, data)
  config = experiment.get_config("demo")
  config.data.path = data
  config.data.batch_size = 2
  config.data.t2i, config.data.ti2i = 1.0, 0.0
  config.num_steps, config.preview_every, config.save_every = 2, 2, 2
  config.latent_stat_batches = 1
  workdir = str(tmp_path / "run")
  assert train.train(config, workdir) == 0
  scoring = evaluate_config.get_config("vae")
  out = evaluate_vae.run(workdir, scoring, str(tmp_path / "out"), str(folder))
  (scores,) = out["models"].values()
  assert scores["images"] == 2 and scores["figures"]["psnr"]["n"] == 2
  page = pathlib.Path(tmp_path, "out", "report.html").read_text()
  assert "astronaut.png" in page and "page.png" in page
