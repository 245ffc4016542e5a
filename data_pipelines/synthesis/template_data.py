# SPDX-License-Identifier: Apache-2.0
"""What slides, posters and infographics say, and how they look.

Each function adds its texts to a draft in reading order and returns what the
typst file of the same name reads.
"""

from typing import Any

from data_pipelines.synthesis.template_draft import Draft

PICTURES = 7


def slide(draft: Draft) -> dict[str, Any]:
  """A slide: points, cards, a cover, or one statement."""
  width, height = draft.size
  variants = ("points", "points", "cards", "cover", "statement")
  variant = variants[draft.count(0, 4)]
  data = {
    "variant": variant, "margin": draft.between(0.04, 0.09),
    "large": draft.pixels(6, 11), "medium": draft.pixels(2, 6),
    "small": draft.pixels(2, 2.8), "round": draft.between(0, 4),
    "head": draft.count(0, 2), "picture": draft.count(0, PICTURES - 1),
  }  # fmt: skip
  size = data["medium"]
  if variant == "statement":
    data["number"] = draft.figure("number", 2, title=True)
    data["title"] = draft.heading()
    data["below"] = draft.passage("subtitle", 16)
    return data
  data["title"] = draft.heading()
  if variant == "cover":
    data["below"] = draft.passage("subtitle", 14)
    return data | {"split": width > 0.9 * height}
  if variant == "points":
    if draft.chance(0.4) or width < 0.8 * height:
      data["picture"] = -1
    inner = (1 - 2 * data["margin"]) * width
    inner *= 0.57 if data["picture"] >= 0 else 0.95
    points = draft.count(3, 6)
    room = draft.room(inner, 0.55 * height, size) / points
    data["points"] = [
      draft.passage("item", draft.between(0.3, 0.85) * room)
      for _ in range(points)
    ]
    data |= {"mark": draft.count(0, 2), "middle": draft.chance(0.3)}
  else:
    columns = draft.count(2, 3) if width > 0.9 * height else 2
    inner = 0.8 * width / columns
    room = draft.room(inner, 0.35 * height, size)
    data["cards"] = [
      (
        draft.label("heading"),
        draft.passage("body", draft.between(0.4, 0.85) * room),
      )
      for _ in range(columns)
    ]
  data["footer"] = draft.heading("footer", title=False)
  data["number"] = draft.figure("page number")
  return data


def poster(draft: Draft) -> dict[str, Any]:
  """A poster of an event: picture, large title, when and where."""
  data = {
    "variant": ("top", "bottom", "framed", "side")[draft.count(0, 3)],
    "picture": draft.count(0, PICTURES - 1), "large": draft.pixels(10, 20),
    "medium": draft.pixels(3, 6), "small": draft.pixels(2, 4),
    "round": draft.between(0, 5), "middle": draft.chance(0.5),
    "first": draft.count(0, 30),
  }  # fmt: skip
  data["above"] = draft.label("tagline")
  data["title"] = draft.heading()
  data["below"] = draft.passage("subtitle", 14)
  data["facts"] = [
    (draft.figure("number", 2, title=True), draft.label("label"))
    for _ in range(draft.count(2, 3))
  ]
  data["button"] = draft.label("button") if draft.chance(0.6) else -1
  data["last"] = draft.passage("note", 10)
  return data


def infographic(draft: Draft) -> dict[str, Any]:
  """Numbers as bars or columns, steps in order, or a grid of facts."""
  variant = ("bars", "columns", "steps", "facts")[draft.count(0, 3)]
  width, height = draft.size
  data = {
    "variant": variant, "large": draft.pixels(5, 9),
    "medium": draft.pixels(2.2, 4.5), "small": draft.pixels(2, 3),
    "round": draft.between(0, 3), "banner": draft.chance(0.5),
    "title": draft.heading(),
    "below": draft.passage("subtitle", 12),
  }  # fmt: skip
  if variant in ("bars", "columns"):
    count = draft.count(3, 7 if variant == "bars" else 5)
    values = [draft.figures(2, 3) for _ in range(count)]
    if draft.chance(0.4):
      values.sort(key=int, reverse=True)
    # int() reads the figures of every script.
    most = max(map(int, values))
    data["rows"] = [
      (
        draft.label("label", 1),
        draft.add("value", value),
        round(int(value) / most, 3),
      )
      for value in values
    ]
  elif variant == "steps":
    count = draft.count(3, 5 if height > width else 4)
    room = draft.room(0.7 * width, 0.6 * height / count, data["medium"])
    data["rows"] = [
      (
        draft.label("heading"),
        draft.passage("body", draft.between(0.25, 0.6) * room),
      )
      for _ in range(count)
    ]
  else:
    room = draft.room(0.4 * width, 0.12 * height, data["medium"])
    data["rows"] = [
      (
        draft.figure("number", 2, title=True),
        draft.label("heading"),
        draft.passage("body", draft.between(0.3, 0.8) * room),
      )
      for _ in range(4 if width > 0.8 * height else 6)
    ]
  data["note"] = draft.passage("note", 8)
  return data
