# SPDX-License-Identifier: Apache-2.0
"""Embedded stand-ins for scores of models, so that all stages run offline.

They are formulas over pixels, write the columns of the models that they stand
for, on about the same scale, and say what they are: `describe` is stored with
the scores and printed in the report. None of them understands an image.

One entry is no stand-in: 'nudenet', a detector whose weights are part of its
package, where that is installed.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipelines import codec, images
from data_pipelines.errors import InputError
from data_pipelines.filters import pixels

_SIDE = 256  # longest side that the formulas look at
_EMBEDDING_SIDE = 12
_NUDENET_SIDE = 640

# Hue in degrees; 'any' for colours told by saturation and value alone.
_COLOURS: dict[str, tuple[str, tuple[float, float]]] = {
  "red": ("red|crimson|scarlet|红", (-15, 15)),
  "orange": ("orange|橙", (15, 42)),
  "yellow": ("yellow|golden|黄", (42, 70)),
  "green": ("green|绿", (70, 165)),
  "cyan": ("cyan|turquoise|teal|青", (165, 200)),
  "blue": ("blue|navy|蓝", (200, 262)),
  "purple": ("purple|violet|紫", (262, 300)),
  "pink": ("pink|magenta|粉", (300, 345)),
}
# A named colour counts as present from this share of the pixels on.
_PRESENT = 0.005
# The stand-in's range on the scale of CLIP cosines; ours.
_NO_MATCH, _FULL_MATCH, _NO_COLOUR = 0.10, 0.30, 0.25


@dataclasses.dataclass(frozen=True)
class StandIn:
  """One source of scores.

  Attributes:
    columns: what it writes.
    description: what it is, for the report.
    score: (record, target) -> a value of every column.
  """

  columns: dict[str, pa.DataType]
  description: str
  score: Callable[[codec.Record, Image.Image], dict[str, Any]]


def score(
  name: str, record: codec.Record, target: Image.Image
) -> dict[str, Any]:
  """Scores one record.

  Args:
    name: one of NAMES.
    record: its caption may count.
    target: the decoded target, RGB or RGBA.

  Returns:
    A value for every key of COLUMNS[name].

  Raises:
    InputError: the package behind the name is not installed.
  """
  return STAND_INS[name].score(record, target)


def describe(name: str) -> str:
  """What a name of NAMES is, for the report."""
  return STAND_INS[name].description


def largest(
  judge: Callable[[Image.Image], float],
  record: codec.Record,
  target: Image.Image,
) -> float:
  """Largest score of the target and the references, which are learnt from too.

  References that cannot be decoded do not count; *measure* reports them.
  """
  found = [judge(target)]
  for reference in record.references:
    with contextlib.suppress(InputError):
      found.append(judge(images.decode_image(reference)))
  return max(found)


def skin_share(target: Image.Image) -> float:
  """Share of pixels of a skin-like hue, by a fixed range of Cb and Cr."""
  small = np.asarray(_small(target).convert("YCbCr"))
  cb, cr = small[..., 1], small[..., 2]
  # The usual range of skin detectors, light to dark skin.
  skin = (cb >= 77) & (cb <= 127) & (cr >= 133) & (cr <= 173)
  return float(skin.mean())


def nudity(target: Image.Image) -> float:
  """Largest confidence of an exposed body part, by NudeNet.

  Raises:
    InputError: NudeNet is not installed.
  """
  image = pixels.on_white(target).copy()
  image.thumbnail((_NUDENET_SIDE, _NUDENET_SIDE))  # in place
  # OpenCV's channel order, in which NudeNet reads files.
  found = _nudenet().detect(np.asarray(image)[..., ::-1].copy())
  # Feet, bellies and armpits are exposed on any beach.
  harmless = ("FEET", "BELLY", "ARMPITS", "MALE_BREAST")
  return max(
    (
      detection["score"]
      for detection in found
      if detection["class"].endswith("EXPOSED")
      and not detection["class"].startswith(harmless)
    ),
    default=0.0,
  )


def colourfulness(target: Image.Image) -> float:
  """Hasler and Süsstrunk's measure (2003): 0 for grey, about 110 at most."""
  red, green, blue = np.moveaxis(np.asarray(_small(target), float), -1, 0)
  first, second = red - green, (red + green) / 2 - blue
  spread = math.hypot(first.std(), second.std())
  return spread + 0.3 * math.hypot(first.mean(), second.mean())


