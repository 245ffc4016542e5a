# SPDX-License-Identifier: Apache-2.0
"""Pictures, files and folders for tests of the offline pipeline."""

import io
import json
import pathlib

import numpy as np
from PIL import Image


def picture(seed=0, size=(80, 72), mode="RGB"):
  """A smooth random picture, so that filters find nothing to object to."""
  rng = np.random.default_rng(seed)
  channels = len(mode) if mode in ("RGB", "RGBA") else 3
  small = rng.integers(0, 256, (9, 9, channels), np.uint8)
  image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
  noise = rng.integers(-12, 13, (size[1], size[0], channels))
  pixels = np.clip(np.asarray(image).astype(int) + noise, 0, 255)
  return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def encoded(image, fmt="JPEG", **options):
  """The bytes of an image file."""
  buffer = io.BytesIO()
  image.save(buffer, fmt, **options)
  return buffer.getvalue()


def jpeg(seed=0, size=(80, 72)):
  """The bytes of a JPEG."""
  return encoded(picture(seed, size), quality=92)


def folder(path, count, first=0):
  """A folder of captioned JPEGs."""
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  for i in range(first, first + count):
    (path / f"p{i:03d}.jpg").write_bytes(jpeg(i))
    (path / f"p{i:03d}.txt").write_text(f"a soft picture, number {i}")
  return path


def lines(path, rows):
  """A file of JSON lines; bytes are written as they are."""
  text = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
  path.write_bytes(b"\n".join(text) + b"\n")
  return path
