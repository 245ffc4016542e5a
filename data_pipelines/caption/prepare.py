# SPDX-License-Identifier: Apache-2.0
"""What a captioner is shown of a record."""

import dataclasses
import io
import re
from typing import Any

from PIL import Image

from data_pipelines import codec
from data_pipelines.caption import prompts, router
from data_pipelines.engine import decoding
from data_pipelines.filters.pixels import on_white
from data_pipelines.filters.text import UNSPACED
from data_pipelines.sources.items import Limits

# Provenance that a captioner may use as knowledge.
_FACTS = ("title", "author", "date", "place", "source", "url")
# Names and numbers are knowledge; 'a cat on a mat' is not. Unspaced scripts
# show no capitals, so length decides there. Ours.
_NAME = re.compile(r"\d|(?<=[a-z,] )[A-Z]\w")
_LONG_UNSPACED = 12
_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A record, ready to be asked about.

  Attributes:
    id: of the record.
    images: JPEG bytes; the references of an edit, then the target.
    columns: see `router.route`.
    context: notes for *knowledge*; empty if nothing is known.
    known_text: what is written in the target for certain.
  """

  id: str
  images: tuple[bytes, ...]
  columns: dict[str, Any]
  context: str
  known_text: tuple[str, ...]


def prepare(data: bytes, max_side: int, limits: Limits) -> Prepared:
  """Decodes, measures and shrinks the images of a record; runs in a pool.

  Args:
    data: the record.
    max_side: pixels of the longer side that a captioner gets at most.
    limits: of the images.

  Raises:
    Unusable: an image cannot be decoded.
  """
  record = codec.decode(data)
  images = [
    # Servers drop alpha, and what colour shows then is up to them.
    on_white(decoding.decode(image, limits))
    for image in (*record.references, record.target)
  ]
  label = str(record.provenance.get("category") or record.kind)
  return Prepared(
    id=record.id,
    images=tuple(_encode(image, max_side) for image in images),
    columns={
      **router.measure(images[-1]), "category": router.category_of(label),
    },
    context=_context(record),
    known_text=_known_text(record),
  )  # fmt: skip


def _encode(image: Image.Image, max_side: int) -> bytes:
  scale = max_side / max(image.size)
  if scale < 1:
    size = [max(1, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  # Chroma at full resolution: coloured text would fringe.
  image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
  return buffer.getvalue()


def _context(record: codec.Record) -> str:
  facts = [(n, str(record.provenance.get(n) or "")) for n in _FACTS]
  caption = record.caption if _is_informative(record.caption) else ""
  context = prompts.context_of(caption, facts)
  # An address alone says too little.
  only_url = not caption and not any(v for n, v in facts if n != "url")
  return "" if only_url else context


def _is_informative(caption: str) -> bool:
  unspaced = len(re.findall(f"[{UNSPACED}]", caption))
  return bool(_NAME.search(caption)) or unspaced >= _LONG_UNSPACED


def _known_text(record: codec.Record) -> tuple[str, ...]:
  text = record.provenance.get("text") or ()
  lines = text.splitlines() if isinstance(text, str) else text
  return tuple(str(line) for line in lines if str(line).strip())
