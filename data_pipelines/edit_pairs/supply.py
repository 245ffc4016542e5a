# SPDX-License-Identifier: Apache-2.0
"""What one pair is made of: pictures, backgrounds and cut-outs, on demand.

What cannot be used is noted and the next one is taken. Where the user gave
none of a kind, ours are drawn, if that is allowed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.edit_pairs import (
  catalogue,
  embedded_places,
  embedded_things,
  scene,
)
from data_pipelines.edit_pairs.pair import OBJECT, Name, Picture, Thing
from data_pipelines.engine import decoding
from data_pipelines.images import EncodedImage
from data_pipelines.loader.buckets import Bucket, assign, fit
from data_pipelines.sources.items import Limits, Unusable

_SMALLEST_THING = 32  # pixels of the shorter side


@dataclasses.dataclass(frozen=True)
class Candidates:
  """Inputs for one pair, in the order in which they are tried.

  Attributes:
    pictures: any.
    places: without transparency, for backgrounds.
    things: with alpha or a mask.
    marked: with a mask.
  """

  pictures: tuple[catalogue.Source, ...] = ()
  places: tuple[catalogue.Source, ...] = ()
  things: tuple[catalogue.Source, ...] = ()
  marked: tuple[catalogue.Source, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rules:
  """What all pairs share.

  Attributes:
    sizes: (width, height) of pairs.
    embedded: whether ours may be drawn.
    inverse: share of restorations that go the other way.
    text_languages: of text in pictures; see `synthesis.languages`.
    fonts: folder of fonts for that text; '' for those of the system.
    limits: of the images.
  """

  sizes: tuple[tuple[int, int], ...]
  embedded: bool = True
  inverse: float = 0.2
  text_languages: tuple[str, ...] = ("en",)
  fonts: str = ""
  limits: Limits = dataclasses.field(default_factory=Limits)


class _Misfit(Unusable):
  """A good picture that cannot fill the size of this very pair."""


class Supply:
  """The inputs of one pair; every call gives another one."""

  def __init__(
    self, candidates: Candidates, rules: Rules, rng: np.random.Generator
  ):
    """Reads nothing yet."""
    self._left = {
      "pictures": list(candidates.pictures),
      "places": list(candidates.places),
      "things": list(candidates.things),
      "marked": list(candidates.marked),
    }
    self._given = {name: bool(left) for name, left in self._left.items()}
    self.rules = rules
    self._rng = rng
    self._size: tuple[int, int] | None = None
    self._originals: list[tuple[Image.Image, EncodedImage]] = []
    self.used: list[dict[str, Any]] = []
    self.problems: list[tuple[str, str, str]] = []

  @property
  def has_things(self) -> bool:
    """Whether there are cut-outs, the user's or ours."""
    return self._given["things"] or self.rules.embedded

  @property
  def has_marked(self) -> bool:
    """Whether there are pictures with a mask."""
    return self._given["marked"]

  @property
  def size(self) -> tuple[int, int]:
    """(width, height) of the pair: that of its first picture."""
    if self._size is None:
      sizes = self.rules.sizes
      self._size = sizes[int(self._rng.integers(len(sizes)))]
    return self._size

  def picture(self) -> Picture:
    """A picture, RGB or RGBA."""
    return self._next("pictures", "picture") or self._scene()

  def place(self, other: Picture | None = None) -> Picture:
    """A background, RGB; not the one given."""
    found = self._next("places", "background")
    if found is not None:
      return found
    self._require_embedded("places", "background")
    name = other.name.en if other and other.name else ""
    drawn = embedded_places.draw(self.size, self._rng, name)
    self._use(drawn.id, "background", {})
    return drawn

  def marked(self) -> Picture:
    """A picture whose object is marked, in a size of its own."""
    found = self._next("marked", "picture")
    if found is None:
      raise Unusable("no usable picture with a mask")
    return found

  def thing(
    self, others: Sequence[Name] = (), distinct: bool = True
  ) -> Thing | None:
    """Another cut-out.

    Args:
      others: names that ours must not have.
      distinct: whether the user's must not have them either.

    Returns:
      None if there is no such cut-out any more.
    """
    while self._left["things"]:
      source = self._left["things"].pop(0)
      try:
        found = self._thing(source)
      except Unusable as error:
        self._note(source, error)
        continue
      if not distinct or found.name not in others:
        self._use(found.id, "cut-out", found.kept)
        return found
    if self._given["things"] or not self.rules.embedded:
      return None
    drawn = embedded_things.draw(self._rng, tuple(name.en for name in others))
    self._use(drawn.id, "cut-out", {})
    return drawn

  def bytes_of(self, image: Image.Image) -> EncodedImage | None:
    """The bytes that an image came in, if it is an input as it was."""
    found = (known for other, known in self._originals if other is image)
    return next(found, None)

  def placed(self, count: int) -> list[scene.Placed]:
    """Cut-outs in columns of their own, from the left to the right.

    Args:
      count: at most 3; fewer if two would have the same name.

    Raises:
      Unusable: there is not even one.
    """
    columns = list(scene.COLUMNS)
    placed: list[scene.Placed] = []
    for i in sorted(self._rng.permutation(len(columns))[:count].tolist()):
      thing = self.thing([item.thing.name for item in placed])
      if thing is None:
        break
      placed.append(scene.place(thing, columns[i], self.size, self._rng))
    if not placed:
      raise Unusable("no usable cut-out is left")
    return placed

  def _next(self, kind: str, role: str) -> Picture | None:
    while self._left[kind]:
      source = self._left[kind].pop(0)
      try:
        found = self._picture(source, kind)
      except _Misfit:
        continue
      except Unusable as error:
        self._note(source, error)
        continue
      self._use(found.id, role, found.kept)
      return found
    return None

  def _picture(self, source: catalogue.Source, kind: str) -> Picture:
    loaded = catalogue.load(source, self.rules.limits)
    size = (loaded.encoded.width, loaded.encoded.height)
    bucket = self._bucket(size)
    image = decoding.decode(loaded.encoded, self.rules.limits)
    if kind == "places" and image.mode != "RGB":
      raise Unusable("no background (it is transparent)")
    region = None
    if loaded.mask is not None:
      mask = catalogue.region_of(loaded, image, self.rules.limits)
      region = fit(mask, bucket, 1) > 127
      if not region.any():
        raise Unusable("no cut-out (it is outside of the cropped picture)")
    same = image.size == (bucket.width, bucket.height)
    if not same:
      image = Image.fromarray(fit(image, bucket, len(image.mode)))
    self._size = image.size
    if same:
      self._originals.append((image, loaded.encoded))
    named = loaded.name if loaded.name != OBJECT else None
    return Picture(image, source.id, loaded.caption, named, region, loaded.kept)

  def _bucket(self, size: tuple[int, int]) -> Bucket:
    """Where a picture goes: the first one of a pair decides the size."""
    sizes = [self._size] if self._size else self.rules.sizes
    buckets = [Bucket(height, width) for width, height in sizes]
    found = assign(*size, buckets, 1.0)
    if found < 0:
      sort = _Misfit if self._size else Unusable
      raise sort(f"picture too small ({size[0]} x {size[1]}; --sizes)")
    return buckets[found]

  def _thing(self, source: catalogue.Source) -> Thing:
    loaded = catalogue.load(source, self.rules.limits)
    image = decoding.decode(loaded.encoded, self.rules.limits)
    mask = catalogue.region_of(loaded, image, self.rules.limits)
    cut = image.convert("RGBA")
    cut.putalpha(mask)
    cut = cut.crop(mask.getbbox())
    if min(cut.size) < _SMALLEST_THING:
      raise Unusable(f"cut-out too small ({cut.width} x {cut.height})")
    return Thing(cut, source.id, loaded.name, loaded.kept)

  def _scene(self) -> Picture:
    """One of our pictures: a background and cut-outs on it."""
    self._require_embedded("pictures", "picture")
    background = embedded_places.draw(self.size, self._rng)
    self._use(background.id, "background", {})
    placed = self.placed(int(self._rng.integers(1, 4)))
    name = scene.describe(placed, background)
    image = scene.render(background.image, placed)
    return Picture(image, background.id, name=name)

  def _require_embedded(self, kind: str, role: str) -> None:
    if self._given[kind] or not self.rules.embedded:
      raise Unusable(f"no usable {role} is left")

  def _use(self, id: str, role: str, kept: dict[str, Any]) -> None:
    self.used.append({**kept, "id": id, "role": role})

  def _note(self, source: catalogue.Source, error: Unusable) -> None:
    self.problems.append((source.id, str(error), source.path))
