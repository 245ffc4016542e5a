# SPDX-License-Identifier: Apache-2.0
"""The client against local servers that fail in every way."""

import concurrent.futures
import json
import os
import time

import pytest
from caption_server import DRIP, DROP, completion, images_of, prompt_of
from pictures import encoded, jpeg, picture

from data_pipelines.caption import endpoint
from data_pipelines.caption.endpoint import Client, DeadError, Endpoint, Failed
from data_pipelines.errors import InputError


def client(*servers, **fields):
  given = {
    "urls": tuple(s if isinstance(s, str) else s.url for s in servers),
    "model": "m", "timeout": 5.0, "attempts": 3, "backoff": 0.01,
    "patience": 30.0,
  }  # fmt: skip
  return Client(Endpoint(**given | fields))


def replies(*values):
  """Answers one after the other, then the last again and again."""
  left = list(values)
  return lambda request: left.pop(0) if len(left) > 1 else left[0]


PICTURE = jpeg(0, (20, 16))


def test_a_request_has_the_images_in_order_and_then_the_prompt(serve):
  server = serve()
  server.reply = replies("an answer")
  other = encoded(picture(1, (8, 8)), "PNG")
  assert client(server)([PICTURE, other], "what?") == "an answer"
  (request,) = server.seen
  assert images_of(request) == [PICTURE, other]
  assert prompt_of(request) == "what?"
  kinds = [
    c["image_url"]["url"][:15] for c in request["messages"][0]["content"][:-1]
  ]
  assert kinds == ["data:image/jpeg", "data:image/png;"]
  assert request["model"] == "m" and request["temperature"] == 0
  assert server.keys == [None]


def test_the_key_is_sent(serve, monkeypatch):
  monkeypatch.setenv("CAPTION_TEST_KEY", "s3cret")
  server = serve(replies("x"))
  client(server, key_variable="CAPTION_TEST_KEY")([], "p")
  assert server.keys == ["Bearer s3cret"]
  with pytest.raises(InputError, match="CAPTION_NO_KEY, which is not set"):
    client(server, key_variable="CAPTION_NO_KEY")


@pytest.mark.parametrize(
  "fields, why",
  [
    ({"urls": ()}, "at least one"),
    ({"urls": ("localhost:8000",)}, "http://"),
    ({"model": ""}, "no model"),
    ({"attempts": 0}, "at least 1"),
    ({"timeout": 0.0}, "above 0"),
  ],
)
def test_what_cannot_be_asked_is_refused(fields, why):
  with pytest.raises(InputError, match=why):
    Endpoint(**{"urls": ("http://x",), "model": "m"} | fields)


@pytest.mark.parametrize(
  "bad",
  [
    503, 500, 429, DROP, b"not json", b"{}", b'{"choices": []}', b"[1, 2]",
    b'{"choices": [{"message": {"content": [1]}}]}',
    b"[" * 100_000,
  ],
)  # fmt: skip
def test_a_server_that_recovers_is_asked_again(serve, bad):
  server = serve(replies(bad, bad, "fine"))
  assert client(server)([PICTURE], "p") == "fine"
  assert len(server.seen) == 3


@pytest.mark.parametrize(
  "bad, why",
  [
    (500, r"HTTP 500 \("),
    (DROP, r"no connection \(IncompleteRead"),
    (b"nope", r"unreadable answer \(no JSON"),
    (b'{"choices": 3}', r"unreadable answer \(TypeError"),
    ((2.5, "late"), r"timeout \(over 0.9 s"),
    (DRIP, r"timeout \(over 0.9 s"),
  ],
)
def test_a_request_that_fails_for_good_has_a_reason(serve, bad, why):
  server = serve(replies("first", bad))
  asks = client(server, timeout=0.9, attempts=2)
  assert asks([], "p") == "first"  # so that it is not dead from the start
  start = time.monotonic()
  with pytest.raises(Failed, match=why):
    asks([], "q")
  assert time.monotonic() - start < 6
  assert len(server.seen) == 3


def test_a_request_at_fault_is_not_repeated(serve):
  server = serve(replies(400, "fine"))
  asks = client(server)
  with pytest.raises(Failed, match="HTTP 400"):
    asks([PICTURE], "too large")
  assert len(server.seen) == 1
  assert asks([PICTURE], "smaller") == "fine"


