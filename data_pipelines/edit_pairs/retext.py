# SPDX-License-Identifier: Apache-2.0
"""Text on a sign over a picture: changed, removed, added or recoloured.

Every line has a box of its own on the sign and is set by
`synthesis.typeset`; all others keep their pixels.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.edit_pairs import appearance
from data_pipelines.edit_pairs.pair import Pair
from data_pipelines.edit_pairs.supply import Supply
from data_pipelines.sources.items import Unusable
from data_pipelines.synthesis import typeset, words
from data_pipelines.synthesis.backgrounds import luminance
from data_pipelines.synthesis.coverage import unrenderable
from data_pipelines.synthesis.fonts import faces_of
from data_pipelines.synthesis.languages import Language, language_of

_OPERATIONS = ("text_change", "text_change", "text_remove", "text_add",
  "text_colour")  # fmt: skip
_SHARE = (0.055, 0.12)  # of the shorter side: height of letters; ours
_SMALLEST = 12  # pixels per em
_CONTRAST = 4.5  # of WCAG, for text; as a ratio of luminances
_TRIES = 20


@dataclasses.dataclass(frozen=True)
class _Line:
  """A line on the sign: its text, colour, and the box that it is set into."""

  text: str
  ink: tuple[int, int, int]
  box: tuple[int, int, int, int]
  pixels: int


def draw(supply: Supply, rng: np.random.Generator) -> Pair:
  """One pair."""
  picture = supply.picture().image
  codes = supply.rules.text_languages
  language = language_of(codes[int(rng.integers(len(codes)))])
  faces = faces_of(language, supply.rules.fonts)
  face = faces[int(rng.integers(len(faces)))]
  operation = _OPERATIONS[int(rng.integers(len(_OPERATIONS)))]
  for _ in range(_TRIES):
    sign, lines, new = _sign(picture, face, language, rng)
    if lines:
      break
  else:
    raise Unusable("no room for text")
  k = int(rng.integers(len(lines)))
  old = lines[k]
  slots = {"old": old.text, "line": str(k + 1)}
  before, after = list(lines), list(lines)
  if operation == "text_change":
    after[k] = dataclasses.replace(old, text=new)
    slots["new"] = new
  elif operation == "text_remove":
    after[k] = dataclasses.replace(old, text="")
  elif operation == "text_add":
    before[k] = dataclasses.replace(old, text="")
    slots = {"new": old.text, "line": str(k + 1)}
  else:
    name = _other_ink(sign.getpixel(old.box[:2])[:3], old.ink, rng)
    after[k] = dataclasses.replace(old, ink=appearance.COLOURS[name])
    slots["colour"] = name
  source, first = _written(sign, before, face, language)
  target, second = _written(sign, after, face, language)
  change = np.zeros((picture.height, picture.width), bool)
  for x0, y0, x1, y1 in filter(None, (first[k], second[k])):
    change[y0:y1, x0:x1] = True
  return Pair(
    operation, (source,), target, change, slots,
    {
      "language": language.code, "font": face.file,
      "before": _describe(before, first), "after": _describe(after, second),
    },
  )  # fmt: skip


def _describe(lines, boxes) -> list[dict]:
  return [
    {"text": line.text, "box": list(box), "ink": list(line.ink)}
    for line, box in zip(lines, boxes)
    if box
  ]


def _sign(picture: Image.Image, face, language: Language, rng):
  """The empty sign on the picture, its lines, and a text for any of them."""
  width, height = picture.size
  count = int(rng.integers(1, 4))
  texts = [words.heading(rng, language) for _ in range(count + 1)]
  if len(set(texts)) <= count or any(unrenderable(t, face) for t in texts):
    return picture, [], ""
  short = min(width, height)
  pixels = max(_SMALLEST, round(short * float(rng.uniform(*_SHARE))))
  room = int(width * float(rng.uniform(0.6, 0.9)))
  tall = round(pixels * 1.6)
  margin = pixels // 2
  sizes = [
    typeset.fitting(t, face, language, (_SMALLEST, pixels), room, tall)
    for t in texts
  ]
  if None in sizes or count * tall + 2 * margin > height - 2:
    return picture, [], ""
  pixels = min(sizes)
  # One line each: a text that would be broken is drawn smaller, or not at all.
  if any(len(typeset.block(t, face, language, pixels, (0, 0, 0), room, tall)
      .lines) != 1 for t in texts):  # fmt: skip
    return picture, [], ""
  left = int(rng.integers(margin, max(margin + 1, width - room - margin)))
  top = int(rng.integers(margin, height - count * tall - margin))
  paper = _paper(rng)
  sign = picture.copy()
  box = (left - margin, top - margin, left + room + margin - 1,
    top + count * tall + margin - 1)  # fmt: skip
  ImageDraw.Draw(sign).rounded_rectangle(box, margin // 2, paper)
  ink = appearance.COLOURS[_other_ink(paper, paper, rng)]
  lines = [
    _Line(
      text, ink, (left, top + i * tall, left + room, top + (i + 1) * tall),
      pixels,
    )
    for i, text in enumerate(texts[:count])
  ]  # fmt: skip
  return sign, lines, texts[-1]


def _written(sign: Image.Image, lines, face, language: Language):
  """The sign with its lines, and the box of the ink of each, or None."""
  canvas = sign.convert("RGBA")
  boxes = []
  for line in lines:
    if not line.text:
      boxes.append(None)
      continue
    x0, y0, x1, y1 = line.box
    block = typeset.block(
      line.text, face, language, line.pixels, line.ink, x1 - x0, y1 - y0
    )
    if not block.complete:
      raise Unusable("no room for text")
    canvas.alpha_composite(block.image, (x0, y0))
    left, top, right, bottom = block.box
    boxes.append((x0 + left, y0 + top, x0 + right, y0 + bottom))
  return canvas.convert(sign.mode), boxes


def _paper(rng: np.random.Generator) -> tuple[int, int, int]:
  """Light or dark, so that some colour of text can be read on it."""
  light = rng.random() < 0.6
  low, high = (215, 256) if light else (10, 60)
  return tuple(int(c) for c in rng.integers(low, high, 3))


def _other_ink(paper, ink, rng: np.random.Generator):
  """Name of a colour that can be read on the paper and is not the ink."""
  names = [
    name
    for name, value in appearance.COLOURS.items()
    if _contrast(paper, value) >= _CONTRAST and value != tuple(ink)
  ]
  return names[int(rng.integers(len(names)))]


def _contrast(first, second) -> float:
  """Ratio of WCAG, 1 to 21."""
  low, high = sorted(float(luminance(colour)) for colour in (first, second))
  return (high + 0.05) / (low + 0.05)
