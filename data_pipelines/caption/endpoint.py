# SPDX-License-Identifier: Apache-2.0
"""A client for captioners behind OpenAI-compatible endpoints.

Several servers of one model may be given. A request goes to the one that has
least to do; one that fails rests, and one that has failed for long counts as
dead and is only tried now and then, so a slow or dead server does not stop
the others. Answers are kept on disk by the whole request.

Written on urllib, like the judge in `qi2_jax/rewards/vlm.py`, which this
package may not import: one POST per caption needs no client library, and
those that exist have no cache and know one server only.
"""

import base64
import collections
import dataclasses
import hashlib
import http.client
import json
import os
import pathlib
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.errors import InputError

# A wrong address or key does not get better by waiting.
_WRONG_SERVER = (401, 403, 404)
# The request is at fault, and would be again.
_WRONG_REQUEST = (400, 413, 415, 422)
_MOST_BYTES = 16 << 20  # of an answer
_LONGEST_WAIT = 60.0  # seconds between two attempts
_AGAIN = 0.7  # temperature where another answer is wanted


class Failed(Exception):
  """Why one request has no answer: 'category (details)'."""


class CutOffError(Failed):
  """The answer is longer than it may be."""


class DeadError(Exception):
  """No server answers any more."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Whom to ask, and how long to wait.

  Attributes:
    urls: of servers of one model, up to and without `/chat/completions`.
    model: as the servers call it.
    key_variable: environment variable with the key; empty: none is sent.
    timeout: seconds that a request may take.
    attempts: requests per caption before it has failed.
    backoff: seconds before the second attempt; doubles with each.
    patience: seconds of nothing but failures after which a server is dead.
    rest: seconds until a dead server is tried again.
    max_tokens: of an answer.
    cache: folder for the answers; empty keeps none.
  """

  urls: tuple[str, ...]
  model: str
  key_variable: str = ""
  timeout: float = 120.0
  attempts: int = 4
  backoff: float = 1.0
  patience: float = 60.0
  rest: float = 120.0
  max_tokens: int = 2048
  cache: str = ""

  def __post_init__(self):
    """Raises InputError for an endpoint that cannot be asked."""
    wrong = [u for u in self.urls if not u.startswith(("http://", "https://"))]
    if wrong or not self.urls:
      raise InputError(
        f"The captioner has the urls {list(self.urls)}; give at least one, "
        "each starting with http:// or https://."
      )
    if not self.model:
      raise InputError(
        "The captioner has no model; name it as its server does."
      )
    if self.attempts < 1 or self.timeout <= 0 or self.max_tokens < 1:
      raise InputError(
        "The captioner needs attempts and max_tokens of at least 1 and a "
        "timeout above 0."
      )
    if self.key_variable and self.key_variable not in os.environ:
      raise InputError(
        "The captioner takes its key from the environment variable "
        f"{self.key_variable}, which is not set."
      )


@dataclasses.dataclass
class _Server:
  """One url, and how it is doing."""

  url: str
  busy: int = 0
  failures: int = 0  # in a row
  since: float = 0.0  # of the first of them
  until: float = 0.0  # when it may be asked again
  dead: str = ""  # why, if it is
  answered: bool = False  # ever


class Client:
  """Asks the servers of an endpoint; safe from many threads.

  Attributes:
    cached: answers that came from the disk so far.
    asked: answers that came from a server so far.
  """

  def __init__(self, endpoint: Endpoint):
    """Asks nothing yet."""
    self._endpoint = endpoint
    self._servers = [_Server(url.rstrip("/")) for url in endpoint.urls]
    self._lock = threading.Lock()
    self.cached = self.asked = 0

  def __call__(
    self, images: Sequence[bytes], prompt: str, attempt: int = 0
  ) -> str:
    """The answer to a prompt about images.

    Args:
      images: PNG or JPEG bytes, in order.
      prompt: the question.
      attempt: another number gives another answer.

    Raises:
      CutOffError: it is longer than max_tokens.
      Failed: there is none, after all attempts.
      DeadError: no server answers.
      InputError: the cache cannot be written.
    """
    body = request_body(self._endpoint, images, prompt, attempt)
    # Not the url: servers of one model are alike.
    name = hashlib.sha256(body).hexdigest()
    found = _recall(self._endpoint.cache, name)
    if found is None:
      found = read_answer(self._ask(body))
      _remember(self._endpoint.cache, name, found)
      with self._lock:
        self.asked += 1
    else:
      with self._lock:
        self.cached += 1
    if found["cut"]:
      raise CutOffError("answer cut off (max_tokens)")
    return found["text"]

  def _ask(self, body: bytes) -> Any:
    """One answer, asked for up to `attempts` times."""
    problem = Failed("no captioner")
    wait = 0.0
    tried: collections.Counter = collections.Counter()
    for attempt in range(self._endpoint.attempts):
      if attempt:
        backoff = self._endpoint.backoff * 2 ** (attempt - 1)
        time.sleep(min(max(wait, backoff), _LONGEST_WAIT))
      server = self._take(tried)
      tried[server.url] += 1
      wait = 0.0
      try:
        answer = _post(self._endpoint, server.url, body)
        read_answer(answer)  # a server that answers nonsense is asked again
        self._give_back(server, "")
        return answer
      except urllib.error.HTTPError as error:
        problem = Failed(f"HTTP {error.code} ({error.reason}; {_said(error)})")
        if error.code in _WRONG_REQUEST:
          self._give_back(server, "")
          raise problem from error
        wait = _retry_after(error)
        self._give_back(
          server,
          "" if error.code == 429 else str(problem),
          dead=error.code in _WRONG_SERVER,
        )
      except Failed as error:
        problem = error
        # It is alive, and may do better on other images.
        self._give_back(server, "")
      except TimeoutError:
        problem = Failed(f"timeout (over {self._endpoint.timeout:g} s)")
        self._give_back(server, str(problem))
      except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
          problem = Failed(f"timeout (over {self._endpoint.timeout:g} s)")
        else:
          problem = Failed(f"no connection ({type(reason).__name__}: {reason})")
        self._give_back(server, str(problem))
    raise problem

  def _take(self, tried: Mapping[str, int]) -> _Server:
    """The server to ask next.

    Args:
      tried: how often each has had this very request.

    Raises:
      DeadError: all are dead.
    """
    now = time.monotonic()
    with self._lock:
      alive = [s for s in self._servers if not s.dead]
      if not alive:
        why = "; ".join(f"{s.url}: {s.dead}" for s in self._servers)
        raise DeadError(why)
      # A dead one gets a single request when it has rested.
      again = [s for s in self._servers if s.dead and s.until <= now]
      rested = [s for s in alive if s.until <= now]
      server = min(
        again or rested or alive,
        key=lambda s: (tried.get(s.url, 0), s.busy, s.until),
      )
      if server.dead:
        server.until = now + self._endpoint.rest
      server.busy += 1
      return server

  def _give_back(
    self, server: _Server, problem: str, dead: bool = False
  ) -> None:
    """Notes how a request has ended; no problem is ''."""
    now = time.monotonic()
    with self._lock:
      server.busy -= 1
      if not problem:
        server.failures, server.dead, server.until = 0, "", 0.0
        server.answered = True
        return
      if not server.failures:
        server.since = now
      server.failures += 1
      server.until = now + self._endpoint.backoff * server.failures
      # One that never answered is not waited for.
      for_long = (
        not server.answered or now - server.since >= self._endpoint.patience
      )
      if dead or (for_long and server.failures >= self._endpoint.attempts):
        server.dead = problem
        server.until = now + self._endpoint.rest


