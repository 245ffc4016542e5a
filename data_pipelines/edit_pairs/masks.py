# SPDX-License-Identifier: Apache-2.0
"""Which pixels of an edit may change: the `mask` in a record's provenance.

    {"scope": "part", "reference": 0, "size": [width, height],
     "runs": [stay, change, stay, ...]}

`runs` are lengths in reading order (rows from the top, pixels from the left),
alternately of pixels that stay and that may change; the first may be 0. A
pixel that stays has exactly the bytes that it has in that reference, compared
as RGBA. `of` reads the mask of a record, also after a stage has resized it.

Other scopes have no runs, because no pixel is promised to stay: 'whole' is an
edit of every pixel of a picture that is still recognisable, 'redrawn' a target
that need not resemble its references in a single pixel.

Shapes: H height, W width.
"""

import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data_pipelines.codec import Record
from data_pipelines.errors import InputError
from data_pipelines.loader.buckets import Bucket

SCOPES = ("part", "whole", "redrawn")
# Of the Lanczos filter that `loader.buckets.fit` resizes with.
_SUPPORT = 3


def encode(change_HW: np.ndarray, reference: int = 0) -> dict[str, Any]:
  """The mask of an edit of a part.

  Args:
    change_HW: bool, where the target may differ from the reference.
    reference: number of that reference, from 0.

  Returns:
    Plain values, see the module docstring.

  Raises:
    InputError: nothing may change.
  """
  if not change_HW.any():
    raise InputError("An edit whose mask is empty changes nothing; drop it.")
  flat = np.concatenate([[False], change_HW.ravel()])
  edges = np.flatnonzero(flat[1:] != flat[:-1])
  runs = np.diff(np.concatenate([[0], edges, [change_HW.size]]))
  height, width = change_HW.shape
  return {
    "scope": "part",
    "reference": reference,
    "size": [width, height],
    "runs": [int(run) for run in runs],
  }


def decode(mask: Mapping[str, Any]) -> np.ndarray | None:
  """Inverse of `encode`.

  Args:
    mask: of a record's provenance.

  Returns:
    bool [H, W], where the target may differ; None if it may everywhere.

  Raises:
    InputError: it is no such mask.
  """
  try:
    if mask["scope"] in SCOPES[1:]:
      return None
    width, height = mask["size"]
    runs = np.asarray(mask["runs"], np.int64)
    if mask["scope"] not in SCOPES or runs.ndim != 1 or (runs < 0).any():
      raise ValueError("unknown scope or runs")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(height, width)
  except (KeyError, TypeError, ValueError) as error:
    raise InputError(
      f"A record's mask is unusable ({error}); build its dataset again."
    ) from error


def of(record: Record) -> np.ndarray | None:
  """The mask of a record at the size that its target has now.

  Args:
    record: of `data_pipelines.edit_pairs`, as made or as a stage of
      `data_pipelines.run` has resized it without loss.

  Returns:
    bool [H, W], where the target may differ; None if it may everywhere.

  Raises:
    InputError: the record has no such mask.
  """
  mask = record.provenance.get("mask")
  if not isinstance(mask, Mapping):
    raise InputError(f"Record {record.id} has no mask; it is no edit pair.")
  change_HW = decode(mask)
  if change_HW is None:
    return None
  return fit(change_HW, Bucket(record.target.height, record.target.width))


def fit(change_HW: np.ndarray, bucket: Bucket) -> np.ndarray:
  """The mask of images that were brought to a bucket by `loader.buckets.fit`.

  Resizing mixes pixels: a result stays only if all that it was mixed of do.

  Args:
    change_HW: bool, at the size of the mask.
    bucket: new size.

  Returns:
    bool [bucket.height, bucket.width].
  """
  height, width = change_HW.shape
  if (width, height) == (bucket.width, bucket.height):
    return change_HW
  scale = max(bucket.width / width, bucket.height / height)
  # One more for the rounding of the window's ends, one for nearest below.
  radius = math.ceil(_SUPPORT * max(1.0, 1 / scale)) + 2
  kernel = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
  wide = cv2.dilate(change_HW.astype(np.uint8), kernel)
  crop = min(width, bucket.width / scale), min(height, bucket.height / scale)
  left, top = (width - crop[0]) / 2, (height - crop[1]) / 2
  small = Image.fromarray(wide).resize(
    (bucket.width, bucket.height),
    Image.Resampling.NEAREST,
    box=(left, top, left + crop[0], top + crop[1]),
  )
  return np.asarray(small) > 0


def differing(first: Image.Image, second: Image.Image) -> np.ndarray:
  """bool [H, W]: where two images of one size have other bytes, as RGBA."""
  arrays = [np.asarray(image.convert("RGBA")) for image in (first, second)]
  return (arrays[0] != arrays[1]).any(axis=-1)
