# SPDX-License-Identifier: Apache-2.0
"""A vision-language model as a judge, over an OpenAI-compatible endpoint.

Pointwise marks from 1 to 5. Where the server returns log-probabilities, a
score is the expectation over the five marks, which tells apart images that
the argmax would not (Qwen-Image-2.0-RL, arXiv 2606.27608, as reviews of it
report). Written on urllib: one POST per image needs no client library.
"""

import base64
import concurrent.futures
import dataclasses
import hashlib
import http.client
import io
import json
import math
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

import numpy as np
from absl import logging
from PIL import Image as PillowImage

from qi2_jax.errors import InputError
from qi2_jax.rewards.protocol import Image, Prompt

_MARKS = ("1", "2", "3", "4", "5")
# A wrong address, key or model does not get better by waiting.
_FATAL = (400, 401, 403, 404)


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
  """Whom to ask what.

  Attributes:
    name: of the reward.
    url: up to and without `/chat/completions`.
    model: as the server calls it.
    question: `{prompt}` stands for the prompt; must ask for one digit.
    key_variable: environment variable with the key; empty: none is sent.
    concurrency: requests at a time.
    timeout: seconds that a request may take.
    attempts: requests per image before it has failed.
    backoff: seconds before the second attempt; doubles with each.
    cache: folder for the answers; empty keeps none.
  """

  name: str
  url: str
  model: str
  question: str
  key_variable: str = ""
  concurrency: int = 16
  timeout: float = 60.0
  attempts: int = 4
  backoff: float = 1.0
  cache: str = ""

  def __post_init__(self):
    """Raises InputError for a judge that cannot be asked."""
    if not self.url.startswith(("http://", "https://")):
      raise InputError(
        f"the judge {self.name!r} has the url {self.url!r}; give one that "
        "starts with http:// or https://."
      )
    if "{prompt}" not in self.question:
      raise InputError(
        f"the question of the judge {self.name!r} must contain {{prompt}}."
      )
    if self.attempts < 1 or self.concurrency < 1 or self.timeout <= 0:
      raise InputError(
        f"the judge {self.name!r} needs attempts and concurrency of at least "
        "1 and a timeout above 0."
      )
    if self.key_variable and self.key_variable not in os.environ:
      raise InputError(
        f"the judge {self.name!r} takes its key from the environment variable "
        f"{self.key_variable}, which is not set."
      )


class _NoAnswerError(Exception):
  """The server was reached and gave nothing that is a mark."""


def expectation(entries: Sequence[dict]) -> float | None:
  """Mean mark under `[{"token", "logprob"}]`; None without any mark."""
  masses = dict.fromkeys(_MARKS, 0.0)
  for entry in entries:
    token = entry["token"].strip()
    if token in masses:
      masses[token] += math.exp(entry["logprob"])
  total = sum(masses.values())
  if total <= 0.0:
    return None
  return sum(int(mark) * mass for mark, mass in masses.items()) / total


def read_mark(answer: dict) -> float:
  """The mark in an answer of `/chat/completions`, 1 to 5.

  Raises:
    _NoAnswerError: there is none.
  """
  try:
    choice = answer["choices"][0]
    for token in (choice.get("logprobs") or {}).get("content") or ():
      if token["token"].strip() in _MARKS:
        mark = expectation(token.get("top_logprobs") or [token])
        return mark if mark is not None else float(token["token"])
    found = re.search(r"(?<![\d.])[1-5](?![\d.])", choice["message"]["content"])
  except (KeyError, IndexError, TypeError) as error:
    raise _NoAnswerError(f"unexpected answer: {error!r}") from error
  if found is None:
    raise _NoAnswerError(f"no mark in {choice['message']['content']!r:.200}")
  return float(found.group())


def _data_url(image: Image) -> str:
  buffer = io.BytesIO()
  PillowImage.fromarray(image).save(buffer, "PNG")
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def request_body(
  config: JudgeConfig, image: Image, prompt: Prompt, references
) -> bytes:
  """The JSON of one request: question, references if any, then the image."""
  pictures = [
    {"type": "image_url", "image_url": {"url": _data_url(picture)}}
    for picture in (*references, image)
  ]
  text = config.question.replace("{prompt}", prompt.text)
  body = {
    "model": config.model,
    "messages": [
      {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}
    ],
    "temperature": 0,
    "max_tokens": 16,
    "logprobs": True,
    "top_logprobs": 20,
  }
  return json.dumps(body, sort_keys=True).encode()


def _post(config: JudgeConfig, body: bytes) -> dict:
  headers = {"Content-Type": "application/json"}
  if config.key_variable:
    key = os.environ[config.key_variable]
    headers["Authorization"] = f"Bearer {key}"
  request = urllib.request.Request(
    config.url.rstrip("/") + "/chat/completions", body, headers
  )
  with urllib.request.urlopen(request, timeout=config.timeout) as response:
    return json.load(response)


def ask(config: JudgeConfig, body: bytes) -> float:
  """One mark, asked for up to `attempts` times; NaN if all fail.

  Raises:
    InputError: the server refuses the address, the key or the model.
  """
  problem: Exception | None = None
  for attempt in range(config.attempts):
    if attempt:
      time.sleep(config.backoff * 2 ** (attempt - 1))
    try:
      return read_mark(_post(config, body))
    except urllib.error.HTTPError as error:
      if error.code in _FATAL:
        raise InputError(
          f"the judge {config.name!r} at {config.url} answered {error.code} "
          f"({error.reason}); check rewards.judges: url, model and key."
        ) from error
      problem = error
    except (OSError, http.client.HTTPException, ValueError,
            _NoAnswerError) as error:  # fmt: skip
      problem = error
  logging.warning(
    "judge %s gave no mark in %d attempts: %s",
    config.name, config.attempts, problem,
  )  # fmt: skip
  return math.nan


def _cached(config: JudgeConfig, body: bytes) -> float:
  """`ask`, remembered by the whole request; failures are not."""
  if not config.cache:
    return ask(config, body)
  name = hashlib.sha256(config.url.encode() + b"\0" + body).hexdigest()
  path = os.path.join(config.cache, name[:2], f"{name}.json")
  try:
    with open(path, encoding="utf-8") as file:
      return float(json.load(file)["mark"])
  except (OSError, ValueError, KeyError, TypeError):
    pass
  mark = ask(config, body)
  if math.isfinite(mark):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Several threads or hosts may have asked the same.
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    with open(handle, "w", encoding="utf-8") as file:
      json.dump({"mark": mark}, file)
    os.replace(temporary, path)
  return mark


def judge(config: JudgeConfig):
  """The reward of a judge, from 1 to 5; see `protocol.Score`."""

  def one(given) -> float:
    return _cached(config, request_body(config, *given))

  def score(images, prompts, references):
    rows = list(zip(images, prompts, references))
    with concurrent.futures.ThreadPoolExecutor(config.concurrency) as pool:
      marks = list(pool.map(one, rows))
    return {config.name: np.asarray(marks, np.float64)}

  return score