def pleasantness(target: Image.Image) -> float:
  """1 to 10 from colourfulness, contrast and sharpness; weights are ours."""
  luma = np.asarray(_small(target).convert("L"))
  sharpness = pixels.sharpness(luma)
  colour = colourfulness(target)
  terms = (
    colour / (colour + 30),
    luma.std() / (luma.std() + 40),
    min(1.0, math.log1p(sharpness) / math.log1p(5000)),
  )
  return 1 + 3 * float(sum(terms))


def fidelity(target: Image.Image) -> float:
  """0 to 1 from sharpness and blocks of compression; weights are ours."""
  luma = np.asarray(pixels.on_white(target).convert("L"))
  sharpness = pixels.sharpness(luma)
  sharp = min(1.0, math.log1p(sharpness) / math.log1p(1000))
  return sharp / max(1.0, pixels.blockiness(luma))


def colour_agreement(caption: str, target: Image.Image) -> float:
  """How many of the colours that a caption names its image shows.

  Returns:
    On the scale of CLIP cosines: 0.1 if none, 0.3 if all; 0.25 if the caption
    names no colour.
  """
  named = [
    bounds
    for words, bounds in _COLOURS.values()
    if re.search(_word_pattern(words), caption, re.IGNORECASE)
  ]
  if not named:
    return _NO_COLOUR
  hsv = np.asarray(_small(target).convert("HSV"), float)
  hue = hsv[..., 0] * 360 / 256
  vivid = (hsv[..., 1] > 80) & (hsv[..., 2] > 60)
  shown = [
    (vivid & ((hue - low) % 360 < high - low)).mean() >= _PRESENT
    for low, high in named
  ]
  share = float(sum(shown)) / len(shown)
  return _NO_MATCH + (_FULL_MATCH - _NO_MATCH) * share


def layout_embedding(target: Image.Image) -> list[float]:
  """432 numbers: 12 x 12 colours less their mean, of length 1."""
  size = (_EMBEDDING_SIDE, _EMBEDDING_SIDE)
  small = pixels.on_white(target).resize(size, Image.Resampling.BOX)
  cells = np.asarray(small, float).reshape(-1, 3)
  flat = (cells - cells.mean(axis=0)).ravel()
  norm = np.linalg.norm(flat)
  # A flat image has no direction; it gets that of its colour.
  flat = np.tile(cells.mean(axis=0) + 1, len(cells)) if norm < 1 else flat
  return (flat / np.linalg.norm(flat)).astype(np.float32).tolist()


def _word_pattern(words: str) -> str:
  """Latin words as whole words; Chinese characters anywhere."""
  return "|".join(
    rf"\b{word}\b" if word.isascii() else word for word in words.split("|")
  )


def _small(target: Image.Image) -> Image.Image:
  image = pixels.on_white(target)
  return image.reduce(max(1, max(image.size) // _SIDE))


@functools.cache
def _nudenet():
  try:
    from nudenet import NudeDetector
  except ImportError as error:
    raise InputError(
      "Score 'nudenet' needs the package nudenet; install it or choose "
      "another score for NSFW."
    ) from error
  return NudeDetector()


STAND_INS: dict[str, StandIn] = {
  "nsfw": StandIn(
    {"nsfw": pa.float64()},
    "stand-in for an NSFW classifier: share of skin-coloured pixels",
    lambda record, target: {"nsfw": largest(skin_share, record, target)},
  ),
  "nudenet": StandIn(
    {"nsfw": pa.float64()},
    "NudeNet detector: highest confidence of an exposed body part",
    lambda record, target: {"nsfw": largest(nudity, record, target)},
  ),
  "aesthetic": StandIn(
    {"aesthetic": pa.float64()},
    "stand-in for an aesthetic predictor: colour, contrast and sharpness",
    lambda record, target: {"aesthetic": pleasantness(target)},
  ),
  "alignment": StandIn(
    {"clip_alignment": pa.float64()},
    "stand-in for CLIP: do colours named in the caption occur in the image",
    lambda record, target: {
      "clip_alignment": colour_agreement(record.caption, target)
    },
  ),
  "quality": StandIn(
    {"quality": pa.float64()},
    "stand-in for a quality assessor: sharpness over blockiness",
    lambda record, target: {"quality": fidelity(target)},
  ),
  "embedding": StandIn(
    {"embedding": pa.list_(pa.float32(), 3 * _EMBEDDING_SIDE**2)},
    "stand-in for an image embedding: the layout of 12 x 12 colours",
    lambda record, target: {"embedding": layout_embedding(target)},
  ),
}
NAMES = tuple(STAND_INS)
COLUMNS = {name: stand_in.columns for name, stand_in in STAND_INS.items()}
