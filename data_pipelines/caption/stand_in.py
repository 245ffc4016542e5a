# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a captioner, for pictures whose truth is known.

A local server of the OpenAI protocol that understands no image: it looks the
pictures of a request up among those that it was given, and answers with what
they were drawn from. It exists so that the whole pipeline runs offline; what
it does not know it refuses with status 422, which nobody asks again.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterable, Iterator

from data_pipelines import codec
from data_pipelines.caption.prepare import prepare
from data_pipelines.sources.items import Limits

# How the rows and the records of the dataset name the captioner.
MODEL = "stand-in: looks up what was drawn"
_UNKNOWN = 422
_LARGEST = 1 << 16  # pixels of a side; pictures are sent as they are

Truth = dict[str, str]


def learn(records: Iterable[codec.Record]) -> Truth:
  """Captions by what a captioner is shown of each record."""
  truth = {}
  for record in records:
    prepared = prepare(codec.encode(record), _LARGEST, Limits())
    truth[_key(prepared.images)] = record.caption
  return truth


def _key(images: Iterable[bytes]) -> str:
  whole = hashlib.sha256()
  for image in images:
    whole.update(hashlib.sha256(image).digest())
  return whole.hexdigest()


@contextlib.contextmanager
def serve(truth: Truth) -> Iterator[str]:
  """Answers from the truth while the block runs.

  Args:
    truth: see `learn`.

  Yields:
    The address, for the captioner's --url.
  """

  class Handler(http.server.BaseHTTPRequestHandler):
    # The captioner opens a connection per request.
    def do_POST(self) -> None:
      body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
      caption = _answer(body, truth)
      status = 200 if caption else _UNKNOWN
      message = {"role": "assistant", "content": caption}
      choice = {"index": 0, "message": message, "finish_reason": "stop"}
      answer = {"model": MODEL, "choices": [choice]}
      error = {"error": {"message": "none of the pictures that were drawn"}}
      data = json.dumps(answer if caption else error).encode()
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *arguments) -> None:
      """A line per request is too much."""

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.daemon_threads = True
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}/v1"
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def _answer(body: bytes, truth: Truth) -> str:
  """The caption of the pictures in a request, or ''."""
  try:
    content = json.loads(body)["messages"][0]["content"]
    urls = [c["image_url"]["url"] for c in content if c["type"] == "image_url"]
    images = [base64.b64decode(url.partition(",")[2]) for url in urls]
  except (ValueError, KeyError, TypeError, IndexError):
    return ""
  return truth.get(_key(images), "")
