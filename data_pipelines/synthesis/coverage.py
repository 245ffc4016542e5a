# SPDX-License-Identifier: Apache-2.0
"""The refusal of text that a font would not draw exactly as it is written.

A font draws a box for a character that it lacks, a dotted circle for a mark
without a base, and nothing for some others; such an image would teach a model
that this is what the text looks like. So the whole text is refused. The table
of characters (cmap) alone does not tell: whether a variation is there, and
what a mark attaches to, is known after shaping only.
"""

import dataclasses
import functools
import itertools
import re
import unicodedata

import uharfbuzz as hb
from fontTools import unicodedata as scripts

from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.shaping import opened

# Control, surrogate, private-use and unassigned characters and separators of
# lines: never drawable on purpose, even where a font happens to map them.
_REFUSED = ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")
# Format characters that shape the letters beside them; all others (directions,
# tags, joiners of words) change or break the line and cannot be seen.
_JOINERS = "\u200c\u200d"
_REPLACEMENTS = "\ufffc\ufffd"
_PLACEHOLDER = re.compile(r"\{\{.*?\}\}", re.DOTALL)
_DOTTED_CIRCLE = "\u25cc"
# How many characters a line is looked at in one go.
_PIECE = 400

NOT_NORMAL = "text is not in Unicode NFC"
PLACEHOLDER = "placeholder left in the text"
REFUSED = "control, private or unassigned character"
INVISIBLE = "invisible format character"
NO_GLYPH = "character that the font lacks"
NO_VARIATION = "variation that the font lacks"
NO_BASE = "mark without a base"
BLANK = "character that is drawn as nothing"
EMPTY = "text is empty"


def normal(text: str) -> str:
  """Text in NFC with one kind of line end, no blank at the ends of lines."""
  text = unicodedata.normalize("NFC", text)
  return "\n".join(line.strip() for line in text.splitlines()).strip("\n")


def unrenderable(text: str, face: Face) -> str | None:
  """Why a face cannot draw a text exactly; None if it can.

  Args:
    text: one or more lines, in NFC (see `normal`).
    face: that is to draw all of it.

  Returns:
    One of this module's phrases, the same for all text of that sort.

  Raises:
    InputError: the font is unreadable.
  """
  if not text.strip():
    return EMPTY
  if unicodedata.normalize("NFC", text) != text:
    return NOT_NORMAL
  if _PLACEHOLDER.search(text):
    return PLACEHOLDER
  shaper = _shaper(face)
  return _bad_character(text, shaper) or next(
    filter(None, (_bad_shape(line, shaper) for line in text.split("\n"))), None
  )


@dataclasses.dataclass(frozen=True)
class _Shaper:
  """A face, opened.

  Attributes:
    font: for HarfBuzz.
    characters: that it maps to glyphs.
    variations: (character, variation selector) that it has forms for.
    circle: glyph of the dotted circle; 0 if it has none.
    inked: whether a glyph has an outline, by its number.
  """

  font: hb.Font
  characters: frozenset[int]
  variations: frozenset[tuple[int, int]]
  circle: int
  inked: dict[int, bool] = dataclasses.field(default_factory=dict)


@functools.lru_cache(maxsize=64)
def _shaper(face: Face) -> _Shaper:
  font = opened(face)
  table = font.face
  variations = frozenset(
    (character, selector)
    for selector in table.variation_selectors
    for character in table.variation_unicodes(selector)
  )
  circle = font.get_nominal_glyph(ord(_DOTTED_CIRCLE)) or 0
  return _Shaper(font, frozenset(table.unicodes), variations, circle)


def _bad_character(text: str, shaper: _Shaper) -> str | None:
  """What the characters say one by one."""
  for c in set(text) - {"\n"}:
    category = unicodedata.category(c)
    if category in _REFUSED or c in _REPLACEMENTS:
      return REFUSED
    if category == "Cf":
      if c not in _JOINERS:
        return INVISIBLE
    elif not _is_selector(c) and ord(c) not in shaper.characters:
      return NO_GLYPH
  for before, c in itertools.pairwise("\n" + text):
    if _is_selector(c):
      if (ord(before), ord(c)) not in shaper.variations:
        return NO_VARIATION
    elif before.isspace() and unicodedata.category(c).startswith("M"):
      return NO_BASE
  return None


def _is_selector(c: str) -> bool:
  return "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef"


def _bad_shape(line: str, shaper: _Shaper) -> str | None:
  """What the glyphs say that the line becomes."""
  for run in _runs(line):
    buffer = hb.Buffer()
    buffer.add_str(run)
    buffer.guess_segment_properties()
    hb.shape(shaper.font, buffer)
    infos = buffer.glyph_infos
    if any(info.codepoint == 0 for info in infos):
      return NO_GLYPH
    circles = sum(info.codepoint == shaper.circle for info in infos)
    if circles and _DOTTED_CIRCLE not in run:
      return NO_BASE
    if _has_blank(run, infos, shaper):
      return BLANK
  return None


def _has_blank(run: str, infos, shaper: _Shaper) -> bool:
  """Whether a letter, number, sign or symbol leaves no ink."""
  inked: dict[int, bool] = {}
  for info in infos:
    glyph = info.codepoint
    if glyph not in shaper.inked:
      extents = shaper.font.get_glyph_extents(glyph)
      shaper.inked[glyph] = bool(extents and extents.width and extents.height)
    inked[info.cluster] = inked.get(info.cluster, False) or shaper.inked[glyph]
  starts = sorted(inked)
  return any(
    not inked[start] and any(unicodedata.category(c)[0] in "LNPS" for c in part)
    for start, end in itertools.pairwise([*starts, len(run)])
    for part in [run[start:end]]
  )


@functools.lru_cache(maxsize=65536)
def _script(c: str) -> str:
  return scripts.script(c)


def _runs(line: str):
  """Pieces of one script each, as the layout engines shape them.

  Characters that all scripts share go with those before them; long runs are
  cut at spaces, for HarfBuzz looks no further.
  """
  run, script = "", ""
  for c in line:
    own = _script(c)
    shared = own in ("Zyyy", "Zinh")
    full = c == " " and len(run) > _PIECE
    if run and (full or not (shared or script in ("", own))):
      yield run
      run, script = "", script if full else ""
    run += c
    if not shared:
      script = own
  if run:
    yield run
