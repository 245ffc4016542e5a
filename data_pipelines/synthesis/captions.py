# SPDX-License-Identifier: Apache-2.0
"""Captions from layouts: what the picture is, and its exact text with places.

Every text is quoted whole, before it was broken into lines: a caption that
left some out would teach a model to invent text. Half of the captions of
Chinese text are in Chinese.
"""

import itertools
from typing import Any

import numpy as np

from data_pipelines.synthesis.languages import Language

_CHINESE_SHARE = 0.5
_ENGLISH_QUOTES = ('""', "“”", "«»", "「」")
_CHINESE_QUOTES = ("“”", "「」", "『』", '""')
# Of roles that do not go by their own name; singular, plural.
_ENGLISH_NAMES = {
  "body": ("text", "texts"),
  "speech": ("speech bubble", "speech bubbles"),
  "": ("text", "texts"),
}
_CHINESE_NAMES = {
  "title": "标题", "heading": "小标题", "subtitle": "副标题", "body": "正文",
  "cell": "单元格", "label": "标签", "caption": "说明", "button": "按钮",
  "header": "表头", "footer": "页脚", "number": "数字", "quote": "引文",
  "paragraph": "段落", "value": "数值", "note": "注释", "option": "选项",
  "field": "输入框", "page number": "页码", "tagline": "标语", "item": "条目",
  "speech": "对白", "narration": "旁白", "menu item": "菜单项",
  "navigation item": "导航项", "tab": "标签页",
}  # fmt: skip
_ROWS = (("at the top", "上方"), ("", ""), ("at the bottom", "下方"))
_COLUMNS = (("on the left", "左侧"), ("", ""), ("on the right", "右侧"))
_MIDDLE = ("in the middle", "中间")


def of(
  layout: dict[str, Any], english: str, chinese: str, language: Language,
  rng: np.random.Generator,
) -> str:  # fmt: skip
  """A caption for a sample.

  Args:
    layout: see `sample.layout_of`.
    english: what the picture is, as a noun phrase: 'A red shop sign on a
      wall'.
    chinese: the same in Chinese.
    language: of the text.
    rng: decides whether it is in Chinese, and whether places are told.
  """
  in_chinese = language.script == "Hans" and rng.random() < _CHINESE_SHARE
  with_places = len(layout["blocks"]) <= 4 and rng.random() < 0.7
  say = _chinese if in_chinese else _english
  return say(layout, chinese if in_chinese else english, language, with_places)


def place_of(layout: dict[str, Any], number: int) -> tuple[str, str]:
  """Where a block is, in English and in Chinese.

  Its middle is looked up in a grid of 3 x 3; what reaches from edge to edge is
  in the middle.
  """
  corners = [
    corner
    for i in layout["blocks"][number]["lines"]
    for corner in layout["lines"][i]["polygon"]
  ]
  column, row = (
    min(2, max(0, int(3 * (min(values) + max(values)) / 2 / extent)))
    for values, extent in zip(zip(*corners), layout["size"])
  )
  english = " ".join(filter(None, (_ROWS[row][0], _COLUMNS[column][0])))
  chinese = _COLUMNS[column][1] + _ROWS[row][1]
  return english or _MIDDLE[0], chinese or _MIDDLE[1]


def _groups(layout: dict[str, Any]) -> list[tuple[str, list[int]]]:
  """Runs of blocks with one role, as (role, numbers)."""
  numbered = enumerate(layout["blocks"])
  return [
    (role, [number for number, _ in run])
    for role, run in itertools.groupby(numbered, lambda pair: pair[1]["role"])
  ]


def _quotes(layout: dict[str, Any], choices: tuple[str, ...]) -> str:
  """The first pair of quotation marks that no text has; else the first."""
  used = set("".join(block["text"] for block in layout["blocks"]))
  return next((pair for pair in choices if not used & set(pair)), choices[0])


def _quoted(layout, numbers: list[int], quotes: str, between: str) -> str:
  texts = (layout["blocks"][number]["text"] for number in numbers)
  return between.join(f"{quotes[0]}{text}{quotes[1]}" for text in texts)


def _english(layout, scene: str, language: Language, with_places: bool) -> str:
  quotes = _quotes(layout, _ENGLISH_QUOTES)
  manner = "" if language.code == "en" else f" in {language.name}"
  columns = language.direction == "ttb"
  written = ", in vertical columns from right to left" if columns else ""
  if len(layout["blocks"]) == 1:
    place = f" {place_of(layout, 0)[0]}" if with_places else ""
    text = _quoted(layout, [0], quotes, "")
    comma = "," if written else ""
    which = f"{manner}{place}{written}{comma}"
    return f"{scene}, with text{which} that reads {text}."
  language_told = f", with text{manner}{written}" if manner else ""
  sentences = [f"{scene}{language_told}."]
  for role, numbers in _groups(layout):
    one, many = _ENGLISH_NAMES.get(role, (role, f"{role}s"))
    text = _quoted(layout, numbers, quotes, ", ")
    if len(numbers) > 1:
      sentences.append(f"The {many} read {text}.")
      continue
    place = f" {place_of(layout, numbers[0])[0]}" if with_places else ""
    sentences.append(f"The {one}{place} reads {text}.")
  return " ".join(sentences)


def _chinese(layout, scene: str, language: Language, with_places: bool) -> str:
  quotes = _quotes(layout, _CHINESE_QUOTES)
  manner = "，文字从右到左竖排" if language.direction == "ttb" else ""
  if len(layout["blocks"]) == 1:
    place = place_of(layout, 0)[1] if with_places else "上面"
    return f"{scene}{manner}，{place}写着{_quoted(layout, [0], quotes, '')}。"
  parts = [f"{scene}{manner}。"]
  for role, numbers in _groups(layout):
    name = _CHINESE_NAMES.get(role, "文字")
    place = ""
    if with_places and len(numbers) == 1:
      place = f"{place_of(layout, numbers[0])[1]}的"
    text = _quoted(layout, numbers, quotes, "、")
    verb = "依次是" if len(numbers) > 1 else "是"
    parts.append(f"{place}{name}{verb}{text}。")
  return "".join(parts)
