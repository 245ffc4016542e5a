# SPDX-License-Identifier: Apache-2.0
"""Every word, colour and kind that the shapes-and-glyphs task knows."""

# Believable names first, then distance: every pair, background included, is
# at least 50 apart in CIELAB, and no colour's blend with the background (an
# anti-aliased or blurred edge) comes nearest to a third colour.
COLOURS = {
  "red": (228, 22, 58),
  "green": (25, 145, 65),
  "blue": (22, 100, 215),
  "yellow": (245, 225, 10),
  "purple": (158, 22, 158),
  "orange": (248, 138, 15),
}
BACKGROUND = (250, 250, 250)

SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {
  "circle": "circles",
  "square": "squares",
  "triangle": "triangles",
  "cross": "crosses",
}

# Quadrant centres as (x, y) fractions of the canvas.
PLACES = {
  "top left": (0.27, 0.27),
  "top right": (0.73, 0.27),
  "bottom left": (0.27, 0.73),
  "bottom right": (0.73, 0.73),
}

NUMBERS = ("one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
GLYPHS = LETTERS + DIGITS

# No M and no W: they are half as wide again as the other letters, which would
# shrink every word; the `glyph` kind has them.
WORDS = (
  *("CAT", "DOG", "SUN", "SKY", "HAT", "BOX"),
  *("KEY", "CUP", "FOX", "JAR", "ZOO", "BEE"),
  *("FISH", "BIRD", "TREE", "STAR", "LEAF", "LION"),
  *("FROG", "RAIN", "VASE", "QUIZ", "DUCK", "BOOK"),
)

T2I_KINDS = ("single", "position", "counting", "relation", "glyph", "word")
EDIT_KINDS = ("recolour", "remove", "add", "move", "replace", "retext")


def article(colour: str) -> str:
  """Returns 'a' or 'an' as English wants before `colour`."""
  return "an" if colour[0] in "aeiou" else "a"


def place_of(x: float, y: float) -> str:
  """Names the quadrant that holds the point (fractions of the canvas)."""
  return f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
