# SPDX-License-Identifier: Apache-2.0
"""Random colours for a template, of which every pair used for text is legible.

Ranges are ours; contrast is that of WCAG 2.2 (relative luminance, ratio).
"""

import colorsys

import numpy as np

Colour = tuple[float, float, float]
# WCAG's for text of any size (AA), and for large letters.
SMALL, LARGE = 4.5, 3.0


def luminance(colour: Colour) -> float:
  """WCAG's relative luminance of sRGB in [0, 1]."""
  r, g, b = (
    v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour
  )
  return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: Colour, b: Colour) -> float:
  """WCAG's ratio of two colours, 1 to 21."""
  low, high = sorted((luminance(a), luminance(b)))
  return (high + 0.05) / (low + 0.05)


def readable(colour: Colour, grounds: tuple[Colour, ...], ratio: float):
  """The colour of the same hue, moved in lightness until it stands out.

  Args:
    colour: sRGB in [0, 1].
    grounds: what it must be read on.
    ratio: least contrast with each of them.

  Returns:
    The nearest such colour of 101 lightnesses; black or white, whichever is
    better, if the grounds allow none.
  """
  hue, light, saturation = colorsys.rgb_to_hls(*colour)
  tried = [
    colorsys.hls_to_rgb(hue, i / 100, saturation)
    for i in sorted(range(101), key=lambda i: abs(i / 100 - light))
  ]
  tried += [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]
  for one in tried:
    if min(contrast(one, ground) for ground in grounds) >= ratio:
      return one
  return max(
    tried[-2:], key=lambda c: min(contrast(c, ground) for ground in grounds)
  )


def palette(rng: np.random.Generator) -> dict[str, str]:
  """Colours as '#rrggbb'.

  `paper` and `panel` are grounds for `ink`, `soft` (small text) and `strong`
  (titles); `accent` and `second` carry `on_accent` and `on_second`; `line` and
  the `tint`s are for shapes without text.
  """
  hue = float(rng.random())
  turn = float(rng.choice([0.08, 0.33, 0.5, 0.58, 0.92]))
  dark = rng.random() < 0.35
  grey = float(rng.uniform(0.05, 0.6))

  def tone(h, low, high, saturation):
    light = float(rng.uniform(low, high))
    return colorsys.hls_to_rgb(h % 1, 1 - light if dark else light, saturation)

  paper = tone(hue, 0.94, 1.0, grey)
  panel = tone(hue, 0.86, 0.92, grey)
  grounds = (paper, panel)
  accent = colorsys.hls_to_rgb(
    (hue + turn) % 1, float(rng.uniform(0.3, 0.6)), float(rng.uniform(0.45, 1))
  )
  second = colorsys.hls_to_rgb(
    (hue + 2 * turn) % 1, float(rng.uniform(0.35, 0.7)), 0.6
  )
  strong = readable(accent if rng.random() < 0.5 else paper, grounds, LARGE)
  colours = {
    "paper": paper,
    "panel": panel,
    "ink": readable(tone(hue, 0.05, 0.2, grey / 2), grounds, SMALL),
    "soft": readable(tone(hue, 0.3, 0.42, grey / 2), grounds, SMALL),
    "strong": strong,
    "accent": accent,
    "on_accent": readable(_far(accent), (accent,), SMALL),
    "second": second,
    "on_second": readable(_far(second), (second,), SMALL),
    "line": tone(hue, 0.7, 0.8, grey / 2),
    "tint1": tone(hue + turn, 0.6, 0.75, 0.7),
    "tint2": tone(hue + 2 * turn, 0.65, 0.8, 0.7),
  }
  return {name: as_hex(colour) for name, colour in colours.items()}


def _far(colour: Colour) -> Colour:
  """Nearly white or nearly black, whichever is farther."""
  return (0.98,) * 3 if luminance(colour) < 0.3 else (0.06,) * 3


def as_hex(colour: Colour) -> str:
  """'#rrggbb'."""
  return "#" + "".join(f"{round(255 * v):02x}" for v in colour)
