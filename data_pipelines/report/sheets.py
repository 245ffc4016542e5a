# SPDX-License-Identifier: Apache-2.0
"""Contact sheets: examples with the numbers that decided about them."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from data_pipelines import codec, images
from data_pipelines.errors import InputError

_SIDE = 116  # pixels of the longest side
_CAPTION = 300  # characters shown when the pointer rests on an image


def sheet(
  title: str,
  rows: Sequence[int],
  records: Mapping[int, codec.Record],
  labels: Mapping[int, str],
) -> str:
  """One row of tiles; '' if there are none.

  Args:
    title: what they have in common.
    rows: which records, in order.
    records: row -> record.
    labels: row -> a few words under the tile.
  """
  tiles = "".join(
    f'<figure class="{"edit" if records[row].references else "one"}">'
    f"{pictures(records[row])}<figcaption>{html.escape(labels[row])}"
    f"<br><i>{html.escape(records[row].id[-40:])}</i></figcaption></figure>"
    for row in rows
  )
  if not tiles:
    return ""
  return f'<h4>{html.escape(title)}</h4><div class="sheet">{tiles}</div>'


def pairs(
  title: str,
  rows: Sequence[tuple[int, int]],
  records: Mapping[int, codec.Record],
  labels: Mapping[int, str],
) -> str:
  """Duplicates side by side: what stayed, then what went.

  Args:
    title: what they have in common.
    rows: (kept, dropped).
    records: row -> record.
    labels: dropped row -> a few words.
  """
  tiles = "".join(
    f'<figure class="pair">{pictures(records[kept])}'
    f"{pictures(records[gone])}<figcaption>{html.escape(labels[gone])}<br>"
    f"<i>{html.escape(records[kept].id[-30:])}</i> stays, "
    f"<i>{html.escape(records[gone].id[-30:])}</i></figcaption></figure>"
    for kept, gone in rows
  )
  if not tiles:
    return ""
  return f'<h4>{html.escape(title)}</h4><div class="sheet">{tiles}</div>'


def pictures(record: codec.Record) -> str:
  """The references of an edit, an arrow, and the target."""
  caption = html.escape(record.caption[:_CAPTION], quote=True)
  before = "".join(_img(reference, caption) for reference in record.references)
  arrow = '<span class="arrow">&rarr;</span>' if before else ""
  return f"<span>{before}{arrow}{_img(record.target, caption)}</span>"


def _img(encoded: images.EncodedImage, caption: str) -> str:
  try:
    image = images.decode_image(encoded)
  except InputError:
    return '<span class="gone">unreadable</span>'
  return f'<img src="{data_uri(image)}" title="{caption}" alt="">'


def data_uri(image: Image.Image) -> str:
  """A thumbnail as text; transparency is kept."""
  image.thumbnail((_SIDE, _SIDE))
  buffer = io.BytesIO()
  image.save(buffer, "WEBP", quality=78)
  encoded = base64.b64encode(buffer.getvalue()).decode()
  return f"data:image/webp;base64,{encoded}"
