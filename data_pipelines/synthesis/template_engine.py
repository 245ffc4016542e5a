# SPDX-License-Identifier: Apache-2.0
"""typst lays a template out; this says where every line of its text lies.

A template reads one JSON value (`sys.inputs.data`), so no text ever becomes
markup. It leaves a mark behind every piece of text (`template_text`) and one at
each frame that must hold its texts; typst breaks the lines. One point is one
pixel.
"""

import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import typst
from PIL import Image

from data_pipelines.synthesis import template_text
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import Language
from data_pipelines.synthesis.sample import NO_ROOM, Box
from data_pipelines.synthesis.template_text import Ink, Piece

FOLDER = pathlib.Path(__file__).with_name("templates")
LEFT_OUT = "text was left out"
LEAVES_FRAME = "text leaves its frame"
_MARKS = (
  "(query(<piece>) + query(<frame>)).map(m => {"
  "let p = m.location().position();"
  "(m.value, p.page, p.x.pt(), p.y.pt())})"
)


@dataclasses.dataclass(frozen=True)
class Text:
  """One text of a template.

  Attributes:
    role: 'title', 'body', 'cell', ...
    text: as it was given.
    pieces: of it.
    face: that draws it.
  """

  role: str
  text: str
  pieces: tuple[Piece, ...]
  face: Face


@dataclasses.dataclass(frozen=True)
class Line:
  """A line as typst broke it.

  Attributes:
    text: of the line.
    box: of its ink: left, top, right, bottom in pixels.
    size: pixels per em.
  """

  text: str
  box: Box
  size: float


@dataclasses.dataclass(frozen=True)
class Page:
  """What typst made of a template.

  Attributes:
    image: RGB.
    lines: of every text, in the order of the texts.
  """

  image: Image.Image
  lines: tuple[tuple[Line, ...], ...]


def typeset(
  template: str, data: dict[str, Any], texts: Sequence[Text],
  language: Language, faces: tuple[Face, ...],
) -> Page | str:  # fmt: skip
  """Lays a template out.

  Args:
    template: name of a file in `FOLDER`, without suffix.
    data: what the template reads, with "w" and "h", the size in pixels,
      "edges", how far lines reach above and below their baseline and the gap
      between them in em, and "smallest", the least pixels per em.
    texts: it refers to them by number; each must be drawn exactly once.
    language: of the texts.
    faces: of the texts, and others of the language.

  Returns:
    The page, or the reason why there is none.
  """
  compiler = _compiler(template, faces)
  described = [_described(t, language, data["edges"], faces) for t in texts]
  # typst would spend a minute on a long text before it were refused.
  least = data["smallest"] ** 2 * sum(data["edges"])
  if sum(d["length"] for d in described) * least > data["w"] * data["h"]:
    return NO_ROOM
  sent = {**data, "texts": described}
  image = compiler.compile(
    format="png", ppi=72.0, sys_inputs={"data": json.dumps(sent)}
  )
  if isinstance(image, list):
    return NO_ROOM
  marks = json.loads(compiler.eval(_MARKS))
  ends = {tuple(v[:2]): (v[2], x, y) for v, _, x, y in marks if len(v) == 3}
  lines = []
  for number, text in enumerate(texts):
    if any((number, k) not in ends for k in range(len(text.pieces))):
      return LEFT_OUT
    lines.append(_lines(number, text, ends, language))
  page = (list(range(len(texts))), data["w"], data["h"])
  frames = [
    (page, 0, 0),
    *((v[0], x, y) for v, _, x, y in marks if len(v) == 1),
  ]
  for (numbers, width, height), x, y in frames:
    for number in numbers:
      for line in lines[number]:
        if not _inside(line.box, (x, y, x + width, y + height)):
          return LEAVES_FRAME
  return Page(Image.open(io.BytesIO(image)).convert("RGB"), tuple(lines))


def usable(faces: tuple[Face, ...]) -> tuple[Face, ...]:
  """The faces that typst can tell apart: by family, style, weight, stretch."""
  return tuple(face for face in faces if face in _fonts(faces).names)


def measured(text: Text, language: Language) -> tuple[float, float, Box]:
  """Lengths in em: of a text on one line, and of its longest piece; its ink.

  The ink is that of all pieces on top of each other, to the left of the start
  and to the right of the end of a piece, above and below the baseline.
  """
  inks = [
    template_text.ink(p.text, p.rtl, text.face, language) for p in text.pieces
  ]
  space = template_text.ink(" ", False, text.face, language).advance
  gaps = sum(p.gap for p in text.pieces)
  drawn = [ink for ink in inks if ink.box] or [Ink(0.0, (0.0,) * 4)]
  return (
    sum(ink.advance for ink in inks) + space * gaps,
    max((ink.advance for ink in inks), default=0.0),
    (
      min(ink.box[0] for ink in drawn),
      min(ink.box[1] for ink in drawn),
      max(ink.box[2] - ink.advance for ink in drawn),
      max(ink.box[3] for ink in drawn),
    ),
  )


