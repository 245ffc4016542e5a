# SPDX-License-Identifier: Apache-2.0
"""Makes images from a Qwen-Image-2.x folder, a checkpoint or a workdir.

    python -m qi2_jax.sample --model=Qwen-Image-2.1 --size=16:9 \\
      --prompt="a lighthouse at dawn" --out=lighthouse.png
    python -m qi2_jax.sample --model=Qwen-Image-2.1 --image=a.png \\
      --image=b.png --prompt="put <image2> into <image1>" --out=both.png
    python -m qi2_jax.sample --model=runs/demo/sft --prompts=prompts.txt \\
      --num=4 --out=grid.png

--model takes a diffusers folder, a folder of `qi2_jax.convert import`, or a
pretrain or sft workdir. --prompts is a text file with one prompt per line, or
a .jsonl file whose rows have `prompt` and optionally `negative_prompt`,
`images` (paths relative to the file), `size`, `height`, `width` and `seed`.

--image makes it an edit; repeat it for several references. The size is
--height and --width, or --size, else the last reference's aspect ratio, else
a square; --resolution is the side of the square area of references and
derived sizes. A prompt decides about transparency; the alpha channel is kept.

With several images, every image is written beside --out as soon as it is
finished, with the parameters embedded, and --out becomes a grid (.png) or an
array `[B, H, W, C]` (.npy, float32 in [0, 1], no 8-bit rounding).
"""

import dataclasses
import json
import math
import os

import numpy as np
import tqdm
from absl import flags, logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qi2_jax import __version__, cli
from qi2_jax.conditioning.conditioner import to_uint8
from qi2_jax.conditioning.images import (
  SLOT,
  check_count,
  explicit_size,
  open_image,
  target_size,
)
from qi2_jax.errors import InputError
from qi2_jax.evaluation.images import grid
from qi2_jax.flow.generate import Request, SamplingConfig
from qi2_jax.pipeline import Pipeline, noise_rows

_GRID_COLUMNS = 8
_SIDE = 1024  # for checks before the model's own resolution is known
_ROW_KEYS = {
  "prompt", "negative_prompt", "images", "size", "height", "width", "seed",
}  # fmt: skip


def _define_flags():
  flags.DEFINE_string("model", None, "Model folder or training workdir.")
  flags.DEFINE_string("prompt", None, "Text, or edit instruction.")
  flags.DEFINE_string("prompts", None, "Text or .jsonl file of prompts.")
  flags.DEFINE_string("negative_prompt", "", "What guidance steers away from.")
  flags.DEFINE_multi_string("image", [], "Reference image; repeatable.")
  flags.DEFINE_string("size", None, "Ratio (16:9) or WIDTHxHEIGHT.")
  flags.DEFINE_integer("height", None, "Pixels, a multiple of 32.")
  flags.DEFINE_integer("width", None, "Pixels, a multiple of 32.")
  flags.DEFINE_integer(
    "resolution", None,
    "Side of the square area for references and derived sizes; default: "
    "1024, or what a workdir was trained on.",
    lower_bound=32,
  )  # fmt: skip
  flags.DEFINE_integer("steps", None, "Euler steps; default: 40 or the run's.")
  flags.DEFINE_float(
    "guidance", None, "Guidance scale; default: 1 (off) or the run's."
  )
  flags.DEFINE_integer("seed", 0, "Seed of the first image of each prompt.")
  flags.DEFINE_integer("num", 1, "Images per prompt.", lower_bound=1)
  flags.DEFINE_integer(
    "batch_size", None, "Images per compiled call.", lower_bound=1
  )
  flags.DEFINE_string(
    "latents", None, "Starting noise [B, h, w, 64], normalised, as .npy."
  )
  flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"],
    "Default: float32 on CPU, bfloat16 elsewhere, or the run's.",
  )  # fmt: skip
  flags.DEFINE_integer(
    "devices", None,
    "Devices that share a folder's weights; default: 1 on CPU, else all.",
    lower_bound=1,
  )  # fmt: skip
  flags.DEFINE_multi_string(
    "lora", [], "LoRA file or folder, optionally :WEIGHT; repeatable."
  )
  flags.DEFINE_string("out", "sample.png", "PNG or .npy to write.")
  flags.mark_flag_as_required("model")


