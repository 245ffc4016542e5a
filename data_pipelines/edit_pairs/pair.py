# SPDX-License-Identifier: Apache-2.0
"""What the kinds of edits are given, and what they make."""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Name:
  """What something is called, without an article.

  Attributes:
    en: in English.
    zh: in Chinese.
  """

  en: str
  zh: str

  def of(self, language: str) -> str:
    """The name in 'en' or 'zh'."""
    return self.en if language == "en" else self.zh


OBJECT = Name("object", "物体")


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image at the size of the pair.

  Attributes:
    image: RGB or RGBA.
    id: of the input, 'embedded:...' for ours.
    caption: of the input; '' if it has none.
    name: what it shows, if there is a short name for that.
    region_HW: bool, an object in it; None if nobody marked one.
    kept: fields of the input's own metadata, such as its licence.
  """

  image: Image.Image
  id: str
  caption: str = ""
  name: Name | None = None
  region_HW: np.ndarray | None = None
  kept: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Thing:
  """A cut-out.

  Attributes:
    image: RGBA, cropped to what is not transparent.
    id: of the input, 'embedded:...' for ours.
    name: what it is called.
    kept: fields of the input's own metadata, such as its licence.
  """

  image: Image.Image
  id: str
  name: Name
  kept: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pair:
  """One edit.

  Attributes:
    operation: a key of `instructions.TEMPLATES`.
    references: what the edit starts from, in order.
    target: its result.
    change_HW: bool, where the target may differ from the first reference;
      None if it may everywhere.
    slots: what the instruction says of this very edit.
    parameters: plain JSON, exact.
    redrawn: whether the target need not resemble its references at all.
    language: 'en' or 'zh' if only that will do.
  """

  operation: str
  references: tuple[Image.Image, ...]
  target: Image.Image
  change_HW: np.ndarray | None = None
  slots: dict[str, Name | str] = dataclasses.field(default_factory=dict)
  parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
  redrawn: bool = False
  language: str | None = None
