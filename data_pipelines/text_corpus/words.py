# SPDX-License-Identifier: Apache-2.0
"""Random text without meaning, in English words and common Chinese characters.

A VAE must keep strokes; what they say does not matter, and text without
meaning lets no reader guess what it cannot see.
"""

import numpy as np

LANGUAGES = ("en", "zh")
_ENGLISH_TEXT = (
  "a the of and to in is that for it with as was on be at by this had not are "
  "but from or have an they which one you were all her she there would their "
  "we him been has when who will no more if out so what up said its about "
  "into than them can only other time new some could these two may first then "
  "do any like my now over such our man me even most made after also did many "
  "off before must well back through years where much your way down should "
  "because long each just state those people too how little good world "
  "make very year still see own work day get here between both life being "
  "under three never know same last another while us might great old came "
  "since against go right used take table figure report market price growth "
  "number quarter chapter method result section value energy water river city"
)
_ENGLISH = _ENGLISH_TEXT.split()
_CHINESE = (
  "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
  "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
  "日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政"
  "美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员"
  "解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件"
)
_DIGITS = "0123456789"


def characters(language: str) -> str:
  """Every character that `sentence` may use, to choose a font by."""
  if language == "zh":
    return _CHINESE + _DIGITS + "，。"
  return "".join(sorted(set("".join(_ENGLISH).upper()))) + _DIGITS + ".,"


def sentence(rng: np.random.Generator, language: str) -> str:
  """One sentence; now and then it holds a number."""
  if language == "zh":
    parts = [
      "".join(rng.choice(list(_CHINESE), int(rng.integers(3, 12))))
      for _ in range(int(rng.integers(1, 4)))
    ]
    if rng.random() < 0.3:
      parts.append(_number(rng))
    return "，".join(parts) + "。"
  count = int(rng.integers(4, 14))
  drawn = [str(w) for w in rng.choice(_ENGLISH, count)]
  if rng.random() < 0.3:
    drawn[int(rng.integers(1, count))] = _number(rng)
  if rng.random() < 0.3:
    drawn[count // 2] += ","
  drawn[0] = drawn[0].capitalize()
  return " ".join(drawn) + "."


def heading(rng: np.random.Generator, language: str) -> str:
  """A few words without a full stop."""
  if language == "zh":
    return "".join(rng.choice(list(_CHINESE), int(rng.integers(3, 8))))
  drawn = rng.choice(_ENGLISH, int(rng.integers(2, 5)))
  return " ".join(str(w).capitalize() for w in drawn)


def _number(rng: np.random.Generator) -> str:
  return "".join(rng.choice(list(_DIGITS), int(rng.integers(1, 5))))
