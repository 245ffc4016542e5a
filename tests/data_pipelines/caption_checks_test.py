# SPDX-License-Identifier: Apache-2.0
"""Answers of captioners: what is read, and what is refused for which reason."""

import copy
import json

import pytest
from caption_server import CHINESE, ENGLISH, STRUCTURED, good

from data_pipelines.caption import checks, prompts, structured
from data_pipelines.caption.kinds import LENGTHS, WORDS, Wish

GENERAL = Wish("general", "en", "medium")
GERMAN = (
  "Ein weiches Feld aus vielen Farben geht von einer warmen Ecke links in eine "
  "dunklere rechts über, und kleine Körner aus Licht sind überall verteilt, "
  "als sähe man durch Milchglas an einem kalten Wintertag, während ein "
  "breites und blasses Band von der einen Seite bis zur anderen durch die "
  "Mitte zieht."
)


def reason(wish, answer, **options):
  return checks.read(wish, answer, **options)[1]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", [*WORDS, "structured"])
def test_good_answers_pass(kind, language, length):
  wish = Wish(kind, language, "" if kind == "structured" else length, "poster")
  answer = good(prompts.build(wish, "- title: x", 3))
  text, why = checks.read(wish, answer, references=2)
  assert why == "" and text


@pytest.mark.parametrize(
  "answer, text",
  [
    (f"Caption: {ENGLISH}", ENGLISH),
    (f"Here is a caption of the image:\n\n{ENGLISH}", ENGLISH),
    (f"```\n{ENGLISH}\n```", ENGLISH),
    (f'"{ENGLISH}"', ENGLISH),
    (f"<think>It is soft.\nSo what?</think>\n{ENGLISH}", ENGLISH),
    (f'"OPEN" and "SHUT". {ENGLISH}', f'"OPEN" and "SHUT". {ENGLISH}'),
    (f"{ENGLISH} cafe\u0301", f"{ENGLISH} caf\u00e9"),
  ],
)
def test_wrappings_are_taken_off(answer, text):
  assert checks.read(GENERAL, answer) == (text, "")


@pytest.mark.parametrize(
  "answer, why",
  [
    ("", "empty"),
    (" \n", "empty"),
    ("<think>It is soft and has many colours.", "empty"),
    ("I'm sorry, but I can't help with that.", "refusal"),
    ("I’m sorry, but no. " + ENGLISH, "refusal"),
    ("I cannot identify the people in this image. " + ENGLISH, "refusal"),
    ("No image was provided, so here is nothing. " + ENGLISH, "refusal"),
    ("抱歉\uff0c我无法描述这张图片。" + CHINESE, "refusal"),
    ("A field of colours.", "too short (4 words)"),
    (ENGLISH * 4, "too long (236 words)"),
    (ENGLISH + ' "' + "word " * 1100 + '"', "too long"),
    (GERMAN, "wrong language (de)"),
    (CHINESE, "wrong language (zh)"),
    (f"{ENGLISH} \x07", "invalid characters (1)"),
    ("The cup stands on the table and " * 20, "repetition"),
  ],
)
def test_bad_answers_have_a_reason(answer, why):
  assert reason(GENERAL, answer).startswith(why)


def test_quoted_text_is_not_judged_as_the_caption():
  german_sign = f'{ENGLISH} The sign reads "{GERMAN}" and "{GERMAN}".'
  assert reason(GENERAL, german_sign) == ""
  apology = f"A hand-written note says \"I'm sorry, I can't help\". {ENGLISH}"
  assert reason(GENERAL, apology) == ""
  assert checks.count_words('two words "and five in the quote"') == 2
  assert checks.count_words("一辆红色自行车靠在墙上") == 6
  assert checks.quotes('"a b" “c” 「d」 «e»') == ["a b", "c", "d", "e"]


def test_short_texts_are_not_judged_by_a_language_that_cannot_be_told():
  short = Wish("edit", "en", "short")
  assert reason(short, "Make the cat red", references=1) == ""
  assert reason(short, "把猫变成红色的", references=1).startswith("wrong lang")
  assert reason(Wish("edit", "zh", "short"), "添加一盏灯", references=1) == ""


