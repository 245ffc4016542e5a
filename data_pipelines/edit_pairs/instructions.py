# SPDX-License-Identifier: Apache-2.0
"""Instructions in English and Chinese: several phrasings of every operation.

`{thing}` is a name without, `{a_thing}` with an article; images are numbered
from 1, as in the prompts of Qwen-Image. Our own words.
"""

from collections.abc import Mapping

import numpy as np

from data_pipelines.edit_pairs.pair import Name
from data_pipelines.edit_pairs.phrases import TEMPLATES

LANGUAGES = ("en", "zh")


def write(
  operation: str,
  language: str,
  slots: Mapping[str, Name | str],
  rng: np.random.Generator,
) -> str:
  """One phrasing of an operation.

  Args:
    operation: a key of TEMPLATES.
    language: 'en' or 'zh'.
    slots: what it says of this very edit.
    rng: chooses the phrasing.
  """
  phrasings = TEMPLATES[operation][LANGUAGES.index(language)]
  template = phrasings[int(rng.integers(len(phrasings)))]
  return template.format_map(spelled(slots, language))


def spelled(slots: Mapping[str, Name | str], language: str) -> dict[str, str]:
  """The values of slots as they stand in a sentence, also with an article."""
  values = {}
  for key, value in slots.items():
    text = value.of(language) if isinstance(value, Name) else value
    values[key] = text
    article = "an" if text[:1].lower() in "aeiou" else "a"
    values[f"a_{key}"] = f"{article} {text}" if text else text
  return values
