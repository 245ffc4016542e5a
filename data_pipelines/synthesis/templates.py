# SPDX-License-Identifier: Apache-2.0
"""Strategy 3: slides, posters, pages and more, set by a real layout engine.

typst (`template_engine`) sets what `template_data` and `template_pages` fill
in. Shares, sizes and wording are ours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.synthesis import (
  captions,
  template_data,
  template_engine,
  template_pages,
)
from data_pipelines.synthesis.fonts import Face
from data_pipelines.synthesis.languages import Language
from data_pipelines.synthesis.sample import (
  Rejected,
  Sample,
  TextBlock,
  layout_of,
  polygon_of,
  text_of,
)
from data_pipelines.synthesis.template_draft import EDGES, Draft
from data_pipelines.synthesis.template_palette import palette

KINDS = {
  "slide": template_data.slide,
  "poster": template_data.poster,
  "infographic": template_data.infographic,
  "comic": template_pages.comic,
  "table": template_pages.table,
  "ui": template_pages.ui,
  "document": template_pages.document,
}
VERTICAL = "templates have no vertical text"
NO_FACE = "no font that the layout engine knows"
# By kind and variant; {} is light or dark.
_SCENES = {
  "slide points": (
    "A {} presentation slide with bullet points", "一张{}的要点幻灯片",
  ),
  "slide cards": (
    "A {} presentation slide with text cards", "一张{}的卡片式幻灯片",
  ),
  "slide cover": (
    "The cover slide of a presentation", "一张演示文稿的封面幻灯片",
  ),
  "slide statement": (
    "A {} presentation slide with one large number",
    "一张{}的、以大号数字为主的幻灯片",
  ),
  "poster": ("A {} poster with abstract shapes", "一张{}的抽象图案海报"),
  "infographic bars": (
    "A {} infographic with a horizontal bar chart", "一张{}的条形图信息图",
  ),
  "infographic columns": (
    "A {} infographic with a column chart", "一张{}的柱状图信息图",
  ),
  "infographic steps": (
    "A {} infographic of steps along a line", "一张{}的步骤信息图",
  ),
  "infographic facts": (
    "A {} infographic with tiles of numbers", "一张{}的数字方块信息图",
  ),
  "comic": ("A comic page with speech bubbles", "一页带对话框的漫画"),
  "table": ("A {} table", "一张{}的表格"),
  "ui phone": ("A {} phone app screen", "一个{}的手机应用界面"),
  "ui window": ("A {} desktop program window", "一个{}的桌面软件窗口"),
  "ui site": ("A {} web page", "一个{}的网页"),
  "ui dialog": ("A {} dialog over a colourful picture", "一个{}的对话框"),
  "document article": ("A {} page of an article", "一页{}的文章"),
  "document newspaper": ("A {} newspaper page", "一页{}的报纸"),
  "document letter": ("A {} page of a report", "一页{}的报告"),
}  # fmt: skip


def draw(
  language: Language, faces: Sequence[Face], size: tuple[int, int],
  rng: np.random.Generator, texts: Sequence[str] = (),
) -> Sample | Rejected:  # fmt: skip
  """One sample of a random template.

  Args:
    language: of the text.
    faces: to choose two from: of titles and of the rest.
    size: (width, height).
    rng: decides everything else.
    texts: of the user, for sentences; none: random words. Headings, labels and
      numbers are always random.
  """
  kind = str(rng.choice(list(KINDS)))
  return draw_kind(kind, language, faces, size, rng, texts)


def draw_kind(
  kind: str, language: Language, faces: Sequence[Face], size: tuple[int, int],
  rng: np.random.Generator, texts: Sequence[str] = (),
) -> Sample | Rejected:  # fmt: skip
  """As `draw`, of one of `KINDS`."""
  if language.direction == "ttb":
    return Rejected(VERTICAL)
  known = template_engine.usable(tuple(faces))
  if not known:
    return Rejected(NO_FACE)
  data, draft = drafted(kind, language, known, size, rng, texts)
  if draft.refused:
    return Rejected(draft.refused)
  page = template_engine.typeset(kind, data, draft.texts, language, known)
  if isinstance(page, str):
    return Rejected(page)
  blocks = [
    TextBlock(
      text.role,
      tuple((line.text, polygon_of(line.box)) for line in lines),
      text.text,
    )
    for text, lines in zip(draft.texts, page.lines)
  ]
  english, chinese = _scene(kind, data)
  layout = layout_of(
    "template", language, size, [text.face for text in draft.texts], blocks,
    english,
  )  # fmt: skip
  caption = captions.of(layout, english, chinese, language, rng)
  label = f"text-template-{language.code}"
  return Sample(page.image, text_of(layout), caption, label, layout)


def drafted(
  kind: str, language: Language, faces: tuple[Face, ...],
  size: tuple[int, int], rng: np.random.Generator, texts: Sequence[str] = (),
) -> tuple[dict[str, Any], Draft]:  # fmt: skip
  """What the typst file of a kind reads, and the texts that it sets."""
  face, title_face = (faces[int(i)] for i in rng.integers(0, len(faces), 2))
  draft = Draft(language, face, title_face, size, rng, tuple(texts))
  filled = KINDS[kind](draft)
  # typst would break Korean and Thai within words.
  boxed = language.spaces or language.code == "th"
  data = {
    "w": size[0], "h": size[1], "lang": language.tag.split("-")[0],
    "rtl": language.direction == "rtl", "smallest": language.smallest,
    "edges": EDGES[language.script], "hidden": [],
    "boxed": boxed and language.direction == "ltr",
    "palette": palette(rng), "noise": [round(v, 3) for v in rng.random(64)],
    **filled,
  }  # fmt: skip
  return data, draft


def _scene(kind: str, data: dict[str, Any]) -> tuple[str, str]:
  """What the picture is, in English and in Chinese."""
  variant = data.get("variant", data.get("style"))
  english, chinese = _SCENES.get(f"{kind} {variant}") or _SCENES[kind]
  red, green, blue = bytes.fromhex(data["palette"]["paper"][1:])
  dark = red + green + blue < 3 * 128
  return (
    english.format("dark" if dark else "light"),
    chinese.format("深色" if dark else "浅色"),
  )
