# SPDX-License-Identifier: Apache-2.0
"""The flat faces that carry text, before it is written: paper, boards, screens.

Pictures are float32 `[H, W, 4]` in [0, 1] with alpha. Decoration keeps clear
of the regions that `objects` reserves for text. All colours are ours.
"""

import dataclasses

import cv2
import numpy as np

from data_pipelines.synthesis import surfaces

Colour = tuple[float, float, float]

# Any light colour and any dark one have a contrast (WCAG) above 5.
_LIGHT = {
  (250, 247, 240): ("white", "白色"), (244, 238, 222): ("cream", "米色"),
  (255, 255, 255): ("white", "白色"), (230, 236, 246): ("pale blue", "浅蓝色"),
  (250, 226, 120): ("yellow", "黄色"),
  (222, 238, 222): ("pale green", "浅绿色"),
  (250, 220, 212): ("pale pink", "浅粉色"),
}  # fmt: skip
_DARK = {
  (28, 66, 120): ("dark blue", "深蓝色"),
  (20, 84, 62): ("dark green", "深绿色"),
  (134, 30, 34): ("dark red", "深红色"), (40, 40, 46): ("black", "黑色"),
  (84, 42, 96): ("purple", "紫色"), (116, 58, 18): ("brown", "棕色"),
  (16, 84, 104): ("teal", "青色"), (58, 46, 40): ("dark brown", "深棕色"),
}  # fmt: skip
_ACCENT = (
  (214, 72, 52), (36, 110, 178), (46, 138, 88), (226, 160, 40), (130, 76, 150),
  (30, 140, 150),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Palette:
  """Colours that belong together, sRGB in [0, 1].

  Attributes:
    paper: under the text.
    ink: of the text.
    accent: of stripes, frames and the like.
    name: of the paper's colour, in English and in Chinese.
  """

  paper: Colour
  ink: Colour
  accent: Colour
  name: tuple[str, str]


def palette(rng: np.random.Generator, tone: str) -> Palette:
  """Random colours.

  Args:
    rng: decides.
    tone: of the paper: 'light', 'dark' or 'any'.
  """
  dark = tone == "dark" or (tone == "any" and rng.random() < 0.5)
  (light, pale), (deep, full) = (_named(rng, c) for c in (_LIGHT, _DARK))
  paper, ink = (deep, light) if dark else (light, deep)
  return Palette(paper, ink, _choose(rng, _ACCENT), full if dark else pale)


def _named(rng, colours) -> tuple[Colour, tuple[str, str]]:
  kind = list(colours)[int(rng.integers(len(colours)))]
  return _choose(rng, (kind,)), colours[kind]


def _choose(rng, colours) -> Colour:
  chosen = np.asarray(colours[int(rng.integers(len(colours)))], float)
  drawn = np.clip(chosen + rng.uniform(-10, 10, 3), 0, 255) / 255
  return tuple(float(v) for v in drawn)


def paint(
  style: str, size: tuple[int, int], colours: Palette, rng: np.random.Generator
) -> np.ndarray:
  """A face without its text.

  Args:
    style: of `STYLES`.
    size: (width, height) in texels.
    colours: of the face.
    rng: decides the grain and the kind of decoration.
  """
  rgb = STYLES[style](size, colours, rng)
  return np.concatenate([rgb, np.ones((*rgb.shape[:2], 1), np.float32)], -1)


def rounded(face_HW4: np.ndarray, radius: float) -> np.ndarray:
  """The face with round corners; `radius` is a part of the shorter side."""
  height, width = face_HW4.shape[:2]
  r = radius * min(width, height)
  x = np.abs(np.arange(width) + 0.5 - width / 2)[None] - (width / 2 - r)
  y = np.abs(np.arange(height) + 0.5 - height / 2)[:, None] - (height / 2 - r)
  far = np.hypot(np.maximum(x, 0), np.maximum(y, 0)) - r
  out = face_HW4.copy()
  out[..., 3] *= np.clip(0.5 - far, 0, 1)
  return out


def _sheet(size, colour, rng, grain=0.02) -> np.ndarray:
  return surfaces.paper(rng, (size[1], size[0]), colour, grain)


def _frame(rgb, colour, inset: float, thick: float) -> None:
  """A rectangular line, `inset` and `thick` in parts of the shorter side."""
  height, width = rgb.shape[:2]
  a = round(inset * min(width, height))
  line = max(1, round(thick * min(width, height)))
  low, high = (a, a), (width - 1 - a, height - 1 - a)
  cv2.rectangle(rgb, low, high, colour, line, cv2.LINE_AA)


def _board(size, colours: Palette, rng) -> np.ndarray:
  """Painted metal or wood, with a line along its edge and bolts."""
  rgb = _sheet(size, colours.paper, rng, 0.015)
  if rng.random() < 0.7:
    _frame(rgb, colours.ink, 0.045, 0.018)
  if rng.random() < 0.4:
    _frame(rgb, colours.accent, 0.01, 0.03)
  return rgb


def _paper(size, colours: Palette, rng) -> np.ndarray:
  """A sheet; some have a band of colour along the top or bottom."""
  rgb = _sheet(size, colours.paper, rng)
  height = size[1]
  band = round(0.05 * height)
  if rng.random() < 0.5:
    rgb[:band] = colours.accent
  if rng.random() < 0.5:
    rgb[height - band :] = colours.accent
  return rgb


def _cover(size, colours: Palette, rng) -> np.ndarray:
  """A book's front: board or cloth, a groove along the spine, a frame."""
  width, height = size
  if rng.random() < 0.4:
    rgb = surfaces.cloth(rng, (height, width), colours.paper)
  else:
    rgb = _sheet(size, colours.paper, rng)
  x = (np.arange(width, dtype=np.float32) + 0.5) / width
  groove = 0.22 * np.exp(-np.square((x - 0.045) / 0.01))
  rgb *= (1 - groove)[None, :, None]
  bands = int(rng.integers(3))
  if bands:  # above and below the name of the author
    top = round(0.79 * height)
    rgb[top : top + max(1, height // 90), round(0.1 * width) :] = colours.accent
  if bands == 2:
    rgb[: round(0.05 * height), round(0.07 * width) :] = colours.accent
  return rgb


def _label(size, colours: Palette, rng) -> np.ndarray:
  """Printed cardboard: stripes above and below."""
  rgb = _sheet(size, colours.paper, rng, 0.012)
  height = size[1]
  for at in (0.03, 0.93):
    rgb[round(at * height) : round((at + 0.04) * height)] = colours.accent
  return rgb


def _print(size, colours: Palette, rng) -> np.ndarray:
  """Plain glaze, for a print on crockery."""
  return _sheet(size, colours.paper, rng, 0.008)


def _screen(size, colours: Palette, rng) -> np.ndarray:
  """A window on a display: a bar with three buttons, and a plain page."""
  width, height = size
  rgb = np.empty((height, width, 3), np.float32)
  fall = np.linspace(1.0, 0.96, height, dtype=np.float32)
  rgb[:] = np.asarray(colours.paper, np.float32) * fall[:, None, None]
  bar = round(0.08 * height)
  rgb[:bar] = colours.accent
  for i, shade in enumerate((0.95, 0.8, 0.65)):
    middle = (round((0.6 + 0.7 * i) * bar) + bar // 4, bar // 2)
    cv2.circle(rgb, middle, max(1, bar // 5), (shade,) * 3, -1, cv2.LINE_AA)
  return rgb


def _chalk(size, colours: Palette, rng) -> np.ndarray:
  """A blackboard with traces of the sponge, in a wooden frame."""
  width, height = size
  smear = surfaces.noise(rng, (height, width), (4, 2), 4)
  rgb = surfaces.tinted((0.13, 0.17, 0.16), 0.35 * smear)
  wood = surfaces.tinted(
    (0.55, 0.38, 0.24), 0.25 * surfaces.noise(rng, (height, width), (30, 4))
  )
  edge = max(2, round(0.045 * min(size)))
  inner = rgb[edge:-edge, edge:-edge].copy()
  rgb = wood
  rgb[edge:-edge, edge:-edge] = inner
  return rgb


def _banner(size, colours: Palette, rng) -> np.ndarray:
  """Cloth that hangs in soft folds, with a hem."""
  width, height = size
  rgb = surfaces.cloth(rng, (height, width), colours.paper)
  x = np.arange(width, dtype=np.float32) / width
  folds = np.sin(2 * np.pi * (rng.uniform(2, 4) * x + rng.uniform()))
  folds += 0.6 * np.sin(2 * np.pi * (rng.uniform(4, 8) * x + rng.uniform()))
  rgb *= (1 + 0.045 * folds)[None, :, None]
  if rng.random() < 0.6:
    _frame(rgb, colours.accent, 0.02, 0.03)
  return np.clip(rgb, 0, 1)


def _lined(size, colours: Palette, rng) -> np.ndarray:
  """A ruled page with a margin, pale enough to write on."""
  rgb = _sheet(size, colours.paper, rng, 0.012)
  width, height = size
  rule = 0.8 * np.asarray(colours.paper) + 0.2 * np.array((0.35, 0.55, 0.85))
  step = max(6, round(0.055 * height))
  for y in range(2 * step, height, step):
    rgb[y : y + max(1, height // 400)] = rule
  x = round(0.1 * width)
  rgb[:, x : x + max(1, width // 300)] = (0.9, 0.6, 0.6)
  return rgb


STYLES = {
  "board": _board, "paper": _paper, "cover": _cover, "label": _label,
  "print": _print, "screen": _screen, "chalk": _chalk, "banner": _banner,
  "lined": _lined,
}  # fmt: skip
