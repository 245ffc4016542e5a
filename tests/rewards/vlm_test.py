# SPDX-License-Identifier: Apache-2.0
"""The judge against a local server that misbehaves on request."""

import base64
import http.server
import io
import json
import math
import threading
import time

import numpy as np
import PIL.Image
import pytest

from qi2_jax.errors import InputError
from qi2_jax.rewards import vlm
from qi2_jax.rewards.protocol import Prompt


def answer(text="4", tokens=None):
  choice = {"message": {"role": "assistant", "content": text}}
  if tokens is not None:
    choice["logprobs"] = {"content": tokens}
  return {"choices": [choice]}


def marks(**probabilities):
  top = [
    {"token": k.strip("_"), "logprob": math.log(p)}
    for k, p in probabilities.items()
  ]
  return [{"token": top[0]["token"], "logprob": top[0]["logprob"],
           "top_logprobs": top}]  # fmt: skip


class Server:
  """Answers from a list, then repeats the last; remembers what came."""

  def __init__(self, replies, delay=0.0):
    self.replies, self.seen, self.keys = list(replies), [], []
    self.busy = self.most = 0
    lock, outer = threading.Lock(), self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with lock:
          outer.busy += 1
          outer.most = max(outer.most, outer.busy)
          outer.seen.append(json.loads(body))
          outer.keys.append(self.headers["Authorization"])
          several = len(outer.replies) > 1
          reply = outer.replies.pop(0) if several else outer.replies[0]
        time.sleep(delay)
        status = reply if isinstance(reply, int) else 200
        data = b"{}" if status != 200 else json.dumps(reply).encode()
        # Counted before the client can send its next request.
        with lock:
          outer.busy -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

      def log_message(self, *args):
        pass

    self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=self.http.serve_forever, daemon=True).start()
    self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

  def close(self):
    self.http.shutdown()
    self.http.server_close()


@pytest.fixture
def serve():
  servers = []

  def start(*replies, delay=0.0):
    servers.append(Server(replies, delay))
    return servers[-1]

  yield start
  for server in servers:
    server.close()


def config(server, **fields):
  given = {
    "name": "vlm", "url": server.url, "model": "judge",
    "question": "How well does it show {prompt}? One digit, 1 to 5.",
    "attempts": 3, "backoff": 0.01, "timeout": 5.0,
  }  # fmt: skip
  return vlm.JudgeConfig(**given | fields)


IMAGES = [np.full((8, 6, 3), 40 * i, np.uint8) for i in range(4)]
PROMPTS = [Prompt(f"prompt {i}") for i in range(4)]
NONE = [()] * 4


def test_marks_are_expectations_over_the_tokens(serve):
  server = serve(answer("4", marks(_4=0.6, _5=0.2, _2=0.1, good=0.1)))
  values = vlm.judge(config(server))(IMAGES[:1], PROMPTS[:1], NONE[:1])
  # Of what fell on marks: (4 * .6 + 5 * .2 + 2 * .1) / .9.
  np.testing.assert_allclose(values["vlm"], [3.6 / 0.9], rtol=1e-9)
  sent = server.seen[0]
  assert sent["model"] == "judge" and sent["logprobs"] is True
  text, picture = sent["messages"][0]["content"]
  assert "prompt 0" in text["text"]
  raw = base64.b64decode(picture["image_url"]["url"].split(",")[1])
  np.testing.assert_array_equal(
    np.asarray(PIL.Image.open(io.BytesIO(raw))), IMAGES[0]
  )


def test_references_come_before_the_image(serve):
  server = serve(answer("3"))
  vlm.judge(config(server))(IMAGES[:1], PROMPTS[:1], [(IMAGES[2],)])
  pictures = server.seen[0]["messages"][0]["content"][1:]
  raw = base64.b64decode(pictures[0]["image_url"]["url"].split(",")[1])
  assert len(pictures) == 2
  assert np.asarray(PIL.Image.open(io.BytesIO(raw))).max() == 80


@pytest.mark.parametrize(
  "reply, mark",
  [
    (answer("Score: 5"), 5.0),
    (answer("x", [{"token": "So", "logprob": -0.1}, *marks(_2=0.9)]), 2.0),
    (answer("2", [{"token": "2", "logprob": -0.1}]), 2.0),
    (answer("12 of 45, so 3"), 3.0),
  ],
)
def test_answers_are_read(reply, mark):
  assert vlm.read_mark(reply) == pytest.approx(mark)


def test_a_server_that_recovers_is_asked_again(serve):
  server = serve(503, answer("no idea"), answer("2"))
  assert vlm.ask(config(server), b"{}") == 2.0
  assert len(server.seen) == 3


def test_what_never_answers_has_no_mark_rather_than_the_lowest(serve):
  server = serve(500)
  values = vlm.judge(config(server, attempts=2))(
    IMAGES[:2], PROMPTS[:2], NONE[:2]
  )
  assert np.isnan(values["vlm"]).all() and len(server.seen) == 4
  slow = serve(answer("5"), delay=0.5)
  assert math.isnan(vlm.ask(config(slow, timeout=0.05, attempts=1), b"{}"))
  slow.close = slow.http.server_close


def test_a_refusal_is_one_sentence(serve):
  with pytest.raises(InputError, match=r"answered 401.*url, model and key"):
    vlm.ask(config(serve(401)), b"{}")


def test_answers_are_cached_on_disk_and_failures_are_not(serve, tmp_path):
  server = serve(500, answer("1"), answer("2"), answer("3"), answer("4"))
  given = config(
    server, cache=str(tmp_path / "cache"), concurrency=1, attempts=1
  )
  first = vlm.judge(given)(IMAGES, PROMPTS, NONE)["vlm"]
  np.testing.assert_array_equal(first, [np.nan, 1, 2, 3])
  again = vlm.judge(given)(IMAGES, PROMPTS, NONE)["vlm"]
  np.testing.assert_array_equal(again, [4, 1, 2, 3])
  assert len(server.seen) == 5
  other = vlm.judge(config(server, cache=given.cache, model="other"))
  other(IMAGES[:1], PROMPTS[:1], NONE[:1])
  assert len(server.seen) == 6
  names = [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()]
  assert len(names) == 5 and all(n.endswith(".json") for n in names)


def test_requests_run_beside_each_other_up_to_the_limit(serve):
  server = serve(answer("3"), delay=0.1)
  vlm.judge(config(server, concurrency=2))(IMAGES, PROMPTS, NONE)
  assert server.most == 2


def test_the_key_comes_from_the_environment(serve, monkeypatch):
  server = serve(answer("3"))
  monkeypatch.setenv("JUDGE_KEY", "secret")
  vlm.ask(config(server, key_variable="JUDGE_KEY"), b"{}")
  assert server.keys == ["Bearer secret"]
  monkeypatch.delenv("JUDGE_KEY")
  for fields, message in (
    ({"key_variable": "JUDGE_KEY"}, "JUDGE_KEY, which is not set"),
    ({"url": "localhost"}, "starts with http"),
    ({"question": "good?"}, "must contain {prompt}"),
    ({"attempts": 0}, "at least 1"),
  ):
    with pytest.raises(InputError, match=message):
      config(server, **fields)
