# SPDX-License-Identifier: Apache-2.0
"""From the answer of a captioner to a caption, or to the reason against it.

Reasons read 'category (details)', as everywhere in the pipeline. All limits
are ours.
"""

import collections
import re
import unicodedata
from collections.abc import Sequence

from data_pipelines.caption import structured
from data_pipelines.caption.kinds import WORDS, Wish
from data_pipelines.filters import text as measures

# Training cuts prompts there; `token_length` in experiments/data.py agrees.
MAX_TOKENS = 1024
# Models count badly; only what is far off is refused.
_SLACK = 2.0
# Fewer letters of an alphabet do not tell its languages apart.
_FEW_LETTERS = 24
_WINDOW = 80  # characters that the detector reads
_WINDOWS = 8
# What the detector may say for a language besides its own code.
_LIKE = {
  "zh": ("wuu", "yue", "lzh"), "id": ("ms", "jv"), "fa": ("pnb", "azb"),
  "ur": ("pnb",), "cs": ("sk",), "pt": ("gl",), "es": ("gl", "ast"),
}  # fmt: skip
_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"\A```\w*\s*\n(.*?)\n?```\Z", re.DOTALL)
_PREAMBLE = re.compile(
  r"\A(here(?:'s| is)[^\n]{0,80}:|(?:caption|instruction|description|描述|"
  r"标题|指令)\s*[:\uff1a])\s*",
  re.IGNORECASE,
)
_QUOTES = re.compile(r"\"([^\"\n]+)\"|“([^”]+)”|「([^」]+)」|«([^»]+)»")
_REFUSAL = re.compile(
  r"\b(i'?m sorry|i am sorry|i apologi[sz]e|i (?:can(?:no|')?t|am unable to|"
  r"am not able to|won't) (?:\w+ ){0,2}(?:assist|help|describe|identify|"
  r"provide|comply|see|view|fulfil)|as an ai\b|no image (?:was|is|has been) "
  r"(?:provided|attached|visible)|against (?:my|our) (?:policy|guidelines))"
  r"|对不起|很抱歉|抱歉,|我无法|我不能(?:描述|提供|协助|识别)|作为一个?人工智能"
  r"|申し訳(?:ありません|ございません)|죄송합니다|lo siento, (?:pero )?no puedo"
  r"|es tut mir leid|je suis désolée?\b",
  re.IGNORECASE,
)
_REFUSAL_SPAN = 160  # a refusal comes first; later it may be in the image
_NO_INSTRUCTION = re.compile(
  r"\A(the|this|that) (\w+ )?(image|picture|photo|result|scene)\b(?! should)"
  r"|\A(这|该)(张|幅)?(图|照片)",
  re.IGNORECASE,
)
_NGRAM, _REPEATS = 6, 6
_WITH_TEXT = ("text", "structured")


def read(
  wish: Wish, answer: str, known_text: Sequence[str] = (), references: int = 0
) -> tuple[str, str]:
  """The caption in an answer.

  Args:
    wish: what was asked for.
    answer: of the captioner.
    known_text: what is written in the image for certain, as synthetic data
      says; *text* captions must hold all of it.
    references: of an edit.

  Returns:
    The caption, and '' or the reason why it cannot be used.
  """
  text = strip(answer)
  if not text:
    return "", "empty"
  if wish.kind != "structured":
    return text, _reason(wish, text, text, known_text, references)
  try:
    caption = structured.read(text)
  except structured.SchemaError as error:
    # A refusal is no JSON either, but another mistake.
    return text, "refusal" if is_refusal(text) else f"JSON invalid ({error})"
  text = structured.write(caption)
  return text, _reason(wish, text, caption["summary"], known_text, references)


def strip(answer: str) -> str:
  """An answer without thoughts, fences, preambles and outer quotes."""
  text = _THOUGHT.sub("", answer).strip()
  text = _FENCE.sub(r"\1", text).strip()
  text = _PREAMBLE.sub("", text).strip()
  if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
    text = text[1:-1].strip()
  return unicodedata.normalize("NFC", text)


def is_refusal(text: str) -> bool:
  """Whether a captioner says that it will not or cannot."""
  text = text[:_REFUSAL_SPAN].replace("’", "'").replace("\uff0c", ",")
  return _REFUSAL.search(_QUOTES.sub(" ", text)) is not None


