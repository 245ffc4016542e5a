# SPDX-License-Identifier: Apache-2.0
"""The prompts, written by us, one function per kind of caption.

A prompt is in English whatever language it asks for; vision-language models
follow that best. `prompt_id` names the wording, so that captions of an older
one can be told apart.
"""

import hashlib
from collections.abc import Sequence

from data_pipelines.caption.kinds import CATEGORIES, LANGUAGES, WORDS, Wish

_PLAIN = (
  "Answer with the caption alone: no title, no preamble, no list, no Markdown."
)
_QUOTES = (
  "Copy text that can be read in the image exactly as it is written, in its "
  "own language and inside double quotes; never translate, correct or "
  "complete it."
)
# What matters in images of dense text, by category.
_READING = {
  "photo": "Say on which object each piece of text stands, and in what style.",
  "illustration": (
    "Say where each piece of text stands in the picture, and in what style."
  ),
  "slide": (
    "It is a presentation slide. Go from the title through the blocks in "
    "reading order; name columns, bullets and their levels, tables, charts and "
    "icons, and what each picture is for."
  ),
  "poster": (
    "It is a poster or advertisement. Give the headline first, then the other "
    "lines by size; describe the typefaces, colours, the main picture, and how "
    "text and picture are placed."
  ),
  "comic": (
    "It is a comic. Go panel by panel in reading order; for each name the "
    "scene, the characters, who says or thinks what, and the sound words."
  ),
  "educational": (
    "It is teaching material. Give the topic, then every label with the part "
    "that it points to, the formulas and symbols, and the steps in order."
  ),
  "document": (
    "It is a page of text. Give headings, paragraphs, tables and captions in "
    "reading order, with their columns and margins."
  ),
  "interface": (
    "It is a user interface. Go through its areas from top to bottom; for each "
    "name the controls, their labels and states, and what is selected."
  ),
  "chart": (
    "It is a chart. Give its type, title, axes with units and ticks, the "
    "legend, and the series with the values that can be read."
  ),
  "diagram": (
    "It is a diagram. Give every node with its label and shape, and every "
    "arrow with its direction and label."
  ),
}
_SCHEMA = (
  '{"type": "what it is, such as flowchart", "summary": "one sentence", '
  '"entities": [{"id": "e1", "name": "label or name", "attributes": {"shape": '
  '"...", "color": "...", "position": "...", "text": "..."}}], "relations": '
  '[{"subject": "e1", "predicate": "what connects them", "object": "e2"}]}'
)


def build(wish: Wish, context: str = "", images: int = 1) -> str:
  """The prompt for one caption.

  Args:
    wish: what to ask for.
    context: what is known about the image, for *knowledge*.
    images: how many images come with the prompt; for *edit* the last is the
      result and those before it are the references.
  """
  if wish.kind == "edit":
    return _edit(wish, images - 1)
  parts = {
    "general": _general,
    "text": _text,
    "knowledge": _knowledge,
    "structured": _structured,
  }[wish.kind](wish)
  if wish.kind == "knowledge":
    parts = [*parts, f"Known about the image:\n{context}"]
  return "\n".join(parts)


def _words(wish: Wish) -> str:
  low, high = WORDS[wish.kind][wish.length]
  name = LANGUAGES[wish.language]
  return f"Write in {name}, with {low} to {high} words."


def _general(wish: Wish) -> list[str]:
  return [
    "Write a caption from which this image could be drawn again.",
    "Describe the main subjects with their number, looks and actions, where "
    "they are relative to each other, the background, light, colours, style "
    "and point of view. Say only what can be seen; do not guess at names, "
    "feelings or what lies outside the image.",
    _QUOTES,
    f"{_words(wish)} {_PLAIN}",
  ]


def _text(wish: Wish) -> list[str]:
  return [
    "Write a caption of this image for someone who has to set all of its text "
    "again in the same place.",
    _READING[wish.category],
    f"Leave no readable text out. {_QUOTES} Put in symbols and how the parts "
    "belong together.",
    f"{_words(wish)} Words inside quotes do not count. {_PLAIN}",
  ]


def _knowledge(wish: Wish) -> list[str]:
  return [
    "Write a caption of this image that joins what can be seen with what is "
    "known about it.",
    "Name the people, places, works, species, products or events that the "
    "notes below name, wherever the image agrees, and tie each fact to the "
    "part of the image it is about. Use no fact that is neither in the notes "
    "nor in the image, and leave out notes that the image contradicts.",
    _QUOTES,
    f"{_words(wish)} {_PLAIN}",
  ]


def _structured(wish: Wish) -> list[str]:
  name = LANGUAGES[wish.language]
  return [
    "Describe this image as JSON of exactly this form:",
    _SCHEMA,
    "List every entity that matters once, with an id of its own; attributes "
    "are short strings, only those that can be seen. List every arrow, line, "
    "containment or interaction as a relation between two ids, in its "
    "direction.",
    f"Keep the keys as they are; write the values in {name}, but labels as "
    "they stand in the image. Answer with the JSON alone.",
  ]


def _edit(wish: Wish, references: int) -> str:
  if references == 1:
    start = [
      "The first image was edited; the second is the result.",
      "Write the instruction that a user would give to get the second from the "
      "first. Say what to add, remove, replace, move or restyle, and where; do "
      "not describe what stays, except that it has to stay where that would "
      "be in doubt.",
    ]
  else:
    names = ", ".join(f"image {i + 1}" for i in range(references))
    start = [
      f"The first {references} images ({names}) were used to make the last "
      "one, which is the result.",
      "Write the instruction that a user would give to get the result from "
      "them. Say what is taken from which image and how it is put together; "
      "name every one of them by its number in digits, such as image 1, and "
      "never mention the result as an image.",
    ]
  return "\n".join([
    *start,
    "Address the editor, as in an order; do not say that something was done. "
    "Text to be written goes inside double quotes, exactly as in the result.",
    f"{_words(wish)} Answer with the instruction alone.",
  ])  # fmt: skip


def classify() -> str:
  """The prompt that asks for the category of an image."""
  return (
    f"Which one of these is the image: {', '.join(CATEGORIES)}? Answer as "
    'JSON: {"category": "..."}.'
  )


def prompt_id(wish: Wish, references: int = 0) -> str:
  """Names the wording: kind and a checksum of the prompt without context.

  Args:
    wish: what is asked for.
    references: of an edit.
  """
  text = build(wish, "", references + 1)
  digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]
  return f"{wish.kind}-{digest}"


def context_of(caption: str, facts: Sequence[tuple[str, str]]) -> str:
  """Notes for *knowledge*: what is known about an image besides its pixels.

  Args:
    caption: as the source wrote it.
    facts: names and values from the provenance.
  """
  lines = [f"- {name}: {value}" for name, value in facts if value.strip()]
  if caption.strip():
    lines.insert(0, f"- text found beside it: {caption.strip()}")
  return "\n".join(lines)
