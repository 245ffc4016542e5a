# SPDX-License-Identifier: Apache-2.0
"""What tables, comics, mock-ups and pages of documents say.

As in `template_data`: texts in reading order; what the typst file reads.
"""

from typing import Any

from data_pipelines.synthesis.template_data import PICTURES
from data_pipelines.synthesis.template_draft import EDGES, Draft
from data_pipelines.synthesis.words import MOST_TOKENS


def table(draft: Draft) -> dict[str, Any]:
  """A table: title, head, rows of words and numbers, perhaps sums."""
  width, height = draft.size
  size = draft.pixels(2, 4)
  columns = draft.count(2, max(2, min(6, int(width / (9 * size)))))
  rows = draft.count(3, max(3, min(14, int(0.7 * height / (2.6 * size)))))
  data = {
    "medium": size, "large": draft.pixels(4, 8), "small": draft.pixels(2, 3),
    "style": draft.count(0, 3), "zebra": draft.chance(0.5),
    "margin": draft.between(0.03, 0.08), "fill": draft.chance(0.6),
    "title": draft.heading(),
  }  # fmt: skip
  data["head"] = [draft.label("header", 2) for _ in range(columns)]
  words_first = [True, *(draft.chance(0.25) for _ in range(columns - 1))]
  data["words"] = words_first
  data["rows"] = []
  for _ in range(rows):
    data["rows"].append(
      [
        draft.label("cell", 2) if word else draft.figure("cell")
        for word in words_first
      ]
    )
  data["sums"] = draft.chance(0.4)
  if data["sums"]:
    data["rows"].append(
      [draft.label("cell", 1)]
      + [draft.figure("cell", 2) for _ in range(columns - 1)]
    )
  data["note"] = draft.passage("note", 8) if draft.chance(0.5) else -1
  return data


def comic(draft: Draft) -> dict[str, Any]:
  """Panels with people who speak in bubbles; read row by row."""
  width, height = draft.size
  rows = draft.count(1, 2) if width > height else draft.count(2, 3)
  size = draft.pixels(2.6, 4.6)
  data: dict[str, Any] = {
    "medium": size, "large": draft.pixels(5, 9), "gap": draft.between(0.8, 2),
    "title": draft.heading() if draft.chance(0.7) else -1, "panels": [],
  }  # fmt: skip
  for row in range(rows):
    across = draft.count(1, 3) if width > 0.8 * height else draft.count(1, 2)
    shares = [draft.between(0.8, 1.3) for _ in range(across)]
    for column, share in enumerate(shares):
      wide = width * share / sum(shares)
      data["panels"].append(
        _panel(draft, row, wide, height / rows, size)
        | {
          "x": round(sum(shares[:column]) / sum(shares), 4),
          "w": round(share / sum(shares), 4),
        }
      )
  data["rows"] = rows
  return data


def _panel(draft: Draft, row: int, width: float, height: float, size: float):
  """A panel: scene, up to two people, what they say, perhaps a caption."""
  people = draft.count(1, 2) if width > 0.7 * height else 1
  room = draft.room(0.75 * width / people, 0.22 * height, size)
  caption = -1
  if draft.chance(0.3):
    caption = draft.heading("narration", title=False)
  return {
    "row": row, "scene": draft.count(0, 3), "caption": caption,
    "first": draft.count(0, 40),
    "people": [
      {
        "says": draft.passage("speech", draft.between(0.3, 0.9) * room),
        "mood": draft.count(0, 2), "hair": draft.count(0, 3),
        "thinks": draft.chance(0.2), "skin": draft.count(0, 3),
      }
      for _ in range(people)
    ],
  }  # fmt: skip


def ui(draft: Draft) -> dict[str, Any]:
  """A mock-up: a phone, a window of a program, or a page in a browser."""
  width, height = draft.size
  variant = "phone" if height > 1.15 * width else (
    "window", "window", "site", "dialog"
  )[draft.count(0, 3)]  # fmt: skip
  size = draft.pixels(2.1, 3.4)
  data: dict[str, Any] = {
    "variant": variant, "medium": size, "large": draft.pixels(4, 7),
    "small": draft.pixels(1.8, 2.6), "round": draft.between(0.5, 3),
    "picture": draft.count(0, PICTURES - 1), "first": draft.count(0, 40),
    "title": draft.heading(),
  }  # fmt: skip
  entries = {"window": 5, "site": 4}.get(variant, 0)
  data["menu"] = [draft.label("menu item", 1) for _ in range(entries)]
  if variant == "window":
    data["side"] = [
      draft.label("navigation item") for _ in range(draft.count(4, 6))
    ]
  if variant in ("site", "dialog"):
    data["headline"] = draft.heading("heading")
    data["body"] = draft.passage("body", draft.between(10, 30))
    data["buttons"] = [draft.label("button", 1) for _ in range(2)]
  if variant in ("phone", "site"):
    data["items"] = [
      (draft.label("heading"), draft.passage("body", 8))
      for _ in range(draft.count(3, 5) if variant == "phone" else 3)
    ]
  if variant in ("window", "dialog"):
    data["fields"] = [
      (draft.label("label"), draft.label("field"))
      for _ in range(draft.count(2, 4))
    ]
    data["ticks"] = [
      (draft.label("option"), draft.chance(0.5)) for _ in range(2)
    ]
  if variant in ("phone", "window"):
    data["buttons"] = [
      draft.label("button", 1) for _ in range(1 if variant == "phone" else 2)
    ]
  if variant == "phone":
    data["tabs"] = [draft.label("tab", 1) for _ in range(4)]
  return data


def document(draft: Draft) -> dict[str, Any]:
  """A page: heading, paragraphs under headings, up to about 1 K tokens."""
  width, height = draft.size
  edges = sum(EDGES[draft.language.script])
  _, per_token = draft.sampled()
  margin = draft.between(0.05, 0.1)
  area = 0.78 * width * height * (1 - 2 * margin)
  # The smallest letters with which the most tokens still fill the page.
  least = (area / (MOST_TOKENS * per_token * edges)) ** 0.5
  size = max(draft.pixels(1.3, 3.2), least)
  columns = draft.count(1, 3) if width / size > 50 else draft.count(1, 2)
  if width / size < 24:
    columns = 1
  data: dict[str, Any] = {
    "medium": round(size, 2), "large": round(size * draft.between(1.6, 3), 2),
    "columns": columns, "margin": margin,
    "style": ("article", "newspaper", "letter")[draft.count(0, 2)],
    "justify": draft.language.spaces and draft.chance(0.5),
    "indent": draft.chance(0.3), "rule": draft.chance(0.5),
    "title": draft.heading(),
    "below": draft.passage("subtitle", 10),
  }  # fmt: skip
  left = min(MOST_TOKENS - 40, area / (size * size * per_token * edges))
  left *= draft.between(0.6, 0.9)
  data["body"] = []
  while left > 0:
    if draft.chance(0.25) and left > 40:
      data["body"].append((draft.heading("heading"), "heading"))
      left -= 12 * columns
    tokens = min(left, draft.between(0.15, 0.5) * left + 25)
    kind = "point" if draft.chance(0.15) else "paragraph"
    data["body"].append((draft.passage("paragraph", tokens), kind))
    left -= tokens + 0.5 * width / columns / size / per_token
  data["foot"] = draft.heading("footer", title=False)
  data["number"] = draft.figure("page number")
  return data
