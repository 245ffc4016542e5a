# SPDX-License-Identifier: Apache-2.0
"""What is behind pure text: plain, gradient, clouds, texture, or a photo.

H, W: pixels.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from data_pipelines import images
from data_pipelines.errors import InputError
from data_pipelines.synthesis import colours

KINDS = ("plain", "gradient", "clouds", "stripes", "dots", "grain")
# WCAG 2.2, success criterion 1.4.3: large text.
LEAST_CONTRAST = 3.0
BAD_PHOTO = "background photo is unreadable"
_PHOTO_CHANCE = 0.5  # where the user gave photos; ours
# "{}" is the colour, where there is one.
_NAMES = {
  "plain": ("a plain {} background", "{}纯色背景"),
  "gradient": ("a gradient", "渐变背景"),
  "clouds": ("a background of soft colours", "柔和的彩色背景"),
  "stripes": ("a striped {} background", "{}条纹背景"),
  "dots": ("a dotted {} background", "{}圆点背景"),
  "grain": ("grainy {} paper", "粗糙的{}纸质背景"),
  "photo": ("a photo", "照片背景"),
}
Ink = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Background:
  """A picture without text.

  Attributes:
    image: RGB.
    english: what it is.
    chinese: the same.
  """

  image: Image.Image
  english: str
  chinese: str


def draw(
  size: tuple[int, int], rng: np.random.Generator, photos: Sequence[str] = ()
) -> Background | None:
  """A random background.

  Args:
    size: (width, height).
    rng: decides everything.
    photos: paths of pictures of the user; empty: none is used.

  Returns:
    The background, or None if the photo that was drawn is unreadable.
  """
  kind = str(rng.choice(KINDS))
  paper = _paper(rng)
  if photos and rng.random() < _PHOTO_CHANCE:
    kind = "photo"
    path = str(photos[int(rng.integers(len(photos)))])
    image = photo(size, path, (float(rng.random()), float(rng.random())))
  else:
    image = _painted(kind, paper, size, rng)
  names = zip(_NAMES[kind], colours.name_of(paper))
  return image and Background(image, *(text.format(c) for text, c in names))


def photo(
  size: tuple[int, int], path: str, where: tuple[float, float]
) -> Image.Image | None:
  """A crop of a photo in the shape of a size, scaled to it.

  Args:
    size: (width, height).
    path: of the photo.
    where: the crop is, from (0, 0), left and top, to (1, 1).

  Returns:
    RGB, or None if it is unreadable.
  """
  try:
    with open(path, "rb") as file:
      whole = images.on_white(images.decode(file.read()))
  except (OSError, InputError):
    return None
  return ImageOps.fit(whole, size, Image.Resampling.BICUBIC, centering=where)


def _painted(kind: str, paper, size, rng) -> Image.Image:
  """One of `KINDS`; coarse pictures are scaled up, which is fast."""
  if kind == "plain":
    return Image.new("RGB", size, tuple(int(v) for v in paper))
  if kind == "gradient":
    corners = np.clip(paper + rng.integers(-70, 71, (2, 2, 3)), 0, 255)
    return _scaled(corners, size, Image.Resampling.BILINEAR)
  if kind == "clouds":
    grid = (*rng.integers(3, 9, 2), 3)
    return _scaled(
      np.clip(paper + rng.integers(-60, 61, grid), 0, 255), size,
      Image.Resampling.BICUBIC,
    )  # fmt: skip
  if kind == "grain":
    grain = rng.integers(-12, 13, (size[1], size[0], 1), np.int16)
    return Image.fromarray(np.uint8(np.clip(paper + grain, 0, 255)))
  pattern_HW = _stripes(size, rng) if kind == "stripes" else _dots(size, rng)
  other = np.clip(paper + rng.choice([-1, 1]) * rng.integers(12, 40), 0, 255)
  both = np.stack([paper, other]).astype(np.uint8)
  return Image.fromarray(both[pattern_HW.astype(np.uint8)])


def _paper(rng) -> np.ndarray:
  """A colour, light or dark: something stands out from either."""
  low, high = (190, 256) if rng.random() < 0.6 else (0, 80)
  return rng.integers(low, high, 3).astype(np.int16)


def _scaled(small, size, resampling) -> Image.Image:
  return Image.fromarray(np.uint8(small)).resize(size, resampling)


def _stripes(size, rng) -> np.ndarray:
  width, height = size
  step = int(rng.integers(8, 48))
  x, y = np.ogrid[:height, :width][::-1]
  # Upright, lying or slanted.
  way = (x, y, x + y)[int(rng.integers(3))]
  return np.broadcast_to(way // step % 2 == 0, (height, width))


def _dots(size, rng) -> np.ndarray:
  width, height = size
  step = int(rng.integers(12, 48))
  y, x = np.ogrid[:height, :width]
  x, y = x % step - step / 2, y % step - step / 2
  return x * x + y * y < (step * rng.uniform(0.1, 0.3)) ** 2


def luminance(colour) -> np.ndarray:
  """Relative luminance (WCAG 2.2) of sRGB in 0 to 255, `[..., 3]`."""
  value = np.asarray(colour, np.float64) / 255
  linear = np.where(
    value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4
  )
  return linear @ np.array([0.2126, 0.7152, 0.0722])


# By 8-bit value: powers of every pixel would take longer than drawing.
_LINEAR = luminance(np.repeat(np.arange(256)[:, None], 3, 1)).astype(np.float32)


def least_contrast(ink: Ink, behind: Image.Image) -> float:
  """Contrast (WCAG 2.2) of ink with that pixel that it stands out least from.

  Args:
    ink: colour of text.
    behind: RGB, what the text is on.
  """
  pixels = _LINEAR[np.asarray(behind)] @ np.float32([0.2126, 0.7152, 0.0722])
  own, low, high = float(luminance(ink)), float(pixels.min()), pixels.max()
  if own > high:
    return (own + 0.05) / (float(high) + 0.05)
  if own < low:
    return (low + 0.05) / (own + 0.05)
  return 1.0  # some pixel may be of the same lightness


def ink_for(behind: Image.Image, rng: np.random.Generator) -> Ink | None:
  """A colour that stands out from all of a picture; None if none does."""
  light = rng.integers(150, 256, (2, 3))
  dark = rng.integers(0, 110, (2, 3))
  plain = np.array([[255] * 3, [0] * 3])
  for colour in np.concatenate([light, dark, plain]):
    ink = tuple(int(v) for v in colour)
    if least_contrast(ink, behind) >= LEAST_CONTRAST:
      return ink
  return None
