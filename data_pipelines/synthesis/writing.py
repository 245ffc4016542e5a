# SPDX-License-Identifier: Apache-2.0
"""Text for the regions of a face: chosen, checked, sized and set.

All measures are texels of the face's texture. Which part of a region is used,
and how small letters may be, are choices of ours.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipelines.synthesis import coverage, typeset, words
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import Language
from data_pipelines.synthesis.objects import Object, Region
from data_pipelines.synthesis.sample import Box, Rejected

NO_ROOM = "text does not fit the object"
LEAST = 1.6  # letters on objects, in `Language.smallest`
_TRIES = 6  # texts, each about half as long as the one before
_BODY_TOKENS = (8, 90)


@dataclasses.dataclass(frozen=True)
class Written:
  """A block of text at its place.

  Attributes:
    role: 'title', 'body' or 'label'.
    text: before it was broken into lines.
    face: its font.
    ink: coverage by letters, as a picture of 8 bits.
    at: (x, y) of its top left corner.
    lines: (text, box) of every line, in reading order.
  """

  role: str
  text: str
  face: Face
  ink: Image.Image
  at: tuple[int, int]
  lines: tuple[tuple[str, Box], ...]


def write(
  thing: Object, texels: tuple[int, int], fine: float, language: Language,
  faces: Sequence[Face], rng: np.random.Generator, texts: Sequence[str],
) -> tuple[Written, ...] | Rejected:  # fmt: skip
  """Writes on a face.

  Args:
    thing: whose face it is.
    texels: (width, height) of the face.
    fine: texels per pixel of the picture where there are most.
    language: of the text.
    faces: fonts to choose from.
    rng: decides.
    texts: the user's, of which one is written, whole and alone; if empty,
      random words.

  Returns:
    Blocks in reading order, or why there are none.
  """
  face = faces[int(rng.integers(len(faces)))]
  least = math.ceil(fine * LEAST * language.smallest)
  regions = (around(thing.regions),) if texts else thing.regions
  out = []
  for region in regions:
    boxed = _scaled(region, texels)
    found = (
      _given(boxed, language, face, least, rng, texts)
      if texts
      else _random(boxed, region[4], language, face, least, rng)
    )
    if isinstance(found, Rejected):
      return found
    text, pixels = found
    written = _set(boxed, region[4], text, pixels, language, face, rng)
    if written is None:
      return Rejected(NO_ROOM)
    out.append(written)
  return tuple(out)


def around(regions: tuple[Region, ...]) -> Region:
  """The smallest region, for body text, that holds some others."""
  left, top, right, bottom = zip(*(region[:4] for region in regions))
  return min(left), min(top), max(right), max(bottom), "body"


def _scaled(region: Region, texels) -> tuple[int, int, int, int]:
  u0, v0, u1, v1, _ = region
  width, height = texels
  return (
    math.ceil(u0 * width), math.ceil(v0 * height),
    math.floor(u1 * width), math.floor(v1 * height),
  )  # fmt: skip


def _given(box, language, face, least, rng, texts):
  """One of the user's texts and its size, or why not."""
  text = coverage.normal(words.pick(rng, language, texts))
  reason = coverage.unrenderable(text, face)
  if reason:
    return Rejected(reason)
  pixels = _fitting(text, box, language, face, least)
  return (text, pixels) if pixels else Rejected(NO_ROOM)


def _random(box, role: str, language, face, least, rng):
  """Random words that fit and their size, or why not."""
  reason = NO_ROOM
  tokens = math.exp(rng.uniform(*np.log(_BODY_TOKENS)))
  for _ in range(_TRIES):
    if role == "body":
      text = words.paragraph(rng, language, math.ceil(tokens))
    else:
      text = words.heading(rng, language)
    tokens /= 2
    text = coverage.normal(text)
    found = coverage.unrenderable(text, face)
    if found:
      reason = found
      continue
    pixels = _fitting(text, box, language, face, least)
    if pixels:
      # Not always as large as can be.
      return text, max(least, round(pixels * rng.uniform(0.75, 1)))
  return Rejected(reason)


def _fitting(text: str, box, language, face, least: int) -> int | None:
  width, height = box[2] - box[0], box[3] - box[1]
  largest = max(least, min(width, height))
  return typeset.fitting(text, face, language, (least, largest), width, height)


def _set(
  box, role: str, text: str, pixels: int, language, face, rng
) -> Written | None:
  """Sets a text; None if it is cut after all, by a pixel."""
  width, height = box[2] - box[0], box[3] - box[1]
  centred = role != "body" or rng.random() < 0.3
  block = typeset.block(
    text, face, language, pixels, (0, 0, 0), width, height,
    "center" if centred else "start",
  )  # fmt: skip
  if not block.complete:
    return None
  left, top, right, bottom = block.box
  x, y = box[0], box[1]
  # In the middle across the lines, too; what moves has no ink.
  if centred and language.direction == "ttb":
    x += (width - right - left) // 2
  elif centred:
    y += (height - bottom - top) // 2
  lines = tuple(
    (line.text, (line.box[0] + x, line.box[1] + y,
                 line.box[2] + x, line.box[3] + y))
    for line in block.lines
  )  # fmt: skip
  letters = block.image.getchannel("A").crop(block.box)
  return Written(role, text, face, letters, (x + left, y + top), lines)


def stamp(face_HW4: np.ndarray, written: Written, colour) -> None:
  """Puts ink of a colour on a face's texture, in place."""
  x, y = written.at
  letters = np.asarray(written.ink, np.float32)[..., None] / 255
  under = face_HW4[y : y + letters.shape[0], x : x + letters.shape[1], :3]
  under += letters * (np.asarray(colour, np.float32) - under)