def read_prompts(prompt: str | None, path: str | None) -> list[dict]:
  """Rows of --prompt or of the file --prompts; each has at least `prompt`.

  Raises:
    InputError: none or both are given, or the file is missing, empty or
      malformed.
  """
  if (prompt is None) == (path is None):
    raise InputError("give either --prompt or --prompts.")
  if path is None:
    return [{"prompt": prompt}]
  if not os.path.isfile(path):
    raise InputError(f"the prompt file {path} does not exist.")
  try:
    with open(path, encoding="utf-8") as file:
      lines = [line.strip() for line in file]
  except UnicodeDecodeError as error:
    raise InputError(f"the prompt file {path} is no UTF-8 text.") from error
  numbered = [(i, line) for i, line in enumerate(lines, 1) if line]
  if not numbered:
    raise InputError(f"the prompt file {path} is empty.")
  if not path.endswith(".jsonl"):
    return [{"prompt": line} for _, line in numbered]
  return [_json_row(path, number, line) for number, line in numbered]


def _json_row(path: str, number: int, line: str) -> dict:
  where = f"{path}:{number}"
  try:
    row = json.loads(line)
  except ValueError as error:
    raise InputError(f"{where} is no valid JSON ({error}).") from error
  if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
    raise InputError(f"{where} needs a JSON object with a text `prompt`.")
  unknown = sorted(set(row) - _ROW_KEYS)
  if unknown:
    raise InputError(
      f"{where} has an unknown key {unknown[0]!r}; the keys are "
      f"{', '.join(sorted(_ROW_KEYS))}."
    )
  folder = os.path.dirname(path)
  images = [os.path.join(folder, image) for image in row.get("images", ())]
  return row | ({"images": images} if images else {})


def read_latents(path: str | None) -> np.ndarray | None:
  """Starting noise of a .npy file.

  Raises:
    InputError: the file is missing or holds no numbers.
  """
  if path is None:
    return None
  try:
    noise = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"cannot read --latents={path} ({error}).") from error
  if not np.issubdtype(noise.dtype, np.floating):
    raise InputError(f"--latents={path} holds {noise.dtype}, not floats.")
  return noise