def request_body(
  endpoint: Endpoint, images: Sequence[bytes], prompt: str, attempt: int
) -> bytes:
  """The JSON of one request: the images in order, then the question."""
  pictures = [
    {"type": "image_url", "image_url": {"url": _data_url(image)}}
    for image in images
  ]
  content = [*pictures, {"type": "text", "text": prompt}]
  body = {
    "model": endpoint.model,
    "messages": [{"role": "user", "content": content}],
    "max_tokens": endpoint.max_tokens,
    "temperature": _AGAIN if attempt else 0,
    "seed": attempt,
  }
  return json.dumps(body, sort_keys=True).encode()


def _data_url(image: bytes) -> str:
  kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
  return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def read_answer(answer: Any) -> dict[str, Any]:
  """`text` of an answer, and whether it was `cut` for its length.

  Raises:
    Failed: it is no answer of this protocol.
  """
  try:
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    cut = choice.get("finish_reason") == "length"
  except (KeyError, IndexError, TypeError, AttributeError) as error:
    raise Failed(f"unreadable answer ({error!r})") from error
  if text is None:  # what servers send for a filtered or empty answer
    text = ""
  if not isinstance(text, str):
    raise Failed("unreadable answer (content is no text)")
  # JSON can spell half of a surrogate pair, which no file can hold.
  return {"text": text.encode("utf-8", "replace").decode(), "cut": cut}


def _post(endpoint: Endpoint, url: str, body: bytes) -> Any:
  headers = {"Content-Type": "application/json"}
  if endpoint.key_variable:
    headers["Authorization"] = f"Bearer {os.environ[endpoint.key_variable]}"
  request = urllib.request.Request(f"{url}/chat/completions", body, headers)
  stop = time.monotonic() + endpoint.timeout
  with urllib.request.urlopen(request, timeout=endpoint.timeout) as response:
    data = bytearray()
    # urllib limits the wait for each piece, not for all of them.
    while piece := response.read1(1 << 16):
      data += piece
      if time.monotonic() > stop:
        raise TimeoutError
      if len(data) > _MOST_BYTES:
        raise Failed(f"unreadable answer (over {_MOST_BYTES} bytes)")
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and len(data) < int(length):
      raise http.client.IncompleteRead(b"", int(length) - len(data))
  try:
    return json.loads(data)
  except (ValueError, RecursionError) as error:
    raise Failed("unreadable answer (no JSON)") from error


def _said(error: urllib.error.HTTPError) -> str:
  try:
    with error:
      text = error.read(200).decode("utf-8", "replace")
  except (OSError, http.client.HTTPException):
    return ""
  return " ".join(text.split())


def _retry_after(error: urllib.error.HTTPError) -> float:
  value = error.headers.get("Retry-After", "") if error.headers else ""
  return float(value) if value.isdigit() else 0.0


def _path(cache: str, name: str) -> pathlib.Path:
  return pathlib.Path(cache, name[:2], f"{name}.json")


def _recall(cache: str, name: str) -> dict[str, Any] | None:
  if not cache:
    return None
  try:
    found = json.loads(_path(cache, name).read_text(encoding="utf-8"))
    return {"text": str(found["text"]), "cut": bool(found["cut"])}
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _remember(cache: str, name: str, answer: dict[str, Any]) -> None:
  if not cache:
    return
  path = _path(cache, name)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several threads or machines may have asked the same.
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with open(handle, "w", encoding="utf-8") as file:
      json.dump(answer, file)
    os.replace(temporary, path)
  except OSError as error:
    raise InputError(
      f"Cannot write to the cache {cache} ({error.strerror}); check the free "
      "space, or give another --cache."
    ) from error
