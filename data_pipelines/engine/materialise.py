# SPDX-License-Identifier: Apache-2.0
"""The last verb: kept records at the resolution of the stage.

    materialise/part-00000.array_record  records, every image resized to cover
                                         its bucket and cropped
    materialise/part-00000.npz           their sizes, for the loader
    materialise/part-00000.parquet       one row per record that *decide*
                                         kept: id, status, reason, bucket,
                                         width and height of the source

The status is 'kept', 'dropped' for an image that no bucket can take without
more enlarging than the config allows, 'uncaptioned' for a record that came
without a caption and was given none, or 'quarantined'.
"""

import dataclasses
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from data_pipelines import codec
from data_pipelines.caption import mix
from data_pipelines.engine import decoding, ingest, pool, shards
from data_pipelines.engine.config import Encoding
from data_pipelines.images import EncodedImage
from data_pipelines.loader.buckets import Bucket, assign, fit
from data_pipelines.shard_file import IndexColumns
from data_pipelines.sources.items import Limits, Unusable

FOLDER = "materialise"
# Statuses of records that are dropped here, and the filters they count under.
DROPPED = {"dropped": "bucket", "uncaptioned": "no caption"}
SCHEMA = pa.schema({
  "id": pa.string(),
  "status": pa.string(),
  "reason": pa.string(),
  "bucket": pa.string(),
  "width": pa.int32(),
  "height": pa.int32(),
})  # fmt: skip
CODE = (
  "data_pipelines.codec", "data_pipelines.images",
  "data_pipelines.shard_file", "data_pipelines.loader.buckets",
  "data_pipelines.engine.decoding", "data_pipelines.engine.materialise",
  "data_pipelines.caption.mix", "data_pipelines.caption.draw",
)  # fmt: skip
_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the verb needs.

  Attributes:
    stage: name of the stage, for the provenance.
    resolutions: buckets of each resolution, the largest first.
    max_enlarge: largest linear magnification.
    encoding: of the results.
    limits: of the images.
    captions: weights of the mix of captions.
    seed: of the draws of the mix.
    processes: of the pool; 0: one per core.
  """

  stage: str
  resolutions: tuple[tuple[Bucket, ...], ...]
  max_enlarge: float
  encoding: Encoding
  limits: Limits
  captions: mix.Weights = dataclasses.field(default_factory=lambda: mix.OFF)
  seed: int = 0
  processes: int = 0


class _TooSmall(Unusable):
  """No bucket can take an image."""

  status = "dropped"


class _Uncaptioned(Unusable):
  """Nobody has captioned a record."""

  status = "uncaptioned"


def run(
  out: pathlib.Path,
  index: int,
  fingerprint: str,
  kept: Sequence[bool],
  settings: Settings,
) -> None:
  """Writes one shard.

  Args:
    out: folder of the stage.
    index: number of the shard.
    fingerprint: see `shards`.
    kept: of every record of the ingested shard.
    settings: see there.

  Raises:
    InputError: writing failed.
  """
  stem = shards.name(index)
  source = out / ingest.FOLDER / f"{stem}.array_record"
  ids: list[str] = []
  captions = mix.load(out, stem, settings.captions)

  def tasks() -> Iterator[tuple]:
    for data, wanted in zip(shards.read_records(source), kept, strict=True):
      if wanted:
        record = codec.decode(data)
        ids.append(record.id)
        yield _captioned(data, record, captions, settings), settings

  columns = IndexColumns()
  by = _no_counts(captions is not None)
  with shards.write(out / FOLDER, stem, fingerprint) as shard:
    writer = shard.records()
    rows = []
    results = pool.shared(settings.processes).map(
      resize_record, tasks(), settings.limits.seconds
    )
    for number, result in enumerate(results):
      if isinstance(result, Unusable):
        status = getattr(result, "status", "quarantined")
        rows.append({
          "id": ids[number], "status": status, "reason": str(result),
        })  # fmt: skip
        continue
      data, row = result
      writer.write(data)
      record = codec.decode(data)
      columns.add(record)
      for name in by:
        key = _label(record, name)
        by[name][key] = by[name].get(key, 0) + 1
      rows.append(row)
    columns.save(shard.path(".npz"))
    shard.table(pa.Table.from_pylist(rows, SCHEMA))
    shard.counts = {
      status: sum(row["status"] == status for row in rows)
      for status in ("kept", *DROPPED, "quarantined")
    } | by


def _no_counts(captioned: bool) -> dict[str, dict[str, int]]:
  names = ("by_task", "by_kind", "by_caption")
  return {name: {} for name in (names if captioned else names[:2])}


def _captioned(
  data: bytes,
  record: codec.Record,
  captions: Mapping[str, Sequence[Mapping[str, Any]]] | None,
  settings: Settings,
) -> bytes:
  """A record with a caption of the mix, if there is one."""
  if captions is None:
    return data
  return codec.encode(
    mix.apply(record, captions, settings.captions, settings.seed)
  )


def _label(record: codec.Record, name: str) -> str:
  if name == "by_caption":
    return record.provenance["caption"]["kind"]
  return record.task if name == "by_task" else record.kind


def resize_record(
  data: bytes, settings: Settings
) -> tuple[bytes, dict[str, Any]]:
  """One record and its row; runs in the pool.

  Raises:
    Unusable: an image cannot be decoded, no bucket can take it, or there is
      no caption.
  """
  try:
    return _resize_record(codec.decode(data), settings)
  except Unusable:
    raise
  except Exception as error:  # pixels that nobody foresaw
    text = f"not resized ({type(error).__name__}: {error})"
    raise Unusable(text) from error


def _resize_record(
  record: codec.Record, settings: Settings
) -> tuple[bytes, dict[str, Any]]:
  if not record.caption:
    raise _Uncaptioned("no caption (see data_pipelines.captioner)")
  images = (record.target, *record.references)
  pixels = [decoding.decode(image, settings.limits) for image in images]
  buckets = _choose([image.size for image in pixels], settings)
  resized = [
    _resize(image, p, bucket, settings.encoding)
    for image, p, bucket in zip(images, pixels, buckets)
  ]
  width, height = pixels[0].size
  small = dataclasses.replace(
    record,
    target=resized[0],
    references=tuple(resized[1:]),
    provenance={
      **record.provenance,
      "stage": settings.stage,
      "original_size": [width, height],
    },
  )
  row = {
    "id": record.id, "status": "kept", "reason": "", "bucket": str(buckets[0]),
    "width": width, "height": height,
  }  # fmt: skip
  return codec.encode(small), row


def _choose(
  sizes: Sequence[tuple[int, int]], settings: Settings
) -> list[Bucket]:
  """Buckets of target and references at the largest resolution that fits all.

  A record belongs to one resolution, as it does in the loader.
  """
  for buckets in settings.resolutions:
    found = [assign(*size, buckets, settings.max_enlarge) for size in sizes]
    if min(found) >= 0:
      return [buckets[i] for i in found]
  width, height = sizes[0]
  what = "target" if found[0] < 0 else "reference"
  raise _TooSmall(
    f"{what} needs enlarging over {settings.max_enlarge:g}x (target {width} x "
    f"{height})"
  )


def _resize(
  image: EncodedImage, pixels: Image.Image, bucket: Bucket, encoding: Encoding
) -> EncodedImage:
  wanted = encoding.rgba if pixels.mode == "RGBA" else encoding.rgb
  if wanted == "auto":
    wanted = "png" if _format(image) == "PNG" else "jpeg"
  if pixels.size == bucket[::-1] and _is_plain(image, wanted.upper()):
    # Its bytes are the best copy there is.
    return EncodedImage(image.data, *pixels.size, pixels.mode)
  array = fit(pixels, bucket, len(pixels.mode))
  buffer = io.BytesIO()
  options = {
    # Chroma at full resolution: coloured text would fringe.
    "jpeg": {"quality": encoding.quality, "subsampling": 0},
    "png": {},
    "webp": {"quality": encoding.quality, "lossless": pixels.mode == "RGBA"},
  }[wanted]
  Image.fromarray(array).save(buffer, wanted.upper(), **options)
  return EncodedImage(
    buffer.getvalue(), bucket.width, bucket.height, pixels.mode
  )


def _format(image: EncodedImage) -> str:
  with Image.open(io.BytesIO(image.data)) as header:
    return header.format


def _is_plain(image: EncodedImage, wanted: str) -> bool:
  """Whether an image is of a format, one frame, upright, RGB or RGBA."""
  with Image.open(io.BytesIO(image.data)) as header:
    return (
      header.format == wanted
      and header.mode in ("RGB", "RGBA")
      and getattr(header, "n_frames", 1) == 1
      and header.getexif().get(_ORIENTATION, 1) == 1
    )
