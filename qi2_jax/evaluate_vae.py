# SPDX-License-Identifier: Apache-2.0
"""Scores VAEs by what they reconstruct; called by `evaluate`.

    python -m qi2_jax.evaluate --config=experiments/evaluate.py:vae \\
      --model=runs/vae,models/qi21 --data=photos --out=runs/vae_scores

Each model is a workdir, a VAE folder or a pipeline folder; several stand in
one table. The data are a dataset folder or any folder of images. Writes
results.json, per_sample.csv and report.html. VAEs of other classes are
scored the same way by benchmarks/vae_table.py.
"""

import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image as PillowImage

from data_pipelines.errors import InputError as DataInputError
from data_pipelines.images import (
  SUFFIXES,
  EncodedImage,
  decode_image,
  from_bytes,
)
from data_pipelines.loader.buckets import Bucket, fit
from data_pipelines.records import open_dataset
from data_pipelines.shapes import colour, reader
from qi2_jax.errors import InputError
from qi2_jax.evaluation import environment, store, vae_report, vae_scores
from qi2_jax.evaluation.progress import reporter
from qi2_jax.evaluation.vae_scores import Picture, Scored
from qi2_jax.interop import lpips as lpips_files
from qi2_jax.models.lpips import LPIPSConfig
from qi2_jax.models.vae import init_variables
from qi2_jax.training import build

READERS = ("none", "shapes", "rapidocr", "tesseract")


def pictures(data: str, config) -> Iterator[Picture]:
  """Images of a dataset folder or of a folder of files, in order.

  Args:
    data: the folder.
    config: `count` images at most (0: all); `size` (height, width) they are
      cropped and resized to, () leaves them as they are.

  Raises:
    InputError: there are no images, or one of them cannot be read.
  """
  for name, encoded in _encoded(data, config.count):
    image = decode_image(encoded)
    if config.size:
      channels = 4 if image.mode == "RGBA" else 3
      yield Picture(name, fit(image, Bucket(*config.size), channels))
    else:
      yield Picture(name, np.array(image))


def _encoded(data: str, count: int) -> Iterator[tuple[str, EncodedImage]]:
  if os.path.isfile(os.path.join(data, "manifest.json")):
    dataset = open_dataset(data)
    for i in range(min(count or len(dataset), len(dataset))):
      record = dataset[i]
      yield record.id, record.target
    dataset.close()
    return
  for path in image_files(data)[: count or None]:
    name = path.relative_to(data).as_posix()
    try:
      yield name, from_bytes(path.read_bytes())
    except DataInputError as error:
      raise InputError(f"{path}: {error}") from error


def image_files(folder: str) -> list[pathlib.Path]:
  """Images below a folder, sorted by name.

  Raises:
    InputError: there are none.
  """
  found = sorted(
    path
    for path in pathlib.Path(folder).rglob("*")
    if path.suffix.lower() in SUFFIXES and path.is_file()
  )
  if not found:
    raise InputError(
      f"{folder} holds neither a dataset nor images "
      f"({', '.join(SUFFIXES)}); pass another --data."
    )
  return found


def text_reader(name: str) -> Callable[[np.ndarray], str] | None:
  """A function from an RGB image to the text in it.

  Args:
    name: `none`; `rapidocr` or `tesseract`, if installed; or `shapes`, which
      reads one line of the rendered task's font and nothing else.

  Raises:
    InputError: unknown, or not installed.
  """
  if name not in READERS:
    raise InputError(f"config.ocr={name!r} is unknown; use one of {READERS}.")
  try:
    if name == "rapidocr":
      from rapidocr import RapidOCR

      engine = RapidOCR(params={"Global.use_cls": False})
      return lambda image: "".join(engine(image).txts or ())
    if name == "tesseract":
      import pytesseract

      pytesseract.get_tesseract_version()
      return lambda image: pytesseract.image_to_string(
        PillowImage.fromarray(image)
      ).strip()
  except Exception as error:  # pytesseract has an error of its own.
    raise InputError(
      f"config.ocr={name} does not work here ({error}); install "
      "rapidocr and onnxruntime, or pytesseract and tesseract, or set "
      "--config.ocr=none."
    ) from error
  return _shapes_text if name == "shapes" else None


def _shapes_text(image: np.ndarray) -> str:
  ink = reader.dominant_colour(colour.palette_labels(image))
  return reader.read_text(image, ink) if ink else ""


def _distance(config) -> tuple[Callable | None, list[str]]:
  """LPIPS of `config.lpips`, and what the report must say of it."""
  if config.random_features:
    shape = LPIPSConfig(widths=tuple(config.widths), dtype=jnp.float32)
    model = lpips_files.random_features(jax.random.key(1), config=shape)
    note = "LPIPS is measured with RANDOM features and means nothing."
    return vae_scores.perceptual(*model), [note]
  if bool(config.vgg) != bool(config.linear):
    raise InputError("config.lpips needs both vgg and linear, or neither.")
  if not config.vgg:
    return None, ["Without --config.lpips.vgg and linear there is no LPIPS."]
  return vae_scores.perceptual(*lpips_files.load(config.vgg, config.linear)), []