def test_answers_are_cut_or_empty(serve):
  server = serve(replies(completion("and then", "length")))
  with pytest.raises(endpoint.CutOffError, match="cut off"):
    client(server)([], "p")
  none = {"choices": [{"message": {"content": None}}]}
  assert client(serve(replies(none)))([], "p") == ""
  half = json.dumps(completion("\ud800 x")).encode()
  assert client(serve(replies(half)))([], "p") == "? x"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_address_or_key_is_dead_at_once(serve, status):
  server = serve(replies("first", status))
  asks = client(server)
  asks([], "p")
  with pytest.raises(DeadError, match=f"{server.url}: HTTP {status}"):
    asks([], "q")
  assert len(server.seen) == 2


def test_a_server_that_was_never_there_is_not_waited_for():
  asks = client("http://127.0.0.1:9/v1", attempts=3)
  with pytest.raises((DeadError, Failed)):
    asks([], "p")
  with pytest.raises(DeadError, match="no connection"):
    asks([], "p")


def test_one_that_failed_for_long_is_dead_and_one_that_came_back_is_not(serve):
  server = serve(replies("first", 500))
  asks = client(server, patience=0.15, attempts=2)
  asks([], "p")
  with pytest.raises(Failed):
    asks([], "q")
  time.sleep(0.2)
  with pytest.raises((Failed, DeadError)):
    asks([], "q")
  with pytest.raises(DeadError, match="HTTP 500"):
    asks([], "q")
  server = serve(replies("first", 500, 500, "back", 500))
  asks = client(server, patience=0.15, attempts=3)
  asks([], "p")
  assert asks([], "q") == "back"
  with pytest.raises(Failed):
    asks([], "r")
  assert asks._servers[0].failures == 3  # the streak had ended


def test_a_slow_and_a_dead_server_do_not_stop_the_third(serve):
  slow, dead, fine = serve(lambda r: (0.6, "ok")), serve(), serve()
  fine.reply = replies("ok")
  dead.close()
  asks = client(slow, dead, fine, attempts=4)
  start = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    answers = list(threads.map(lambda i: asks([], f"p{i}"), range(40)))
  assert answers == ["ok"] * 40
  assert time.monotonic() - start < 10
  assert len(fine.seen) > 25 > len(slow.seen) >= 1


def test_a_dead_server_is_tried_again_after_a_rest(serve):
  server, other = serve(replies(404, "back")), serve(replies("other"))
  asks = client(server, other, rest=0.2)
  for i in range(6):
    assert asks([], f"p{i}") == "other"
  assert len(server.seen) == 1
  time.sleep(0.25)
  assert {asks([], f"q{i}") for i in range(4)} >= {"back"}


def test_the_wait_that_a_server_asks_for_is_kept(monkeypatch):
  waits, errors = [], [429, 503]
  monkeypatch.setattr(endpoint.time, "sleep", waits.append)

  def post(config, url, body):
    if errors:
      error = endpoint.urllib.error.HTTPError(
        url, errors.pop(0), "busy", {"Retry-After": "7"}, None
      )
      error.read = lambda n: b"wait"
      raise error
    return completion("fine")

  monkeypatch.setattr(endpoint, "_post", post)
  assert client("http://x", backoff=1.0)([], "p") == "fine"
  assert waits == [7.0, 7.0]


def test_answers_are_remembered_by_the_whole_request(serve, tmp_path):
  server = serve(replies("one", 400, "two", "three", "four"))
  asks = client(server, cache=str(tmp_path / "c"))
  assert [asks([PICTURE], "p") for _ in range(3)] == ["one"] * 3
  assert (asks.asked, asks.cached) == (1, 2)
  with pytest.raises(Failed):
    asks([PICTURE], "q")
  assert asks([PICTURE], "q") == "two"  # failures are not kept
  assert asks([PICTURE], "p", 1) == "three"
  assert server.seen[-1]["seed"] == 1 and server.seen[-1]["temperature"] > 0
  assert asks([jpeg(1, (20, 16))], "p") == "four"
  # Another server of the same model has the same answers.
  again = client("http://127.0.0.1:9", cache=str(tmp_path / "c"))
  assert again([PICTURE], "p") == "one"
  for path in (tmp_path / "c").rglob("*.json"):
    path.write_text("{")  # damaged entries are asked for again
  assert asks([PICTURE], "p") == "four"
  assert not [p for p in (tmp_path / "c").rglob("tmp*")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_one_sentence(serve, tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(InputError, match="Cannot write to the cache"):
    client(serve(replies("x")), cache=str(tmp_path / "c"))([], "p")
