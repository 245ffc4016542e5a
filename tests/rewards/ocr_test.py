# SPDX-License-Identifier: Apache-2.0
"""Text accuracy: what a prompt asks for, and what readers see of it."""

import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.shapes import prompts
from data_pipelines.shapes.render import render
from qi2_jax.evaluation.image_metrics import text_similarity
from qi2_jax.rewards import ocr
from qi2_jax.rewards.protocol import Prompt

IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize("prompt, text", [
  ('a sign that says "Open 24h"', "Open 24h"),
  ("a poster: “Hello” above ‘World’", "Hello World"),
  ("一张写着「你好」和『世界』的海报", "你好 世界"),
  ("une affiche « Bonjour » bleue", " Bonjour "),
  ("a mug with 'Tom's tea' on Anna's table", "Tom's tea"),
  ("the dog's bowl and the cats' toys", None),
  ("('yes', 'no')", "yes no"),
  ("a red circle", None),
  ('empty "" quotes', None),
])  # fmt: skip
def test_quoted_text_is_found(prompt, text):
  assert ocr.quoted(prompt) == text


def score(read, prompt='"Hello World"'):
  reward = ocr.text_accuracy(lambda image: read, ocr.quoted, text_similarity)
  return reward([IMAGE], [Prompt(prompt)], [()])["ocr"][0]


@pytest.mark.parametrize("read, value", [
  ("hello\n world", 1.0),
  ("HELLO WORLD!", 1 - 1 / 11),
  ("", 0.0),
  ("held", 1 - 6 / 10),
  # The wanted text in a sea of others is not the wanted text.
  ("xxxxxxxxxx hello world", 0.5),
])  # fmt: skip
def test_the_value_is_one_minus_the_edit_distance(read, value):
  assert score(read) == pytest.approx(value)


def test_forms_of_a_character_are_one():
  assert score("ＡＢＣ１２３", '"abc 123"') == 1.0
  assert score("straße", '"STRASSE"') == 1.0


def test_prompts_without_text_are_all_alike():
  calls = []
  reward = ocr.text_accuracy(calls.append, ocr.quoted, text_similarity)
  found = reward([IMAGE] * 2, [Prompt("a cat"), Prompt("a dog")], [(), ()])
  np.testing.assert_array_equal(found["ocr"], [0, 0])
  assert not calls


def test_an_engine_runs_in_one_thread_at_a_time():
  busy, most = [], []

  def read(image):
    busy.append(1)
    most.append(len(busy))
    time.sleep(0.02)
    busy.pop()
    return "x"

  reward = ocr.text_accuracy(read, ocr.quoted, text_similarity)
  given = [IMAGE] * 3, [Prompt('"x"')] * 3, [()] * 3
  threads = [threading.Thread(target=reward, args=given) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(most) == 9 and max(most) == 1


def test_the_rendered_task_is_read_by_its_own_font():
  from experiments import flow_grpo
  from qi2_jax import judging

  section = flow_grpo.get_config("smoke").rewards
  section.use, section.models.ocr.reader = ("ocr",), "shapes"
  reward = judging.rewards(section)["ocr"]
  rng = np.random.default_rng(0)
  made = [prompts.sample_t2i("glyph", rng) for _ in range(6)]
  made += [prompts.sample_t2i("word", rng) for _ in range(3)]
  images = [render(e.scene, 128, 128) for e in made]
  asked = [Prompt(e.prompt) for e in made]
  right = reward(images, asked, [()] * 9)["ocr"]
  wrong = reward(images[1:] + images[:1], asked, [()] * 9)["ocr"]
  assert right.mean() > 0.9 and wrong.mean() < 0.5


def test_rapidocr_reads_a_poster():
  pytest.importorskip("rapidocr")
  pytest.importorskip("onnxruntime")
  from experiments import flow_grpo
  from qi2_jax import judging

  section = flow_grpo.get_config("smoke").rewards
  section.use = ("ocr",)
  reward = judging.rewards(section)["ocr"]
  poster = Image.new("RGB", (384, 128), "white")
  font = ImageFont.load_default(size=48)
  ImageDraw.Draw(poster).text((30, 35), "Harbour 1987", "black", font)
  image = np.asarray(poster)
  asked = [Prompt('a poster with "Harbour 1987"'), Prompt('"Winter sale"')]
  values = reward([image, image], asked, [(), ()])["ocr"]
  assert values[0] > 0.9 and values[1] < 0.4
