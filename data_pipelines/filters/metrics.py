# SPDX-License-Identifier: Apache-2.0
"""The CPU metrics of one record: what the *measure* verb writes."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from PIL import Image

from data_pipelines import codec
from data_pipelines.edit_pairs import masks
from data_pipelines.filters import encoded, pixels, text

# Columns of OUT/measure; all but the first six describe the target.
METRICS: dict[str, pa.DataType] = {
  "task": pa.string(),
  "kind": pa.string(),
  "caption": pa.string(),
  "characters": pa.int32(),
  "tokens": pa.int32(),
  "invalid_characters": pa.int32(),
  "language": pa.string(),
  "references": pa.int32(),
  "reference_short_side": pa.int32(),
  "width": pa.int32(),
  "height": pa.int32(),
  "short_side": pa.int32(),
  "pixels": pa.int64(),
  "aspect": pa.float64(),
  "format": pa.string(),
  "source_mode": pa.string(),
  "frames": pa.int32(),
  "orientation": pa.int32(),
  "orientation_conflict": pa.bool_(),
  "upright": pa.float64(),
  "bytes": pa.int64(),
  "jpeg_quality": pa.float64(),
  "blockiness": pa.float64(),
  "entropy": pa.float64(),
  "contrast": pa.float64(),
  "sharpness": pa.float64(),
  "black_share": pa.float64(),
  "white_share": pa.float64(),
  "flat_share": pa.float64(),
  "transparent_share": pa.float64(),
  "edit_change": pa.float64(),
  "edit_similarity": pa.float64(),
  "sha256": pa.string(),
  "phash": pa.uint64(),
  "dhash": pa.uint64(),
  "thumb": pa.binary(3 * pixels.THUMB_SIDE**2),
}


def measure(
  record: codec.Record,
  target: Image.Image,
  references: tuple[Image.Image, ...],
  tokenizer: Callable[[str], int] | None = None,
) -> dict[str, Any]:
  """All metrics of one record.

  Args:
    record: its bytes are read for what decoding loses.
    target: the decoded target, RGB or RGBA, EXIF orientation applied.
    references: the decoded references, likewise.
    tokenizer: gives the number of tokens of a caption; None estimates it.

  Returns:
    A value, or None where it does not apply, for every key of METRICS.
  """
  rgb = pixels.on_white(target)
  luma = rgb.convert("L")
  width, height = target.size
  sides = [min(reference.size) for reference in references]
  return {
    **caption_only(record, tokenizer),
    "reference_short_side": min(sides, default=None),
    "width": width,
    "height": height,
    "short_side": min(width, height),
    "pixels": width * height,
    "aspect": max(width, height) / min(width, height),
    "transparent_share": pixels.transparent_share(target),
    **encoded.file_metrics(record.target.data),
    **pixels.quality_metrics(luma),
    **pixels.hash_metrics(rgb, luma),
    **pixels.edit_metrics(target, references),
    **_misleading(record),
  }


def _misleading(record: codec.Record) -> dict[str, Any]:
  """Nulls in place of what says nothing about pairs of `edit_pairs`.

  Their masks say exactly what changed and what stayed: cells average noise
  away, a map of edges resembles nothing, and plain or transparent backgrounds
  are flat because they were asked for.
  """
  mask = record.provenance.get("mask")
  scope = mask.get("scope") if isinstance(mask, dict) else None
  if scope not in masks.SCOPES:
    return {}
  return {"entropy": None, "edit_change": None, "edit_similarity": None}


def caption_only(
  record: codec.Record, tokenizer: Callable[[str], int] | None = None
) -> dict[str, Any]:
  """The metrics that need no pixels, for records whose images are broken."""
  return {
    "task": record.task,
    "kind": record.kind,
    "references": len(record.references),
    **text.caption_metrics(record.caption, tokenizer),
  }
