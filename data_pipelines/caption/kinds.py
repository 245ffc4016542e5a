# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a captioner: kinds, categories, languages, lengths.

Four kinds are those of the Qwen-Image-2.0 report (section 2.2): *general*,
*text* for images of dense text, *knowledge* with conditions from outside the
image, *structured* for diagrams. *edit* is the instruction that leads from
reference images to a target. The report gives no lengths; ours are here.
"""

import dataclasses
from collections.abc import Sequence

from data_pipelines.errors import InputError

IMAGE_KINDS = ("general", "text", "knowledge", "structured")
KINDS = (*IMAGE_KINDS, "edit")
# Each has a way of reading it in the prompts of *text*.
CATEGORIES = (
  "photo", "illustration", "slide", "poster", "comic", "educational",
  "document", "interface", "chart", "diagram",
)  # fmt: skip
LENGTHS = ("short", "medium", "long")
# Fewest and most words that are asked for; quoted text is not counted.
WORDS = {
  "general": {"short": (8, 25), "medium": (40, 90), "long": (120, 250)},
  "text": {"short": (8, 30), "medium": (40, 110), "long": (120, 300)},
  "knowledge": {"short": (10, 35), "medium": (40, 110), "long": (120, 250)},
  "edit": {"short": (2, 15), "medium": (12, 45), "long": (40, 120)},
}
LANGUAGES = {
  "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "de": "German",
  "el": "Greek", "en": "English", "es": "Spanish", "fa": "Persian",
  "fr": "French", "he": "Hebrew", "hi": "Hindi", "id": "Indonesian",
  "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
  "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "sv": "Swedish",
  "ta": "Tamil", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
  "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Wish:
  """One caption to be asked for.

  Attributes:
    kind: one of KINDS.
    language: a key of LANGUAGES.
    length: one of LENGTHS; empty for *structured*, which is as long as the
      image demands.
    category: one of CATEGORIES, for the prompt of *text*.
  """

  kind: str
  language: str
  length: str
  category: str = "photo"


def parse_weights(
  entries: Sequence[str], known: Sequence[str], what: str
) -> dict[str, float]:
  """Reads `['en:0.7', 'zh:0.3']`; a weight that is left out is 1.

  Args:
    entries: names, each with or without a weight.
    known: names that may occur.
    what: for the message.

  Returns:
    Weights above 0 by name.

  Raises:
    InputError: a name is unknown or occurs twice, or a weight is unusable.
  """
  found: dict[str, float] = {}
  for entry in entries:
    name, _, weight = entry.strip().partition(":")
    name = _code(name) if what == "languages" else name
    if name not in known:
      raise InputError(
        f"{entry!r} is none of the {what} {', '.join(known)}; use some of "
        "them, with or without a weight, such as NAME:0.5."
      )
    try:
      value = float(weight or 1)
    except ValueError:
      value = -1.0
    if name in found or not 0 < value < float("inf"):
      raise InputError(
        f"{entry!r} in the {what} needs a weight above 0, and every name only "
        "once."
      )
    found[name] = value
  if not found:
    raise InputError(f"No {what} are given; name at least one of {known}.")
  return found


def _code(name: str) -> str:
  """'Chinese' -> 'zh'; anything unknown as it is."""
  codes = {full.casefold(): code for code, full in LANGUAGES.items()}
  return codes.get(name.casefold(), name)