def _reason(
  wish: Wish, text: str, prose: str, known: Sequence[str], references: int
) -> str:
  """Why a caption cannot be used.

  Args:
    wish: what was asked for.
    text: the caption.
    prose: the part of it that is in the language asked for.
    known: see `read`.
    references: of an edit.
  """
  if is_refusal(prose):
    return "refusal"
  invalid = measures.count_invalid(text)
  if invalid:
    return f"invalid characters ({invalid})"
  tokens = measures.estimate_tokens(text)
  if tokens > MAX_TOKENS:
    return f"too long ({tokens} tokens)"
  return (
    _repetition(text, wish)
    or _length(wish, prose)
    or _language(wish, prose)
    or (_text(wish, text, known) if wish.kind in _WITH_TEXT else "")
    or (_instruction(text, references) if wish.kind == "edit" else "")
  )


def count_words(text: str) -> int:
  """Words outside quotes; two characters of an unspaced script are one."""
  text = _QUOTES.sub(" ", text)
  dense = len(re.findall(f"[{measures.UNSPACED}]", text))
  spaced = re.sub(f"[{measures.UNSPACED}]", " ", text)
  return len(re.findall(r"\w+(?:['’-]\w+)*", spaced)) + (dense + 1) // 2


def _length(wish: Wish, prose: str) -> str:
  if wish.kind == "structured":
    return ""
  low, high = WORDS[wish.kind][wish.length]
  words = count_words(prose)
  if words > high * _SLACK:
    return f"too long ({words} words)"
  if words < low / _SLACK:
    return f"too short ({words} words)"
  return ""


def _repetition(text: str, wish: Wish) -> str:
  """A model that got caught in a loop; a table may repeat its words."""
  if wish.kind == "structured":
    return ""
  words = re.findall(rf"[{measures.UNSPACED}]|\w+", _QUOTES.sub(" ", text))
  runs = collections.Counter(zip(*(words[i:] for i in range(_NGRAM))))
  if not runs:
    return ""
  run, count = runs.most_common(1)[0]
  if count < _REPEATS:
    return ""
  return f"repetition ({count} times {' '.join(run)})"


def _language(wish: Wish, prose: str) -> str:
  """The language that most windows of the text are in, if another."""
  text = " ".join(_QUOTES.sub(" ", prose).split())
  letters = [c for c in text if c.isalpha()]
  latin = sum("LATIN" in unicodedata.name(c, "") for c in letters)
  if not letters or (latin * 2 > len(letters) and latin < _FEW_LETTERS):
    return ""
  starts = range(0, len(text), _WINDOW)[:_WINDOWS]
  windows = [text[i : i + _WINDOW] for i in starts]
  if len(windows) > 1 and len(windows[-1]) < _FEW_LETTERS:
    windows.pop()
  found = collections.Counter(map(_detect, windows))
  allowed = (wish.language, *_LIKE.get(wish.language, ()), None)
  right = sum(n for code, n in found.items() if code in allowed)
  if 2 * right >= found.total():
    return ""
  return f"wrong language ({found.most_common(1)[0][0]})"


def _detect(window: str) -> str | None:
  """The language of a window; the script decides where it can.

  The detector takes a short line of Han for English now and then.
  """
  if re.search("[\u3041-\u30fa]", window):  # kana
    return "ja"
  if re.search("[\uac00-\ud7a3]", window):
    return "ko"
  if 2 * len(re.findall("[\u3400-\u9fff]", window)) > len(window):
    return "zh"
  code = measures.detect_language(window)
  return code.partition("-")[0] if code else None


def _text(wish: Wish, text: str, known: Sequence[str]) -> str:
  """What is written in the image and missing, or that nothing is quoted."""
  if wish.kind == "text" and not quotes(text):
    return "quoted text missing (no quotes)"
  have = _squeeze(text.replace('\\"', '"').replace("\\n", " "))
  for line in known:
    if _squeeze(line) not in have:
      return f"quoted text missing ({line[:60]})"
  return ""


def _squeeze(text: str) -> str:
  return "".join(unicodedata.normalize("NFC", text).split())


def quotes(text: str) -> list[str]:
  """What a caption quotes."""
  return [next(filter(None, found)) for found in _QUOTES.findall(text)]


def _instruction(text: str, references: int) -> str:
  if _NO_INSTRUCTION.search(text):
    return "not an instruction"
  if references > 1:
    for i in range(1, references + 1):
      if not re.search(rf"(?<!\d){i}(?!\d)", text):
        return f"reference not named (image {i})"
  return ""
