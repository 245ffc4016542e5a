# SPDX-License-Identifier: Apache-2.0
"""Captions of one record: what to ask for, and a row per answer.

A row without a kind says why a whole record has none. `answers` counts those
that were read so far, so that a retry asks for another.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from data_pipelines.caption import checks, prompts, router
from data_pipelines.caption.draw import draw
from data_pipelines.caption.endpoint import CutOffError, DeadError, Failed
from data_pipelines.caption.kinds import Wish
from data_pipelines.caption.prepare import Prepared
from data_pipelines.errors import InputError
from data_pipelines.filters.text import estimate_tokens
from data_pipelines.reasons import matches
from data_pipelines.sources.items import Limits, printable

SCHEMA = pa.schema({
  "id": pa.string(), "kind": pa.string(), "language": pa.string(),
  "length": pa.string(), "category": pa.string(), "text": pa.string(),
  "valid": pa.bool_(), "reason": pa.string(), "model": pa.string(),
  "prompt_id": pa.string(), "tokens": pa.int32(), "answers": pa.int32(),
})  # fmt: skip
UNROUTED = "no kind suits"

# (images, prompt, number of the attempt) -> answer
Ask = Callable[[Sequence[bytes], str, int], str]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to ask for.

  Attributes:
    model: name of the captioner, for the rows.
    kinds: that may be asked for.
    languages: weights by code.
    lengths: weights by name.
    per_kind: captions of a kind, each of another language or length.
    tries: answers to read until one passes the checks.
    classify: whether the captioner names the category itself.
    seed: changes the draws.
    max_side: see `prepare`.
    max_error_rate: share of failed rows at which a shard is refused.
    limits: of the images.
    concurrency: records that are asked about at a time.
    processes: that decode; 0: one per core.
  """

  model: str
  kinds: tuple[str, ...]
  languages: Mapping[str, float]
  lengths: Mapping[str, float]
  per_kind: int = 1
  tries: int = 2
  classify: bool = False
  seed: int = 0
  max_side: int = 1536
  max_error_rate: float = 0.5
  limits: Limits = Limits()  # noqa: RUF009  frozen
  concurrency: int = 16
  processes: int = 0


def plain(captioner: Callable[[Sequence[bytes], str], str]) -> Ask:
  """A callable in the place of an endpoint; every attempt asks the same.

  Args:
    captioner: (JPEG bytes of images, prompt) -> answer; called from several
      threads. What it raises becomes the reason of the row.
  """
  return lambda images, prompt, attempt: captioner(images, prompt)


def is_failed(row: Mapping[str, Any]) -> bool:
  """Whether a caption was to be had and is not."""
  return not row["valid"] and not row["reason"].startswith(UNROUTED)


def caption_record(
  prepared: Prepared, settings: Settings, ask: Ask
) -> list[dict[str, Any]]:
  """Asks for the captions of one record.

  Raises:
    DeadError: no captioner answers.
    InputError: the cache cannot be written.
  """
  references = len(prepared.images) - 1
  columns = dict(prepared.columns)
  if settings.classify and not references:
    columns["category"] = _classify(prepared, ask) or columns["category"]
  route = router.route(
    columns, settings.kinds, references, bool(prepared.context)
  )
  if not route.kinds:
    reason = f"{UNROUTED} ({'edit' if references else route.category})"
    return [make_row(settings, prepared.id, reason=reason)]
  return [
    _ask_one(wish, prepared, settings, ask, 0)
    for kind in route.kinds
    for wish in wishes(prepared.id, kind, route.category, settings)
  ]


def wishes(id: str, kind: str, category: str, settings: Settings) -> list[Wish]:
  """Languages and lengths of the captions of one kind, drawn for a record."""
  lengths = {"": 1.0} if kind == "structured" else settings.lengths
  weights = {
    f"{language} {length}": first * second
    for language, first in settings.languages.items()
    for length, second in lengths.items()
  }
  drawn = draw(weights, settings.per_kind, settings.seed, id, kind)
  return [Wish(kind, *name.split(" "), category) for name in drawn]


def _classify(prepared: Prepared, ask: Ask) -> str:
  try:
    return router.read_category(ask(prepared.images, prompts.classify(), 0))
  except (DeadError, InputError):
    raise
  except Exception:  # the captions will say what is wrong
    return ""


def again(
  prepared: Prepared,
  old: Sequence[dict[str, Any]],
  retry: str,
  settings: Settings,
  ask: Ask,
) -> list[dict[str, Any]]:
  """The rows of a record, those that failed for a reason asked for again."""
  return [
    _ask_one(
      Wish(row["kind"], row["language"], row["length"], row["category"]),
      prepared, settings, ask, row["answers"],
    )
    if matches(row["reason"], retry)
    else row
    for row in old
  ]  # fmt: skip


def _ask_one(
  wish: Wish, prepared: Prepared, settings: Settings, ask: Ask, answers: int
) -> dict[str, Any]:
  references = len(prepared.images) - 1
  prompt = prompts.build(wish, prepared.context, len(prepared.images))
  text, reason = "", ""
  for attempt in range(answers, answers + settings.tries):
    try:
      answer = ask(prepared.images, prompt, attempt)
      text, reason = checks.read(wish, answer, prepared.known_text, references)
    except (DeadError, InputError):
      raise
    except CutOffError as error:
      text, reason = "", str(error)
    except Failed as error:  # the client has tried again already
      text, reason = "", str(error)
      break
    except Exception as error:  # of a callable, or an answer no check foresaw
      text, reason = "", f"captioner failed ({type(error).__name__}: {error})"
      break
    answers = attempt + 1
    if not reason:
      break
  return make_row(
    settings, prepared.id, wish, text, reason, answers,
    prompts.prompt_id(wish, references),
  )  # fmt: skip


def make_row(
  settings: Settings,
  id: str,
  wish: Wish | None = None,
  text: str = "",
  reason: str = "",
  answers: int = 0,
  prompt_id: str = "",
) -> dict[str, Any]:
  """A row of SCHEMA; without a wish it speaks of the whole record."""
  return {
    "id": id,
    "kind": wish.kind if wish else "",
    "language": wish.language if wish else "",
    "length": wish.length if wish else "",
    "category": wish.category if wish else "",
    "text": text,
    "valid": not reason,
    "reason": printable(reason),
    "model": settings.model,
    "prompt_id": prompt_id,
    "tokens": estimate_tokens(text),
    "answers": answers,
  }
