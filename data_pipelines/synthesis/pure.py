# SPDX-License-Identifier: Apache-2.0
"""Strategy 1: text on a background, from one word to a page of 1 K tokens.

Sizes and shares are ours.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipelines.synthesis import (
  backgrounds,
  captions,
  colours,
  coverage,
  typeset,
  words,
)
from data_pipelines.synthesis.backgrounds import BAD_PHOTO
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import Language
from data_pipelines.synthesis.sample import (
  NO_ROOM,
  Rejected,
  Sample,
  TextBlock,
  layout_of,
  polygon_of,
  text_of,
)

FORMS = {"line": 0.2, "paragraph": 0.35, "titled": 0.3, "page": 0.15}
NO_CONTRAST = "no colour stands out from the background"
_LARGEST = 160  # pixels per em
_PAGE = (5, 20)  # pixels per em of a page, as the VAE's corpus has them
_TRIES = 4
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class _Part:
  """A block of text to be set.

  Attributes:
    role: 'title' or 'body'.
    box: (left, top, right, bottom) that it may fill.
    sizes: smallest and largest pixels per em.
    tokens: at most.
  """

  role: str
  box: Box
  sizes: tuple[int, int]
  tokens: int


def draw(
  language: Language, faces: Sequence[Face], size: tuple[int, int],
  rng: np.random.Generator, texts: Sequence[str] = (),
  photos: Sequence[str] = (),
) -> Sample | Rejected:  # fmt: skip
  """One sample.

  Args:
    language: of the text.
    faces: to choose one from.
    size: (width, height).
    rng: decides everything else.
    texts: of the user, of which one is drawn, whole; none: random words.
    photos: paths of pictures to write on; none: drawn backgrounds only.
  """
  face = faces[int(rng.integers(len(faces)))]
  background = backgrounds.draw(size, rng, photos)
  if background is None:
    return Rejected(BAD_PHOTO)
  picture = background.image
  written: list[TextBlock] = []
  inks: set[tuple[str, str]] = set()
  for part in _parts(language, size, rng):
    made = _set(part, language, face, rng, texts)
    if isinstance(made, Rejected):
      return made
    text, block = made
    left, top = _corner(part, block, rng)
    ink = _ink(picture, _shift(block.box, left, top), rng)
    if ink is None:
      return Rejected(NO_CONTRAST)
    inks.add(colours.name_of(ink))
    picture.paste(ink, (left, top), block.image.getchannel("A"))
    lines = tuple(
      (line.text, polygon_of(_shift(line.box, left, top)))
      for line in block.lines
    )
    written.append(TextBlock(part.role, lines, text))
  layout = layout_of(
    "pure", language, size, [face], written, background.english
  )
  ink_name, ink_name_chinese = inks.pop() if len(inks) == 1 else ("", "")
  english = f"An image of {ink_name} text on {background.english}"
  english = english.replace("  ", " ")
  chinese = f"一张带有{ink_name_chinese}文字的图片，{background.chinese}"
  caption = captions.of(layout, english, chinese, language, rng)
  kind = f"text-pure-{language.code}"
  return Sample(picture, text_of(layout), caption, kind, layout)


def _parts(language: Language, size, rng) -> list[_Part]:
  """What goes where; every text in a box of its own."""
  form = str(rng.choice(list(FORMS), p=list(FORMS.values())))
  width, height = size
  margin = max(2, min(size) // int(rng.integers(12, 30)))
  box = (margin, margin, width - margin, height - margin)
  least = language.smallest
  largest = max(least, min(_LARGEST, min(size) // 6))
  if form == "line":
    return [_Part("title", box, (max(least, largest // 4), largest), 12)]
  if form == "page":
    low = max(least, _PAGE[0])
    pixels = int(rng.integers(low, max(low, _PAGE[1]) + 1))
    return [_Part("body", box, (least, pixels), words.MOST_TOKENS)]
  # As many small as large ones.
  pixels = round(float(np.exp(rng.uniform(np.log(least), np.log(largest)))))
  tokens = int(rng.integers(10, 300))
  if form == "paragraph":
    return [_Part("body", box, (least, pixels), tokens)]
  head, rest = _split(box, language, float(rng.uniform(0.2, 0.35)), margin)
  body = max(least, pixels // 2)
  return [
    _Part("title", head, (least, largest), 10),
    _Part("body", rest, (least, body), tokens),
  ]


def _split(box: Box, language: Language, share: float, gap: int):
  """A box for a title and one for what follows it."""
  left, top, right, bottom = box
  if language.direction == "ttb":
    middle = round(right - share * (right - left))
    return (middle + gap, top, right, bottom), (left, top, middle, bottom)
  middle = round(top + share * (bottom - top))
  return (left, top, right, middle), (left, middle + gap, right, bottom)


def _set(
  part: _Part, language: Language, face: Face, rng, texts: Sequence[str]
) -> tuple[str, typeset.Block] | Rejected:
  """A text and its block, or why there is none."""
  left, top, right, bottom = part.box
  width, height = right - left, bottom - top
  align = "start" if rng.random() < 0.7 else "center"
  leading = float(rng.uniform(1.2, 1.6))
  pixels = part.sizes[1]
  tokens = min(part.tokens, _capacity(width, height, pixels, leading, language))
  for _ in range(_TRIES):
    text = _text(part, language, rng, texts, tokens)
    reason = coverage.unrenderable(text, face)
    if reason:
      return Rejected(reason)
    if texts or part.role == "title":
      pixels = typeset.fitting(
        text, face, language, (part.sizes[0], pixels), width, height, leading
      )
      if pixels is None:
        return Rejected(NO_ROOM)
    block = typeset.block(
      text, face, language, pixels, (0, 0, 0), width, height, align, leading
    )
    if block.complete:
      return text, block
    tokens = int(0.7 * tokens)
    pixels = max(part.sizes[0], pixels - 1)
  return Rejected(NO_ROOM)


def _text(part: _Part, language, rng, texts, tokens: int) -> str:
  if part.role == "title" and not texts:
    return words.heading(rng, language)
  return coverage.normal(words.pick(rng, language, texts, tokens))


def _capacity(width, height, pixels, leading, language: Language) -> int:
  """About how many tokens fill a box."""
  lines = max(1.0, height / (leading * pixels))
  return max(1, int(lines * width / (pixels * _EM_PER_TOKEN[language.script])))


# Length of the average token (see `words.tokens_of`), and some room.
_EM_PER_TOKEN = {
  "Latn": 2.9, "Hans": 1.6, "Jpan": 1.4, "Kore": 1.5, "Arab": 0.8,
  "Deva": 0.6, "Thai": 0.7,
}  # fmt: skip


def _corner(part: _Part, block: typeset.Block, rng) -> tuple[int, int]:
  """Where the block's picture goes: its ink anywhere in the part's box."""
  left, top, right, bottom = part.box
  ink = block.box
  x = int(rng.integers(left - ink[0], right - ink[2] + 1))
  y = int(rng.integers(top - ink[1], bottom - ink[3] + 1))
  return x, y


def _shift(box: Box, x: int, y: int) -> Box:
  return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def _ink(picture: Image.Image, box: Box, rng) -> backgrounds.Ink | None:
  """A colour for text in a box; if none stands out, on a plate."""
  around = (
    max(0, box[0] - 8), max(0, box[1] - 8),
    min(picture.width, box[2] + 8), min(picture.height, box[3] + 8),
  )  # fmt: skip
  ink = backgrounds.ink_for(picture.crop(box), rng)
  if ink is not None:
    return ink
  plate = picture.crop(around)
  tone = 255 if np.asarray(plate).mean() > 127 else 0
  cover = Image.new("RGB", plate.size, (tone,) * 3)
  picture.paste(Image.blend(plate, cover, float(rng.uniform(0.7, 1))), around)
  return backgrounds.ink_for(picture.crop(box), rng)
