# SPDX-License-Identifier: Apache-2.0
"""Which fonts can draw a language: the user's, the system's or matplotlib's."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable

import matplotlib
from fontTools import ttLib
from matplotlib import font_manager

from data_pipelines.errors import InputError
from data_pipelines.synthesis import words
from data_pipelines.synthesis.languages import Language

_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_COLLECTIONS = (".ttc", ".otc")


@functools.lru_cache(maxsize=64)
def _sha256(path: str) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True, order=True)
class Face:
  """A face of a font file.

  Attributes:
    path: of the file.
    index: of the face in a collection; 0 for other files.
  """

  path: str
  index: int = 0

  @property
  def file(self) -> str:
    """Name of the file."""
    return os.path.basename(self.path)

  @property
  def sha256(self) -> str:
    """Of the file; read once in a process."""
    return _sha256(self.path)


def covers(path: str, text: str, index: int = 0) -> bool:
  """Whether a face has a glyph for every character; False if unreadable."""
  try:
    with ttLib.TTFont(path, lazy=True, fontNumber=index) as font:
      return set(map(ord, text)) <= set(font.getBestCmap() or ())
  except (OSError, ttLib.TTLibError, KeyError, AssertionError):
    return False


def bundled_folder() -> pathlib.Path:
  """Of the fonts (DejaVu) that every matplotlib wheel carries."""
  return pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")


@functools.lru_cache(maxsize=1)
def system_fonts() -> tuple[str, ...]:
  """Paths of the installed fonts."""
  return tuple(sorted(font_manager.findSystemFonts()))


@functools.lru_cache(maxsize=64)
def faces_of(language: Language, folder: str = "") -> tuple[Face, ...]:
  """Faces that can draw a language, in an order that the machine decides not.

  Args:
    language: what they are to draw.
    folder: of fonts to use in place of all others; empty: the language's
      preferred ones of the system and of matplotlib.

  Raises:
    InputError: there is none, or the folder is none.
  """
  if folder:
    return _of_folder(language, folder)
  found = {}
  for path in (*map(str, bundled_folder().glob("*")), *system_fonts()):
    found[pathlib.Path(path).stem] = path  # the system's win
  paths = [found[stem] for stem in language.faces if stem in found]
  faces = tuple(_drawing(paths, language))
  if not faces:
    raise InputError(
      f"No installed font draws {language.name} ({language.code}); install "
      f"the Debian package {language.package}, give a folder with --fonts, or "
      "leave the language out of --languages."
    )
  return faces


def _of_folder(language: Language, folder: str) -> tuple[Face, ...]:
  if not os.path.isdir(folder):
    raise InputError(f"Font folder {folder} does not exist; check --fonts.")
  paths = sorted(
    str(path)
    for path in pathlib.Path(folder).rglob("*")
    if path.suffix.lower() in _SUFFIXES
  )
  faces = tuple(_drawing(paths, language))
  if not faces:
    raise InputError(
      f"None of the {len(paths)} fonts in {folder} draws {language.name} "
      f"({language.code}); add one (of the Debian package {language.package}, "
      "say), or leave the language out of --languages."
    )
  return faces


def _drawing(paths: Iterable[str], language: Language):
  """The faces, one per file, that have the language's characters."""
  wanted = words.characters(language)
  for path in paths:
    index = _index_in_collection(path, language.collection)
    if index is not None and covers(path, wanted, index):
      yield Face(path, index)


def _index_in_collection(path: str, ending: str) -> int | None:
  """The face of which the family name ends so, else the first one."""
  if not path.lower().endswith(_COLLECTIONS):
    return 0
  try:
    with ttLib.TTCollection(path, lazy=True) as fonts:
      for i, font in enumerate(fonts.fonts):
        if ending and str(font["name"].getBestFamilyName()).endswith(ending):
          return i
  except (OSError, ttLib.TTLibError, KeyError, AssertionError):
    return None
  return 0
