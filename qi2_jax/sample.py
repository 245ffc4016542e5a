# SPDX-License-Identifier: Apache-2.0
"""Makes images from a trained workdir.

    python -m qi2_jax.sample --model=runs/demo/sft \\
      --prompt="the letter A in blue" --num=4 --out=a.png
    python -m qi2_jax.sample --model=runs/demo/sft --image=a.png \\
      --prompt="change the letter to B" --out=b.png

With several images (--num, --prompts) the output is a grid, and every image
is written beside it. --image makes it an edit; repeat it for several
references. The output size defaults to the last reference's aspect ratio.
"""

import dataclasses
import math
import os

from absl import flags, logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qi2_jax import cli
from qi2_jax.conditioning.conditioner import to_uint8
from qi2_jax.conditioning.images import load_reference, target_size
from qi2_jax.errors import InputError
from qi2_jax.evaluation.images import grid
from qi2_jax.flow.generate import Request
from qi2_jax.pipeline import Pipeline

_GRID_COLUMNS = 8


def _define_flags():
  flags.DEFINE_string("model", None, "Training workdir (pretrain or sft).")
  flags.DEFINE_string("prompt", None, "Text, or edit instruction.")
  flags.DEFINE_string("prompts", None, "Text file with one prompt per line.")
  flags.DEFINE_string("negative_prompt", "", "What guidance steers away from.")
  flags.DEFINE_multi_string("image", [], "Reference image; repeatable.")
  flags.DEFINE_integer("height", None, "Pixels; default from --resolution.")
  flags.DEFINE_integer("width", None, "Pixels; default from --resolution.")
  flags.DEFINE_integer(
    "resolution", None, "Side of the square area for references and sizes."
  )
  flags.DEFINE_integer("steps", None, "Euler steps; default from the run.")
  flags.DEFINE_float("guidance", None, "Guidance scale; 1 is off.")
  flags.DEFINE_integer("seed", 0, "Seed of the first image.")
  flags.DEFINE_integer("num", 1, "Images per prompt.", lower_bound=1)
  flags.DEFINE_string("out", "sample.png", "PNG to write.")
  flags.mark_flag_as_required("model")


def read_prompts(prompt: str | None, path: str | None) -> list[str]:
  """The prompts of --prompt or of the lines of --prompts.

  Raises:
    InputError: none or both are given, or the file is missing or empty.
  """
  if (prompt is None) == (path is None):
    raise InputError("give either --prompt or --prompts.")
  if path is None:
    return [prompt]
  if not os.path.isfile(path):
    raise InputError(f"the prompt file {path} does not exist.")
  with open(path, encoding="utf-8") as file:
    lines = [line.strip() for line in file if line.strip()]
  if not lines:
    raise InputError(f"the prompt file {path} is empty.")
  return lines


def save_png(path: str, image, info: dict) -> None:
  """Writes a uint8 image with the generation parameters embedded."""
  meta = PngInfo()
  for key, value in info.items():
    meta.add_text(key, str(value))
  Image.fromarray(image).save(path, pnginfo=meta)


def main() -> int:
  """Entry point."""
  values = flags.FLAGS
  prompts = read_prompts(values.prompt, values.prompts)
  folder = os.path.dirname(os.path.abspath(values.out))
  if not os.path.isdir(folder):
    raise InputError(f"the folder of --out, {folder}, does not exist.")
  pipeline = Pipeline.load(values.model)
  side = values.resolution or pipeline.side
  channels = pipeline.generator.vae.config.image_channels
  references = tuple(
    load_reference(path, side, channels) for path in values.image
  )
  height, width = target_size(
    values.height, values.width, references, side,
    pipeline.generator.conditioner.factor,
  )  # fmt: skip
  requests = [
    Request(
      prompt, references, height, width, values.seed + n,
      values.negative_prompt,
    )
    for prompt in prompts
    for n in range(values.num)
  ]  # fmt: skip
  overrides = {
    name: getattr(values, name)
    for name in ("steps", "guidance")
    if getattr(values, name) is not None
  }
  batch = min(len(requests), pipeline.sampling.batch_size)
  config = dataclasses.replace(pipeline.sampling, batch_size=batch, **overrides)
  total = len(requests)
  images = pipeline(
    requests, config, lambda n: logging.info("%d/%d images", n, total)
  )
  images = [to_uint8(image) for image in images]
  stem, extension = os.path.splitext(values.out)
  for i, (request, image) in enumerate(zip(requests, images)):
    path = values.out if total == 1 else f"{stem}_{i:03d}{extension}"
    info = {
      "prompt": request.prompt, "seed": request.seed, "steps": config.steps,
      "guidance": config.guidance, "model": values.model,
      "step": pipeline.step,
    }  # fmt: skip
    save_png(path, image, info)
  if total > 1:
    columns = min(_GRID_COLUMNS, math.ceil(math.sqrt(total)))
    save_png(values.out, grid(images, columns), {"images": total})
  logging.info("wrote %s (%d x %d, %d images)", values.out, width, height,
               total)  # fmt: skip
  return 0


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
