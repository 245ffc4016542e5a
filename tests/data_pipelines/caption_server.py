# SPDX-License-Identifier: Apache-2.0
"""A local server of the OpenAI protocol that misbehaves on request.

It stands in for a vision-language model: it looks at the prompt only.
"""

import base64
import contextlib
import http.server
import json
import re
import socket
import threading
import time

DROP = "drop"  # half of an answer, then the connection is cut
DRIP = "drip"  # an answer that comes a byte at a time
ENGLISH = (
  "A soft field of many colours fades from a warm corner at the left into a "
  "darker and cooler one at the right, while small grains of light are spread "
  "over the whole of it as if seen through frosted glass on a winter day, and "
  "a broad pale band crosses the middle from one side to the other."
)
CHINESE = (
  "画面由柔和的色块组成,左侧偏暖,右侧偏冷,中间有一条浅色的宽带横穿而过,"
  "整个表面布满细小的颗粒,好像隔着一块磨砂玻璃在冬天里看到的光线一样,"
  "边缘渐渐变暗,没有任何人物或者文字出现在其中。"
)
STRUCTURED = {
  "type": "flowchart",
  "summary": "Two boxes that are joined by an arrow from left to right.",
  "entities": [
    {"id": "e1", "name": "start", "attributes": {"shape": "box"}},
    {"id": "e2", "name": "end", "attributes": {"text": "done"}},
  ],
  "relations": [{"subject": "e1", "predicate": "leads to", "object": "e2"}],
}


def good(prompt):
  """An answer that passes the checks of whatever was asked for."""
  if "Which one of these" in prompt:
    return '{"category": "photo"}'
  if "as JSON of exactly" in prompt:
    if "values in Chinese" in prompt:
      return json.dumps(STRUCTURED | {"summary": "两个方框由一个箭头相连"})
    return json.dumps(STRUCTURED)
  if "Write the instruction" in prompt:
    count = int((re.search(r"first (\d+) images", prompt) or [0, 1])[1])
    high = int(re.search(r"with \d+ to (\d+) words", prompt).group(1))
    if "Write in Chinese" in prompt:
      numbers = "和".join(f"图{i + 1}" for i in range(count))
      text = f"把{numbers}融合成一张更温暖的画面"
      return text if high < 20 else f"{text},{CHINESE[:40]}"
    which = " and ".join(f"image {i + 1}" for i in range(count))
    text = f"Blend {which} into one and make it warmer."
    return text if high < 20 else f"{text} {ENGLISH[:150]}."
  text = CHINESE if "Write in Chinese" in prompt else ENGLISH
  low = int(re.search(r"with (\d+) to", prompt).group(1))
  if low > 50:
    text = " ".join([text, text.replace("soft", "gentle")])
  elif low < 30 and text is ENGLISH:
    text = text[: text.index(", while")] + "."
  elif low < 30:
    text = text[:34] + "。"
  return f'{text} "OPEN"' if text[0] == "A" else f"{text}“营业”"


class Server:
  """Answers by a function of the request; remembers what came.

  Attributes:
    reply: request -> text, status, bytes, DROP or DRIP; or (seconds, any).
    seen: bodies of the requests.
    most: requests at a time, at most.
  """

  def __init__(self, reply):
    self.reply, self.seen, self.keys = reply, [], []
    self.busy = self.most = 0
    self.lock = threading.Lock()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        outer.answer(self)

      def log_message(self, *args):
        pass

    self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.http.daemon_threads = True
    threading.Thread(target=self.http.serve_forever, daemon=True).start()
    self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

  def answer(self, handler):
    body = handler.rfile.read(int(handler.headers["Content-Length"]))
    with self.lock:
      self.busy += 1
      self.most = max(self.most, self.busy)
      self.seen.append(json.loads(body))
      self.keys.append(handler.headers["Authorization"])
      reply = self.reply(self.seen[-1])
    if isinstance(reply, tuple):
      time.sleep(reply[0])
      reply = reply[1]
    status, data = 200, reply
    if isinstance(reply, int):
      status, data = reply, b"{}"
    elif isinstance(reply, dict):
      data = json.dumps(reply).encode()
    elif isinstance(reply, str):
      data = json.dumps(completion(reply)).encode()
    with self.lock:
      self.busy -= 1
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    with contextlib.suppress(OSError):  # the client may have given up
      self._write(handler, reply, data)

  def _write(self, handler, reply, data):
    if reply == DROP:
      handler.wfile.write(data[: len(data) // 2])
      handler.wfile.flush()
      handler.connection.shutdown(socket.SHUT_RDWR)
    elif reply == DRIP:
      for i in range(len(data)):
        handler.wfile.write(data[i : i + 1])
        time.sleep(0.05)
    else:
      handler.wfile.write(data)

  def close(self):
    self.http.shutdown()
    self.http.server_close()


def completion(text, finish="stop"):
  message = {"role": "assistant", "content": text}
  return {"choices": [{"message": message, "finish_reason": finish}]}


def prompt_of(request):
  return request["messages"][0]["content"][-1]["text"]


def images_of(request):
  """The bytes of the images of a request."""
  urls = [c["image_url"]["url"] for c in request["messages"][0]["content"][:-1]]
  return [base64.b64decode(url.split(",")[1]) for url in urls]


def well_behaved(request):
  return good(prompt_of(request))
