# SPDX-License-Identifier: Apache-2.0
"""The built-in tokenizer, and loading one from files."""

import json

import pytest

from qi2_jax.conditioning import templates, tokenizer
from qi2_jax.errors import InputError

AWKWARD = (
  "", " ", "a red circle", "汉字と かな", "naïve café", "x\n\ny\t z",
  "1234 5,6", "👩‍🚀 ok", "<image1> <image12>", templates.render("go", 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def built():
  return tokenizer.built_in()


def encode(backend, text):
  return backend.encode(text, add_special_tokens=False).ids


def test_no_text_is_out_of_vocabulary(built):
  backend = built.backend_tokenizer
  for text in AWKWARD:
    ids = encode(backend, text)
    assert backend.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("word", ["red", "circle", "bottom", "replace", "Q"])
def test_known_words_are_one_token(built, word):
  backend = built.backend_tokenizer
  assert len(encode(backend, f"a {word}")) == 2


def test_files_read_back_alike(built, tmp_path):
  tokenizer.save(built, str(tmp_path))
  loaded = tokenizer.load(str(tmp_path))
  for text in AWKWARD:
    assert encode(loaded, text) == encode(built.backend_tokenizer, text)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
  with pytest.raises(InputError, match="holds no readable tokenizer"):
    tokenizer.load(str(tmp_path))


def test_another_family_is_refused(built, tmp_path):
  tokenizer.save(built, str(tmp_path))
  path = tmp_path / "tokenizer.json"
  path.write_text(path.read_text().replace("<|image_pad|>", "<|other|>"))
  config = tmp_path / "tokenizer_config.json"
  fields = json.loads(config.read_text())
  fields.pop("extra_special_tokens", None)
  config.write_text(json.dumps(fields))
  with pytest.raises(InputError, match=r"does not know <.image_pad.>"):
    tokenizer.load(str(tmp_path))