def labels(models: Sequence[str]) -> list[str]:
  """Short and unique names of paths, for the table."""
  short = [os.path.basename(os.path.normpath(m)) for m in models]
  return [m if short.count(s) > 1 else s for m, s in zip(models, short)]


def sizes(params) -> dict[str, int]:
  """Parameters of encoder and decoder with their 1x1 heads."""
  count = lambda *names: sum(  # noqa: E731
    x.size for n in names for x in jax.tree.leaves(params[n])
  )
  return {
    "encoder": count("encoder", "quant_conv"),
    "decoder": count("decoder", "post_quant_conv"),
  }


def models(paths: Sequence[str], config) -> Iterator[tuple]:
  """`(label, reconstruct, parameters)` of every model, read one by one."""
  for label, path in zip(labels(paths), paths):
    module, variables = build.load_vae(path)
    size = sizes(variables["params"])
    yield label, vae_scores.reconstructor(module, variables), size
  if config.untrained:
    init = jax.jit(lambda key: init_variables(module, key))
    fresh = init(jax.random.key(config.seed))
    yield "untrained", vae_scores.reconstructor(module, fresh), size


def evaluate_one(
  label: str, reconstruct: Callable, data: str, config, distance, read
) -> tuple[list[dict], dict, list[Scored]]:
  """`(lines of the samples, figures, worst reconstructions)` of a model."""
  lines, figures, shown = [], [], []
  report = reporter(label, config.count or _length(data))
  groups = vae_scores.batches(pictures(data, config), config.batch_size)
  for group in groups:
    scored = vae_scores.score(group, reconstruct, distance, read)
    lines += [vae_report.sample_row(s) for s in scored]
    figures += [s.figures for s in scored]
    shown = vae_scores.worst([*shown, *scored], config.pictures)
    report(len(lines))
  return lines, vae_scores.summary(figures), shown


def _length(data: str) -> int:
  if os.path.isfile(os.path.join(data, "manifest.json")):
    dataset = open_dataset(data)
    dataset.close()
    return len(dataset)
  return len(image_files(data))


def evaluate(found: Iterator[tuple], config, data: str, out: str) -> dict:
  """Scores models on one set of images and writes the folder.

  Args:
    found: `(label, reconstruct, parameters)` of each model.
    config: of experiments/evaluate.py:vae.
    data: folder of the images.
    out: folder to write.

  Returns:
    What results.json holds.

  Raises:
    InputError: bad data, networks or folder; before any model runs.
  """
  start = time.monotonic()
  if not _length(data):
    raise InputError(f"the dataset {data} is empty; pass another --data.")
  read = text_reader(config.ocr)
  distance, notes = _distance(config.lpips)
  if config.ocr == "shapes":
    notes.append(
      "NED is measured by template matching of the rendered task's own font, "
      "not by an OCR engine."
    )
  folder = store.create(out)
  rows, shown, scores = {}, {}, {}
  for label, reconstruct, size in found:
    rows[label], figures, shown[label] = evaluate_one(
      label, reconstruct, data, config, distance, read
    )
    scores[label] = {
      "images": len(rows[label]), "parameters": size, "figures": figures,
    }  # fmt: skip
  results: dict[str, Any] = {
    "data": data, "models": scores, "notes": notes,
    "config": config.to_dict(), "versions": environment.versions(),
    "machine": environment.machine(), "device": jax.devices()[0].device_kind,
    "seconds": round(time.monotonic() - start, 1),
  }  # fmt: skip
  vae_report.write_samples(folder, rows)
  vae_report.write(folder, results, shown)
  print(f"{folder / 'report.html'}: {summary_line(results)}")
  return results


def summary_line(results: dict) -> str:
  """The means of every model in one line."""
  return "; ".join(
    f"{label} "
    + ", ".join(f"{k} {v['mean']:.4g}" for k, v in model["figures"].items())
    for label, model in results["models"].items()
  )


def run(model: str, config, out: str, data: str | None) -> dict:
  """`evaluate` of our own VAE class, with the flags of the command.

  Raises:
    InputError: as `evaluate`, or no VAE at a path.
  """
  if not data:
    raise InputError(
      "VAEs are scored on images; pass --data, a dataset folder or a folder "
      "of image files."
    )
  paths = [path.strip() for path in model.split(",")]
  if not out and len(paths) > 1:
    raise InputError("several models share one report; pass --out.")
  out = out or os.path.join(paths[0], "evaluation")
  return evaluate(models(paths, config), config, data, out)
