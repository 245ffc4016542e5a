# SPDX-License-Identifier: Apache-2.0
"""The texts of a template while it is being filled, and how large they may be.

Ranges here and in the modules that fill templates are ours.
"""

import dataclasses
import functools
import unicodedata

import numpy as np

from data_pipelines.synthesis import (
  coverage,
  template_engine,
  template_text,
  words,
)
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import Language
from data_pipelines.synthesis.template_engine import Text

# Ascent, descent and the gap between lines, in em. Marks above and below the
# letters ask for more than the letters do.
EDGES = {
  "Latn": (0.8, 0.24, 0.22), "Hans": (0.88, 0.14, 0.36),
  "Jpan": (0.88, 0.14, 0.4), "Kore": (0.9, 0.16, 0.36),
  "Arab": (0.95, 0.5, 0.1), "Deva": (0.95, 0.4, 0.12),
  "Thai": (1.1, 0.35, 0.1),
}  # fmt: skip


@dataclasses.dataclass
class Draft:
  """What fills a template.

  Attributes:
    language: of all texts.
    face: of all texts but the titles.
    title_face: of titles.
    size: (width, height) of the page in pixels.
    rng: decides everything.
    given: the user's texts; empty: random words.
    texts: so far.
    refused: why the sample must not be drawn; empty so far.
  """

  language: Language
  face: Face
  title_face: Face
  size: tuple[int, int]
  rng: np.random.Generator
  given: tuple[str, ...] = ()
  texts: list[Text] = dataclasses.field(default_factory=list)
  refused: str = ""

  @property
  def unit(self) -> float:
    """A hundredth of the shorter side."""
    return min(self.size) / 100

  def add(self, role: str, text: str, title: bool = False) -> int:
    """Adds a text and gives the number by which the template calls it."""
    face = self.title_face if title else self.face
    text = " ".join(text.split())
    reason = coverage.unrenderable(text, face)
    pieces = () if reason else template_text.pieces(text, self.language)
    if reason or pieces is None:
      self.refused = self.refused or reason or "directions too mixed"
      pieces = ()
    self.texts.append(Text(role, text, pieces, face))
    return len(self.texts) - 1

  def heading(self, role: str = "title", title: bool = True) -> int:
    """A few words."""
    return self.add(role, words.heading(self.rng, self.language), title)

  def passage(self, role: str, tokens: float) -> int:
    """One of the user's texts, or sentences of about so many tokens."""
    return self.add(role, self.sentences(tokens))

  def sentences(self, tokens: float) -> str:
    """The text of `passage`."""
    tokens = max(1, round(tokens))
    if self.given or tokens > 20:
      return words.pick(self.rng, self.language, self.given, tokens)
    # One sentence may be longer than asked for.
    for _ in range(4):
      text = words.sentence(self.rng, self.language)
      if words.tokens_of(text, self.language) <= tokens:
        return text
    return words.heading(self.rng, self.language)

  def label(self, role: str, most: int = 2) -> int:
    """One word or two."""
    listed = words.vocabulary(self.language)
    drawn = self.rng.choice(listed, int(self.rng.integers(1, most + 1)))
    text = (" " if self.language.spaces else "").join(map(str, drawn))
    return self.add(role, text[:1].upper() + text[1:])

  def figures(self, least: int = 1, most: int = 4) -> str:
    """A number of so many figures, without a zero in front."""
    while True:
      text = words.number(self.rng, self.language)
      if least <= len(text) <= most and unicodedata.digit(text[0]):
        return text

  def figure(self, role: str, least: int = 1, title: bool = False) -> int:
    """A number in the language's own figures, at least so long."""
    return self.add(role, self.figures(least), title)

  def between(self, low: float, high: float) -> float:
    """A number of a range, to three decimals."""
    return round(float(self.rng.uniform(low, high)), 3)

  def chance(self, share: float) -> bool:
    """True so often."""
    return bool(self.rng.random() < share)

  def count(self, low: int, high: int) -> int:
    """A whole number of a range, both ends included."""
    return int(self.rng.integers(low, high + 1))

  def pixels(self, low: float, high: float) -> float:
    """A size of letters, given in hundredths of the page's shorter side."""
    least = self.language.smallest
    return max(least, self.between(low * self.unit, high * self.unit))

  def sampled(self) -> tuple[int, float]:
    """Tokens of some text of the language, and the em that each takes."""
    return _sampled(self.language, self.face)

  def room(self, width: float, height: float, size: float) -> float:
    """About how many tokens of letters of a size fill an area in pixels."""
    _, length = self.sampled()
    lines = max(1.0, height / (size * sum(EDGES[self.language.script])))
    return lines * width / (size * length)


@functools.lru_cache(maxsize=64)
def _sampled(language: Language, face: Face) -> tuple[int, float]:
  """Tokens of a long random text, and the em that each of them takes."""
  text = words.paragraph(np.random.default_rng(0), language, 400)
  found = Text("", text, template_text.pieces(text, language) or (), face)
  length, *_ = template_engine.measured(found, language)
  tokens = words.tokens_of(text, language)
  return tokens, max(length, 1.0) / tokens
