# SPDX-License-Identifier: Apache-2.0
"""The evaluation of VAEs, with models whose scores are known beforehand."""

import csv
import json
import re

import jax
import numpy as np
import pytest
import tiny_models
from PIL import Image

from data_pipelines.records import DatasetWriter, Record, encode_png
from data_pipelines.shapes.prompts import sample_split
from data_pipelines.shapes.render import render
from experiments import evaluate as config_file
from qi2_jax import evaluate_vae
from qi2_jax.errors import InputError
from qi2_jax.evaluation import image_metrics, vae_report, vae_scores
from qi2_jax.evaluation.vae_scores import Picture
from qi2_jax.interop import model_folder
from qi2_jax.models import vae

SIZES = {"large_1.png": (30, 44), "b.png": (30, 44), "a/c.jpg": (24, 24)}


def image(seed, height=30, width=44, channels=3):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (4, 4, channels), np.uint8)
  return np.array(Image.fromarray(coarse).resize((width, height)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("images")
  (path / "a").mkdir()
  (path / "notes.txt").write_text("no image")
  for seed, (name, size) in enumerate(SIZES.items()):
    Image.fromarray(image(seed, *size)).save(path / name)
  return str(path)


def config_of(**fields):
  config = config_file.get_config("vae")
  config.update_from_flattened_dict(
    {"batch_size": 2, "pictures": 2, "lpips.random_features": True,
     "lpips.widths": (4, 4, 4, 4, 4)} | fields
  )  # fmt: skip
  return config


def shifted(by):
  """A model that changes each image by a grey level of its own."""

  def reconstruct(images):
    return [
      np.uint8(np.clip(np.int16(i) + by + (i.shape[0] == 24), 0, 255))
      for i in images
    ]

  return reconstruct


def test_the_table_the_samples_and_the_page(folder, tmp_path):
  size = {"encoder": 1_000_000, "decoder": 2_500_000}
  found = [("far", shifted(8), size), ("near", shifted(1), size)]
  out = evaluate_vae.evaluate(
    iter(found), config_of(), folder, str(tmp_path / "out")
  )
  written = json.loads((tmp_path / "out/results.json").read_text())
  assert written["models"] == out["models"]
  near, far = (out["models"][n]["figures"] for n in ("near", "far"))
  assert near["psnr"]["mean"] > far["psnr"]["mean"] + 10
  assert near["ssim"]["mean"] > far["ssim"]["mean"]
  assert near["lpips"]["mean"] < far["lpips"]["mean"]
  assert near["psnr"]["n"] == out["models"]["near"]["images"] == 3
  with (tmp_path / "out/per_sample.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [r["model"] for r in rows] == ["far"] * 3 + ["near"] * 3
  assert {r["name"] for r in rows} == set(SIZES)
  for row in rows:
    size = SIZES[row["name"]]
    assert (int(row["height"]), int(row["width"])) == size
  psnr = [float(r["psnr"]) for r in rows[:3]]
  assert np.mean(psnr) == pytest.approx(far["psnr"]["mean"], abs=1e-3)
  page = (tmp_path / "out/report.html").read_text()
  assert "RANDOM" in page and "1.00 / 2.50" in page
  # The two worst of each model, the worst one first: c has one level more.
  shown = re.findall(r"(\S+): PSNR", page)
  assert shown[0].endswith("a/c.jpg") and shown[2].endswith("a/c.jpg")
  assert page.count("data:image/png") == 2 * 2 * 3


def test_the_mean_leaves_out_what_is_perfect():
  rows = [{"psnr": 30.0, "ssim": 0.5}, {"psnr": np.inf, "ssim": 1.0}]
  out = vae_scores.summary(rows)
  assert out["psnr"] == {"mean": 30.0, "half_width": 0.0, "n": 1}
  assert out["ssim"]["n"] == 2 and out["ssim"]["mean"] == 0.75
  spread = np.std([0.5, 1.0], ddof=1) / np.sqrt(2)
  assert out["ssim"]["half_width"] == pytest.approx(1.96 * spread)
  assert "lpips" not in out


def test_batches_hold_one_shape_and_every_picture():
  shapes = [(2, 3), (4, 5), (2, 3), (2, 3), (4, 5), (6, 7)]
  made = [
    Picture(str(i), np.zeros((*s, 3), np.uint8)) for i, s in enumerate(shapes)
  ]
  groups = [[p.name for p in g] for g in vae_scores.batches(made, 2)]
  assert groups == [["0", "2"], ["1", "4"], ["3"], ["5"]]


def small(channels):
  """A VAE whose weights are all noise, and the module."""
  config = vae.VAEConfig(
    image_channels=channels, patch_size=4, base_dim=8, decoder_base_dim=8,
    z_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(False,),
    carry_temporal=False,
  )  # fmt: skip
  module = vae.VAE(config)
  variables = vae.init_variables(module, jax.random.key(0))
  stats = {"mean": np.linspace(-1, 1, 4), "std": np.linspace(1, 2, 4)}
  params = tiny_models.randomise(variables["params"])
  return module, {"params": params, "latent_stats": stats}


def test_any_size_goes_through_and_is_rounded():
  module, variables = small(4)
  picture = image(0)
  (out,) = vae_scores.reconstructor(module, variables)([picture])
  assert out.shape == picture.shape and out.dtype == np.uint8
  padded = np.pad(picture, ((0, 2), (0, 4), (0, 0)), mode="edge")
  x = np.concatenate([padded, np.full((32, 48, 1), 255)], -1) / 127.5 - 1
  plain, _, _ = jax.jit(module.apply)(variables, x[None].astype(np.float32))
  plain = (np.clip(plain, -1, 1) + 1) / 2
  over_white = plain[0, ..., :3] * plain[0, ..., 3:] + 1 - plain[0, ..., 3:]
  error = np.abs(over_white[:30, :44] * 255 - out)
  assert error.max() <= 1.5  # alpha and colour are rounded apart
  assert out.std() > 5


def test_alpha_is_kept_or_laid_over_white():
  rgba = image(1, channels=4)
  np.testing.assert_array_equal(
    vae_scores.padded([rgba], 2, 4)[0], rgba
  )  # fmt: skip
  white = np.array(
    Image.alpha_composite(
      Image.new("RGBA", rgba.shape[1::-1], "white"), Image.fromarray(rgba)
    ).convert("RGB")
  )
  gap = np.int16(vae_scores.padded([rgba], 2, 3)[0]) - np.int16(white)
  assert np.abs(gap).max() <= 1


def test_own_folders_are_scored_side_by_side(folder, tmp_path):
  module, variables = small(3)
  paths = [str(tmp_path / name) for name in ("one", "two")]
  for path in paths:
    model_folder.save_vae(path, module.config, variables)
  config = config_of(count=2, size=(32, 32), untrained=True)
  config.lpips.random_features = False
  out = evaluate_vae.run(",".join(paths), config, str(tmp_path / "out"), folder)
  scores = out["models"]
  assert list(scores) == ["one", "two", "untrained"]
  assert scores["one"]["figures"] == scores["two"]["figures"]
  assert scores["one"]["figures"] != scores["untrained"]["figures"]
  assert "lpips" not in scores["one"]["figures"] and out["notes"]
  total = sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert sum(scores["one"]["parameters"].values()) == total


def test_words_are_read_in_both_images(tmp_path):
  example = sample_split("word", "seen", np.random.default_rng(0))
  drawn = render(example.scene, 128, 128)
  path = str(tmp_path / "data")
  with DatasetWriter(path) as writer:
    writer.add(Record("w", "t2i", "a word", "word", encode_png(drawn), (), {}))
  read = evaluate_vae.text_reader("shapes")
  for reconstruct, expected in (
    (lambda images: list(images), 1.0),
    (lambda images: [np.full_like(i, drawn[0, 0]) for i in images], 0.0),
  ):
    (group,) = vae_scores.batches(evaluate_vae.pictures(path, config_of()), 4)
    (scored,) = vae_scores.score(group, reconstruct, read=read)
    assert scored.figures["ned"] == expected
    assert len(scored.texts[0]) > 1


def test_the_window_of_the_largest_error_is_shown():
  a = np.zeros((50, 70, 3), np.uint8)
  b = a.copy()
  b[41:44, 5:8] = 90
  rows, columns = vae_report.worst_window(a, b, 16)
  assert (rows.stop - rows.start, columns.stop - columns.start) == (16, 16)
  assert rows.start <= 41 and rows.stop >= 44 and rows.stop <= 50
  assert 0 <= columns.start <= 5 and columns.stop >= 8
  assert vae_report.difference(a, b).max() == 255
  assert vae_report.difference(a, a).max() == 0
  whole = vae_report.worst_window(a[:9, :12], b[:9, :12], 16)
  assert whole == (slice(0, 9), slice(0, 12))


def test_bad_input_is_named(folder, tmp_path):
  run = lambda config, data, model="m": evaluate_vae.run(  # noqa: E731
    model, config, str(tmp_path / "out"), data
  )
  with pytest.raises(InputError, match="pass --data"):
    run(config_of(), None)
  with pytest.raises(InputError, match="neither a dataset nor images"):
    run(config_of(), str(tmp_path / "empty"))
  with pytest.raises(InputError, match="use one of"):
    run(config_of(ocr="eyes"), folder)
  with pytest.raises(InputError, match="both vgg and linear"):
    fields = {"lpips.random_features": False, "lpips.vgg": "x"}
    run(config_of(**fields), folder)
  with pytest.raises(InputError, match="holds no VAE"):
    run(config_of(), folder, str(tmp_path / "nowhere"))
  with pytest.raises(InputError, match="pass --out"):
    evaluate_vae.run("a,b", config_of(), "", folder)
  broken = tmp_path / "broken"
  broken.mkdir()
  (broken / "x.png").write_bytes(b"not an image")
  with pytest.raises(InputError, match=r"x\.png: Unreadable image"):
    list(evaluate_vae.pictures(str(broken), config_of()))


def test_a_missing_reader_is_named():
  for name in ("rapidocr", "tesseract"):
    module = {"rapidocr": "rapidocr", "tesseract": "pytesseract"}[name]
    try:
      __import__(module)
    except ImportError:
      with pytest.raises(InputError, match=r"config\.ocr=none"):
        evaluate_vae.text_reader(name)


def test_labels_are_short_and_unique():
  assert evaluate_vae.labels(["runs/a", "b/"]) == ["a", "b"]
  assert evaluate_vae.labels(["x/vae", "y/vae"]) == ["x/vae", "y/vae"]


def test_a_figure_of_the_page_is_that_of_the_metric():
  a, b = image(0), image(1)
  (scored,) = vae_scores.score([Picture("p", a)], lambda images: [b])
  assert scored.figures["psnr"] == image_metrics.psnr(a, b)
  assert scored.figures["ssim"] == image_metrics.ssim(a, b)
