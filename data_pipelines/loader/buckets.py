# SPDX-License-Identifier: Apache-2.0
"""Aspect-ratio buckets: the few image shapes a training run may see.

Each shape is one compiled program, so images are resized to the bucket whose
aspect ratio is nearest; whatever cannot be used is reported, never hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.errors import InputError


class Bucket(NamedTuple):
  """An image shape in pixels."""

  height: int
  width: int

  def __str__(self) -> str:
    return f"{self.height}x{self.width}"


class Program(NamedTuple):
  """One compiled shape: what every sample of a batch has in common."""

  task: str
  target: Bucket
  references: tuple[Bucket, ...]


def make_buckets(
  area_side: int, step: int, max_ratio: float
) -> tuple[Bucket, ...]:
  """All shapes of about `area_side` squared pixels, one per aspect ratio.

  Every multiple of `step` up to `area_side` is a short side; the long side is
  rounded to `step`, so areas differ by at most step / (2 area_side).

  Args:
    area_side: side of the square bucket, pixels, a multiple of `step`.
    step: both sides are multiples of it, pixels.
    max_ratio: largest long side / short side.

  Returns:
    Sorted buckets, closed under transposition.

  Raises:
    InputError: `area_side` is not a positive multiple of `step`, or
      `max_ratio` is below 1.
  """
  if step < 1 or area_side < step or area_side % step or max_ratio < 1:
    raise InputError(
      f"Buckets need area_side ({area_side}) to be a multiple of step "
      f"({step}) and max_ratio ({max_ratio}) to be at least 1."
    )
  units = area_side // step
  buckets = set()
  for short in range(1, units + 1):
    long = round(units * units / short)
    if long <= max_ratio * short:
      buckets.add(Bucket(short * step, long * step))
      buckets.add(Bucket(long * step, short * step))
  return tuple(sorted(buckets))


def check_buckets(sizes: Sequence[tuple[int, int]]) -> tuple[Bucket, ...]:
  """Turns (height, width) pairs into buckets.

  Raises:
    InputError: no bucket, a side below 1, or a bucket given twice.
  """
  buckets = tuple(Bucket(*size) for size in sizes)
  if not buckets or min(map(min, buckets)) < 1:
    raise InputError(
      f"Buckets {[tuple(b) for b in buckets]} are unusable; give at least one "
      "(height, width) in pixels."
    )
  if len(set(buckets)) != len(buckets):
    raise InputError(
      f"Buckets {[tuple(b) for b in buckets]} name one shape twice; remove it."
    )
  return buckets


def assign(
  width: int, height: int, buckets: Sequence[Bucket], max_enlarge: float
) -> int:
  """Bucket index for one image; see `assign_many`."""
  sizes = np.array([[width, height]])
  return int(assign_many(sizes, buckets, max_enlarge)[0])


def assign_many(
  sizes: np.ndarray, buckets: Sequence[Bucket], max_enlarge: float
) -> np.ndarray:
  """Nearest bucket by log aspect ratio.

  Args:
    sizes: [N, 2] width and height, pixels.
    buckets: [B]; of those with equal aspect ratio the largest that fits wins.
    max_enlarge: largest allowed linear magnification.

  Returns:
    [N] index into `buckets`, or -1 where filling the nearest bucket would
    enlarge the image by more than `max_enlarge`.
  """
  # Real folders repeat few sizes; this keeps the [N, B] tables small.
  unique, inverse = np.unique(sizes, axis=0, return_inverse=True)
  width, height = unique[:, :1].astype(float), unique[:, 1:].astype(float)
  bucket_height, bucket_width = np.array(buckets, float).T
  distance = np.abs(np.log(width / height * (bucket_height / bucket_width)))
  nearest = distance <= distance.min(axis=1, keepdims=True) + 1e-9
  enlarge = np.maximum(bucket_width / width, bucket_height / height)
  fits = nearest & (enlarge <= max_enlarge)
  area = np.where(fits, bucket_height * bucket_width, 0)
  best = np.where(fits.any(axis=1), area.argmax(axis=1), -1)
  return best[inverse.reshape(-1)]


def fit(image: Image.Image, bucket: Bucket, channels: int) -> np.ndarray:
  """Resizes to cover `bucket`, then crops the centre.

  Args:
    image: RGB or RGBA.
    bucket: the shape wanted.
    channels: 4 keeps alpha (opaque where there is none), 3 composites over
      white.

  Returns:
    uint8 [bucket.height, bucket.width, channels].
  """
  if channels == 3 and image.mode == "RGBA":
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
  width, height = image.size
  scale = max(bucket.width / width, bucket.height / height)
  crop_width = min(width, bucket.width / scale)
  crop_height = min(height, bucket.height / scale)
  left, top = (width - crop_width) / 2, (height - crop_height) / 2
  # Crop and resize in one step: a fractional box loses no pixel to rounding.
  # Pillow premultiplies alpha, so hidden colours do not bleed into edges.
  image = image.resize(
    (bucket.width, bucket.height),
    Image.Resampling.LANCZOS,
    box=(left, top, left + crop_width, top + crop_height),
  )
  if channels == 4 and image.mode == "RGB":
    image.putalpha(255)
  return np.array(image)  # a copy: asarray would be read-only