def _described(
  text: Text, language: Language, edges: Sequence[float], faces
) -> dict[str, Any]:  # fmt: skip
  """A text as a template reads it."""
  length, longest, (left, top, right, bottom) = measured(text, language)
  over = (-left, -top - edges[0], right, bottom - edges[1])
  return {
    "font": _fonts(faces).names[text.face],
    "pieces": [[p.text, p.gap] for p in text.pieces],
    "length": length,
    "longest": longest,
    "over": [max(0.0, v) for v in over],
  }


@dataclasses.dataclass(frozen=True)
class _Fonts:
  """Faces as typst has them.

  Attributes:
    opened: all of them.
    names: by which typst tells them apart.
    folder: of links to their files; removed together with this.
  """

  opened: typst.Fonts
  names: dict[Face, dict[str, Any]]
  folder: tempfile.TemporaryDirectory


@functools.cache
def _fonts(faces: tuple[Face, ...]) -> _Fonts:
  """Opens faces.

  typst takes folders only, and of two fonts of one name the first that it
  finds; so it gets a folder of links, without second ones.
  """
  folder = tempfile.TemporaryDirectory(prefix="faces-")
  names: dict[Face, dict[str, Any]] = {}
  for number, path in enumerate(dict.fromkeys(face.path for face in faces)):
    one = os.path.join(folder.name, str(number))
    os.mkdir(one)
    os.symlink(os.path.abspath(path), os.path.join(one, os.path.basename(path)))
    found = {info.index: _name(info) for info in _opened(one).fonts()}
    wanted = [f for f in faces if f.path == path and f.index in found]
    if any(name in names.values() for name in found.values()):
      shutil.rmtree(one)
      continue
    names |= {face: found[face.index] for face in wanted}
  return _Fonts(_opened(folder.name), names, folder)


def _opened(folder: str) -> typst.Fonts:
  return typst.Fonts(
    include_system_fonts=False, include_embedded_fonts=False,
    font_paths=[folder],
  )  # fmt: skip


def _name(info: typst.FontInfo) -> dict[str, Any]:
  return {
    "family": info.family, "style": info.style, "weight": info.weight,
    "stretch": info.stretch,
  }  # fmt: skip


@functools.lru_cache(maxsize=64)
def _compiler(template: str, faces: tuple[Face, ...]) -> typst.Compiler:
  return typst.Compiler(
    str(FOLDER / f"{template}.typ"), root=str(FOLDER),
    font_paths=_fonts(faces).opened, ignore_system_fonts=True,
  )  # fmt: skip


def _lines(
  number: int, text: Text, ends: dict, language: Language
) -> tuple[Line, ...]:  # fmt: skip
  """Groups the pieces of a text by the baseline that they stand on."""
  rows: list[list[tuple[Piece, Box | None]]] = []
  size, last = 0.0, None
  for k, piece in enumerate(text.pieces):
    size, x, y = ends[number, k]
    found = template_text.ink(piece.text, piece.rtl, text.face, language)
    same = last is not None and abs(y - last[1]) < 0.05
    if not same:
      rows.append([])
    if piece.rtl:
      left = x
    elif same and not piece.gap and not language.spaces:
      # typst may cut the blank half of a full-width mark: its start counts.
      left = last[0]
    else:
      left = x - found.advance * size
    box = found.box and tuple(
      origin + v * size for origin, v in zip((left, y, left, y), found.box)
    )
    rows[-1].append((piece, box))
    last = (x, y)
  return tuple(_line(row, size) for row in rows)


def _line(row: list[tuple[Piece, Box | None]], size: float) -> Line:
  words = [
    (" " if piece.gap and i else "") + piece.text
    for i, (piece, _) in enumerate(row)
  ]
  boxes = [box for _, box in row if box] or [(0.0, 0.0, 0.0, 0.0)]
  lefts, tops, rights, bottoms = zip(*boxes)
  box = (min(lefts), min(tops), max(rights), max(bottoms))
  return Line("".join(words), box, size)


def _inside(box: Box, frame: Box) -> bool:
  """Whether ink stays within a frame, to half a pixel."""
  return (
    box[0] >= frame[0] - 0.5 and box[1] >= frame[1] - 0.5
    and box[2] <= frame[2] + 0.5 and box[3] <= frame[3] + 0.5
  )  # fmt: skip
