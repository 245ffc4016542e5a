# SPDX-License-Identifier: Apache-2.0
"""Image files to the input of CLIP and SigLIP, on the host.

Equals the Pillow image processors of transformers: resize, centre crop,
scale, normalise. Transparent images are laid over white first, where theirs
drop the alpha channel and show whatever colour lies under it.
"""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np
from PIL import Image

from qi2_jax.conditioning.vl_layout import over_white
from qi2_jax.errors import InputError
from qi2_jax.interop.published import read_json

_FILE = "preprocessor_config.json"
# Newer folders hold all processors of a model in one file.
_NEW_FILE = "processor_config.json"
# What transformers' classes have where a file is silent.
_CLIP = {
  "size": {"shortest_edge": 224},
  "crop_size": {"height": 224, "width": 224},
  "image_mean": (0.48145466, 0.4578275, 0.40821073),
  "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SIGLIP = {
  "size": {"height": 224, "width": 224},
  "do_center_crop": False,
  "image_mean": (0.5, 0.5, 0.5),
  "image_std": (0.5, 0.5, 0.5),
}
_BOTH = {
  "do_resize": True, "do_center_crop": True, "do_rescale": True,
  "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
  """How an image becomes an input.

  Attributes:
    mean: per channel, after scaling.
    std: per channel, after scaling.
    shortest: pixels of the shorter side after resizing; None: see `size`.
    size: (height, width) after resizing; None leaves the size.
    crop: (height, width) of the centre that is kept; None keeps all.
    resample: Pillow's number of the filter.
    scale: factor of the uint8 values.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  shortest: int | None = None
  size: tuple[int, int] | None = None
  crop: tuple[int, int] | None = None
  resample: int = Image.Resampling.BICUBIC
  scale: float = 1 / 255

  def whole(self, side: int) -> "ImageProcessor":
    """The same without a crop: the whole image, squeezed into a square."""
    return dataclasses.replace(
      self, shortest=None, size=(side, side), crop=None
    )


def _sides(value, name: str) -> tuple[int, int]:
  """A size written as a number, a pair or a mapping."""
  if isinstance(value, int):
    value = {"height": value, "width": value}
  if isinstance(value, Mapping) and {"height", "width"} <= set(value):
    return value["height"], value["width"]
  raise InputError(
    f"{_FILE} has {name}={value!r}, which is not supported; it needs height "
    "and width, or one number."
  )


def parse(fields: Mapping, kind: str) -> ImageProcessor:
  """Reads a transformers `preprocessor_config.json`.

  Args:
    fields: the parsed file.
    kind: `clip` or `siglip`, whose defaults fill what is absent.

  Raises:
    InputError: a size of a form that is not implemented.
  """
  fields = _BOTH | (_CLIP if kind == "clip" else _SIGLIP) | dict(fields)
  size, shortest = fields["size"], None
  # The first CLIP files have one number, which means the shorter side.
  if kind == "clip" and isinstance(size, int):
    size = {"shortest_edge": size}
  if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
    size, shortest = None, size["shortest_edge"]
  elif fields["do_resize"]:
    size = _sides(size, "size")
  normal = fields["do_normalize"]
  return ImageProcessor(
    mean=tuple(fields["image_mean"]) if normal else (0.0,) * 3,
    std=tuple(fields["image_std"]) if normal else (1.0,) * 3,
    shortest=shortest if fields["do_resize"] else None,
    size=size if fields["do_resize"] else None,
    crop=(
      _sides(fields["crop_size"], "crop_size")
      if fields["do_center_crop"]
      else None
    ),
    resample=fields["resample"],
    scale=fields["rescale_factor"] if fields["do_rescale"] else 1.0,
  )


def load(folder: str, kind: str) -> ImageProcessor:
  """The image processor of a model folder; see `parse`.

  Raises:
    InputError: there is none, or one that is not implemented.
  """
  newer = os.path.join(folder, _NEW_FILE)
  if os.path.isfile(os.path.join(folder, _FILE)) or not os.path.isfile(newer):
    return parse(read_json(os.path.join(folder, _FILE)), kind)
  found = read_json(newer).get("image_processor")
  if not isinstance(found, Mapping):
    raise InputError(f"{newer} has no image_processor; download it again.")
  return parse(found, kind)


def resized_size(
  processor: ImageProcessor, height: int, width: int
) -> tuple[int, int]:
  """(height, width) of an image after resizing."""
  if processor.shortest is None:
    return processor.size or (height, width)
  short, long = sorted((height, width))
  other = int(processor.shortest * long / short)
  if width <= height:
    return other, processor.shortest
  return processor.shortest, other


def centre(image_HWC: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
  """The middle of an image; what is too small gets a black border."""
  for axis, side in enumerate(crop):
    have = image_HWC.shape[axis]
    if have < side:
      before = -(-(side - have) // 2)
      pad = [(0, 0)] * 3
      pad[axis] = (before, side - have - before)
      image_HWC = np.pad(image_HWC, pad)
    else:
      start = (have - side) // 2
      image_HWC = np.take(image_HWC, np.arange(start, start + side), axis)
  return image_HWC


def prepare(image_HWC: np.ndarray, processor: ImageProcessor) -> np.ndarray:
  """One uint8 image `[H, W, 3|4]` as fp32 `[h, w, 3]`.

  Raises:
    InputError: it is no such image.
  """
  shape = image_HWC.shape
  if image_HWC.dtype != np.uint8 or len(shape) != 3 or shape[2] not in (3, 4):
    raise InputError(
      f"an image of {image_HWC.dtype} {shape} cannot be prepared; pass uint8 "
      "[H, W, 3 or 4]."
    )
  image_HWC = over_white(image_HWC) if shape[2] == 4 else image_HWC
  height, width = resized_size(processor, *shape[:2])
  image = Image.fromarray(image_HWC)
  if image.size != (width, height):
    image = image.resize((width, height), processor.resample)
  x = np.asarray(image)
  x = centre(x, processor.crop) if processor.crop else x
  # The product in fp64, as theirs.
  x = (x.astype(np.float64) * processor.scale).astype(np.float32)
  mean, std = (
    np.asarray(v, np.float32) for v in (processor.mean, processor.std)
  )
  return (x - mean) / std