def check_row(options: dict, side: int) -> None:
  """Raises InputError for images and sizes that no model takes."""
  check_count(len(options["images"]))
  for image in options["images"]:
    open_image(image)
  size = explicit_size(
    options["size"], options["height"], options["width"], side
  )
  target_size(*size, (), side, SLOT // 2)


def rows_of(values) -> list[dict]:
  """The options of every prompt: flags, overridden by rows of the file.

  Raises:
    InputError: whatever can be found without the model. Loading it takes
      minutes, which a mistyped name should not cost.
  """
  defaults = {
    "images": values.image, "negative_prompt": values.negative_prompt,
    "size": values.size, "height": values.height, "width": values.width,
    "seed": values.seed,
  }  # fmt: skip
  rows = []
  for row in read_prompts(values.prompt, values.prompts):
    # A row's own size replaces all of the command line's.
    if row.keys() & {"size", "height", "width"}:
      row = {"size": None, "height": None, "width": None} | row
    rows.append(defaults | row)
    check_row(rows[-1], values.resolution or _SIDE)
  return rows


def requests_of(values, rows, pipeline: Pipeline) -> list[Request]:
  """One request per row and number of --num."""
  noise = noise_rows(read_latents(values.latents), len(rows) * values.num)
  requests = []
  for options in rows:
    first = pipeline.request(**options, resolution=values.resolution)
    requests += [
      dataclasses.replace(
        first, seed=first.seed + n, noise=noise[len(requests) + n]
      )
      for n in range(values.num)
    ]
  return requests


def save(path: str, image: np.ndarray, info: dict) -> None:
  """Writes an image in [-1, 1] as PNG with `info` embedded, or as .npy."""
  temporary = f"{path}.tmp"
  with open(temporary, "wb") as file:
    if path.endswith(".npy"):
      np.save(file, np.float32(0.5 * image + 0.5))
    else:
      meta = PngInfo()
      for key, value in info.items():
        meta.add_text(key, str(value))
      Image.fromarray(to_uint8(image)).save(file, format="PNG", pnginfo=meta)
  os.replace(temporary, path)


def _info(values, pipeline, request: Request, config: SamplingConfig) -> dict:
  """What made an image, for its PNG header."""
  steps = config.steps if config.sigmas is None else len(config.sigmas)
  info = {
    "prompt": request.prompt, "negative_prompt": request.negative,
    "seed": request.seed, "steps": steps, "guidance": config.guidance,
    "width": request.width, "height": request.height,
    "images": len(request.references), "latents": values.latents,
    "model": values.model, "step": pipeline.step, "lora": values.lora,
    "software": f"qi2_jax {__version__}",
  }  # fmt: skip
  return {k: v for k, v in info.items() if v not in (None, "", [])}


def check_out(path: str) -> None:
  """Raises InputError unless a PNG or .npy can be written at `path`."""
  if os.path.splitext(path)[1] not in (".png", ".npy"):
    raise InputError(f"--out={path} must end in .png or .npy.")
  folder = os.path.dirname(os.path.abspath(path))
  if not os.path.isdir(folder):
    raise InputError(f"the folder of --out, {folder}, does not exist.")
  if not os.access(folder, os.W_OK):
    raise InputError(f"the folder of --out, {folder}, cannot be written.")


def run(values) -> int:
  """Samples what the flags ask for; returns the exit status.

  Raises:
    InputError: for anything the user can mend, before it costs time.
  """
  check_out(values.out)
  rows = rows_of(values)
  noise_rows(read_latents(values.latents), len(rows) * values.num)
  pipeline = Pipeline.load(values.model, values.dtype, values.devices)
  pipeline = pipeline.with_loras(values.lora)
  for note in pipeline.notes:
    logging.info("%s", note)
  requests = requests_of(values, rows, pipeline)
  config = pipeline.sampling_with(values.guidance, values.steps)
  size = values.batch_size or pipeline.sampling.batch_size
  config = dataclasses.replace(config, batch_size=min(size, len(requests)))
  images = _make(values, pipeline, requests, config)
  if len(requests) > 1:
    _save_all(values.out, images)
  first = requests[0]
  logging.info("wrote %s (%d x %d, %d images)", values.out, first.width,
               first.height, len(images))  # fmt: skip
  return 0


def _make(values, pipeline, requests, config) -> list[np.ndarray]:
  """Samples with a progress bar; every image is saved when it is finished."""
  total = len(requests)
  stem, extension = os.path.splitext(values.out)
  images: list = [None] * total
  line = "{l_bar}{bar}| {n:.2f}/{total} images [{elapsed}<{remaining}]"
  with tqdm.tqdm(total=total, bar_format=line) as bar:
    finished = pipeline.stream(
      requests, config, lambda n: bar.update(n - bar.n)
    )
    for i, image in finished:
      path = values.out if total == 1 else f"{stem}_{i:03d}{extension}"
      save(path, image, _info(values, pipeline, requests[i], config))
      images[i] = image
  return images


def _save_all(path: str, images: list[np.ndarray]) -> None:
  """A grid of all images, or one array if they have one size."""
  if path.endswith(".npy"):
    if len({image.shape for image in images}) == 1:
      save(path, np.stack(images), {})
    return
  columns = min(_GRID_COLUMNS, math.ceil(math.sqrt(len(images))))
  pixels = grid([to_uint8(image) for image in images], columns)
  Image.fromarray(pixels).save(path)


def main() -> int:
  """Entry point."""
  return run(flags.FLAGS)


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
