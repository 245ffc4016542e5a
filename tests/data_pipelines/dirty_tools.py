# SPDX-License-Identifier: Apache-2.0
"""Rendered pictures, files that are not what they seem, and the truth."""

import dataclasses
import hashlib
import io
import pathlib
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageDraw

# Outcomes that are no names of filters.
KEPT, UNREADABLE = "kept", "unreadable"
SIDE = 96  # shortest side that is not too small
WORDS = (
  "harbour", "market", "bicycle", "lantern", "river", "mountain", "teacher",
  "window", "garden", "train", "bridge", "coffee", "violin", "forest",
  "island", "painter", "winter", "morning", "station", "library",
)  # fmt: skip
ORIENTATION, EXIF_IFD, EXIF_WIDTH, EXIF_HEIGHT = 0x112, 0x8769, 0xA002, 0xA003


@dataclasses.dataclass(frozen=True)
class Truth:
  """What must become of one item.

  Attributes:
    outcome: KEPT, UNREADABLE, or the filter that drops it.
    defect: name of the maker.
    twin: for duplicates the item that it copies.
  """

  outcome: str
  defect: str
  twin: str = ""


class Corpus:
  """Writes items into a folder and notes the truth."""

  def __init__(self, folder: pathlib.Path, seed: int):
    self.folder = folder
    self.rng = np.random.default_rng(seed)
    self.truth: dict[str, Truth] = {}
    self.edits: list[dict] = []
    self.originals: list[str] = []
    self.hashes: set[bytes] = set()
    self._number = 0

  def name(self, defect: str, suffix: str) -> str:
    """A new path, in one of several folders."""
    self._number += 1
    return f"{'abc'[self._number % 3]}/{defect}-{self._number:05d}{suffix}"

  def add(self, defect, outcome, data, suffix=".jpg", caption=None, twin=""):
    """Writes an image and its caption; bytes are written as they are."""
    name = self.name(defect, suffix)
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    text = self.caption() if caption is None else caption
    if text is not False:
      raw = text if isinstance(text, bytes) else text.encode("utf-8")
      path.with_suffix(".txt").write_bytes(raw)
    digest = hashlib.sha256(data).digest()
    if twin and digest in self.hashes:  # made in the same way before
      outcome = "exact_duplicate"
    self.hashes.add(digest)
    self.truth[name] = Truth(outcome, defect, twin)
    return name

  def caption(self) -> str:
    """Nine words, different every time, that name no colour."""
    words = self.rng.choice(WORDS, 9)
    return f"a view of {' '.join(words)}, number {self.rng.integers(1 << 40)}"

  def picture(self, scale: float = 1.0) -> Image.Image:
    """A new image, its short side a little over SIDE * scale or more."""
    return picture(self.rng, (SIDE + 4) * scale)


def picture(rng: np.random.Generator, side: float) -> Image.Image:
  """A new image with structure on all scales, like a photograph."""
  short = int(rng.integers(side, side * 1.5))
  size = (short, int(short * rng.uniform(1, 1.8)))
  size = size if rng.integers(2) else size[::-1]
  layers = np.zeros((size[1], size[0], 3))
  for cells, strength in ((5, 95), (16, 30)):
    noise = rng.normal(128, strength, (cells, cells, 3)).clip(0, 255)
    small = Image.fromarray(noise.astype(np.uint8))
    layers += np.asarray(small.resize(size, Image.Resampling.BICUBIC)) / 2.0
  image = Image.fromarray(layers.clip(0, 255).astype(np.uint8))
  draw = ImageDraw.Draw(image)
  for _ in range(3):
    x, y = (int(rng.integers(0, side)) for side in size)
    radius = int(rng.integers(6, max(8, short // 4)))
    colour = tuple(rng.integers(0, 256, 3).tolist())
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
  grain = rng.normal(0, 5, (size[1], size[0], 1))
  return Image.fromarray(
    (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
  )


def encode(image: Image.Image, format="JPEG", **options) -> bytes:
  """Encoded bytes; JPEG at quality 92 unless told."""
  buffer = io.BytesIO()
  if format == "JPEG":
    options.setdefault("quality", 92)
  image.save(buffer, format, **options)
  return buffer.getvalue()


def exif_of(orientation: int, declared=None) -> Image.Exif:
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  if declared:
    width, height = declared
    ifd = exif.get_ifd(EXIF_IFD)
    ifd.update({EXIF_WIDTH: width, EXIF_HEIGHT: height})
  return exif


def _chunk(kind: bytes, data: bytes) -> bytes:
  sum = zlib.crc32(kind + data)
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum)


def png_bomb(side: int) -> bytes:
  """A small PNG that claims side x side pixels of one bit."""
  header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
  row = b"\0" * (side // 8 + 1)
  packed = zlib.compress(row * 64, 9)
  parts = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def text_bomb(image: Image.Image) -> bytes:
  """A good PNG with a text chunk that unpacks to 200 MB."""
  data = encode(image, "PNG")
  packed = zlib.compress(b"\0" * 200_000_000, 1)
  return data[:33] + _chunk(b"zTXt", b"k\0\0" + packed) + data[33:]


def zip_bomb(megabytes: int) -> bytes:
  """A zip archive of zeros."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("zeros", b"\0" * (megabytes << 20))
  return buffer.getvalue()