@pytest.mark.parametrize(
  "language, text",
  [
    ("zh", "把图1和图2融合成一张更温暖的画面"),
    ("ja", "図1の犬を図2のソファに置いてください"),
    ("ko", "1번 그림의 개를 2번 그림의 소파 위에 앉혀 주세요"),
    ("ru", "Посади собаку с картинки 1 на диван с картинки 2"),
    ("ar", "ضع الكلب من الصورة 1 على الأريكة في الصورة 2"),
  ],
)
def test_scripts_tell_languages_apart(language, text):
  for asked in ("zh", "ja", "ko", "ru", "ar", "en"):
    why = reason(Wish("edit", asked, "short"), text, references=2)
    assert why == ("" if asked == language else f"wrong language ({language})")


def test_text_that_is_known_must_be_there():
  wish = Wish("text", "en", "medium", "poster")
  answer = f'{ENGLISH} The headline is "GRAND   OPENING" above "50 % off".'
  assert reason(wish, answer, known_text=["GRAND OPENING", "50 % off"]) == ""
  assert (
    reason(wish, answer, known_text=["GRAND OPENING", "Now"])
    == "quoted text missing (Now)"
  )
  assert reason(wish, ENGLISH) == "quoted text missing (no quotes)"
  # Other kinds may leave text out.
  assert reason(GENERAL, ENGLISH, known_text=["Now"]) == ""


def test_instructions_are_orders_that_name_every_reference():
  wish = Wish("edit", "en", "medium")
  fine = (
    "Put the dog of image 1 on the sofa of image 2, and light it from the left."
  )
  assert reason(wish, fine, references=2) == ""
  assert reason(wish, fine, references=3) == "reference not named (image 3)"
  twelve = fine.replace("image 2", "image 12")
  assert reason(wish, twelve, references=2) == "reference not named (image 2)"
  told = "The image shows a dog of image 1 on the sofa of image 2, as it was."
  assert reason(wish, told, references=2) == "not an instruction"
  assert reason(wish, "The image should be brighter, and so should the dog be"
                      " on the sofa.", references=1) == ""  # fmt: skip


def test_structured_captions_are_written_in_one_form():
  wish = Wish("structured", "en", "")
  answer = f"Sure:\n```json\n{json.dumps(STRUCTURED, indent=2)}\n```"
  text, why = checks.read(wish, answer)
  assert why == "" and json.loads(text) == STRUCTURED
  assert structured.write(structured.read(text)) == text
  extra = {**STRUCTURED, "note": "mine"}
  assert json.loads(checks.read(wish, json.dumps(extra))[0]) == STRUCTURED
  numbers = copy.deepcopy(STRUCTURED)
  numbers["entities"][0]["id"] = numbers["relations"][0]["subject"] = 7
  assert '"id": "7"' in checks.read(wish, json.dumps(numbers))[0]


@pytest.mark.parametrize(
  "path, value, why",
  [
    (("entities",), [], "no entities"),
    (("entities",), {}, "entities is no list"),
    (("relations",), None, "relations is no list"),
    (("summary",), " ", "it has no summary"),
    (("type",), True, "it has no type"),
    (("entities", 0, "name"), "", "an entity has no name"),
    (("entities", 0, "id"), "e2", "two entities have one id"),
    (("entities", 0, "attributes"), [], "attributes are no object"),
    (("entities", 0), "e1", "an entity is no object"),
    (("relations", 0, "object"), "e9", "a relation has an unknown object"),
    (("relations", 0, "predicate"), None, "a relation has no predicate"),
  ],
)
def test_json_that_breaks_the_schema_has_a_reason(path, value, why):
  broken = copy.deepcopy(STRUCTURED)
  inner = broken
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  wish = Wish("structured", "en", "")
  assert reason(wish, json.dumps(broken)) == f"JSON invalid ({why})"


@pytest.mark.parametrize(
  "answer, why",
  [
    (ENGLISH, "JSON invalid (no object)"),
    (json.dumps(STRUCTURED)[:-9], "JSON invalid ("),
    ("{" * 100_000 + "}", "JSON invalid ("),
    ("I'm sorry, I can't help with that.", "refusal"),
    (
      json.dumps(STRUCTURED).replace("Two boxes that are joined by an arrow "
      "from left to right.", GERMAN), "wrong language (de)",
    ),
  ],
)  # fmt: skip
def test_what_is_no_json_has_a_reason(answer, why):
  assert reason(Wish("structured", "en", ""), answer).startswith(why)
