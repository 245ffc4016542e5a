# SPDX-License-Identifier: Apache-2.0
"""Images and texts are prepared as transformers prepares them."""

import json

import numpy as np
import pytest
import tokenizers
from PIL import Image

from qi2_jax.errors import InputError
from qi2_jax.interop import image_processor, text_tokens
from qi2_jax.interop.image_processor import prepare

pytest.importorskip("transformers")
clip_images = pytest.importorskip(
  "transformers.models.clip.image_processing_pil_clip"
)
siglip_images = pytest.importorskip(
  "transformers.models.siglip.image_processing_pil_siglip"
)

SIZES = ((40, 40), (61, 90), (200, 33), (9, 14), (32, 77), (31, 31), (1, 5))
# Crops larger than the image, odd gaps on either side, other filters.
FIELDS = {
  "clip": {"size": {"shortest_edge": 31}, "crop_size": 24},
  "small": {"size": {"shortest_edge": 20}, "crop_size": 33},
  "odd": {"size": {"shortest_edge": 25}, "crop_size": 20, "resample": 2},
  "plain": {
    "size": {"height": 20, "width": 26}, "do_center_crop": False,
    "do_normalize": False,
  },
  "bytes": {"do_resize": False, "crop_size": 30, "do_rescale": False},
}  # fmt: skip


def images():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def equal(image, ours, theirs):
  # As a Pillow image, for theirs guesses which axis of an array is which.
  (expected,) = theirs([Image.fromarray(image)])["pixel_values"]
  np.testing.assert_array_equal(
    prepare(image, ours), np.moveaxis(expected, 0, -1)
  )


@pytest.mark.parametrize("name", FIELDS)
def test_clip_images_are_equal_to_the_bit(name, tmp_path):
  theirs = clip_images.CLIPImageProcessorPil(**FIELDS[name])
  theirs.save_pretrained(tmp_path)
  ours = image_processor.load(str(tmp_path), "clip")
  for image in images():
    equal(image, ours, theirs)


def test_siglip_images_are_equal_to_the_bit(tmp_path):
  theirs = siglip_images.SiglipImageProcessorPil(
    size={"height": 21, "width": 21}
  )
  theirs.save_pretrained(tmp_path)
  ours = image_processor.load(str(tmp_path), "siglip")
  for image in images():
    equal(image, ours, theirs)
  # The same fields under the name that holds all processors of a model.
  text = (tmp_path / "preprocessor_config.json").read_text()
  (tmp_path / "preprocessor_config.json").unlink()
  new = tmp_path / "processor_config.json"
  new.write_text(json.dumps({"image_processor": json.loads(text)}))
  assert image_processor.load(str(tmp_path), "siglip") == ours


@pytest.mark.parametrize("kind, theirs", [
  ("clip", clip_images.CLIPImageProcessorPil()),
  ("siglip", siglip_images.SiglipImageProcessorPil()),
])  # fmt: skip
def test_absent_fields_are_the_classes_own(kind, theirs):
  ours = image_processor.parse({}, kind)
  assert ours == image_processor.parse(theirs.to_dict(), kind)
  image = images()[1]
  equal(image, ours, theirs)


def test_the_first_files_have_one_number():
  ours = image_processor.parse({"size": 31, "crop_size": 24}, "clip")
  assert ours == image_processor.parse(
    {"size": {"shortest_edge": 31}, "crop_size": {"height": 24, "width": 24}},
    "clip",
  )  # fmt: skip


def test_transparency_is_white_and_not_what_lies_under_it():
  ours = image_processor.parse({"size": 8, "do_center_crop": False}, "siglip")
  image = np.zeros((8, 8, 4), np.uint8)
  image[..., 0] = 200
  np.testing.assert_array_equal(prepare(image, ours), np.ones((8, 8, 3)))
  image[..., 3] = 255
  np.testing.assert_array_equal(
    prepare(image, ours), prepare(image[..., :3], ours)
  )


def test_the_whole_image_is_squeezed():
  ours = image_processor.parse({"size": 12, "crop_size": 8}, "clip").whole(10)
  assert prepare(images()[2], ours).shape == (10, 10, 3)
  assert (ours.shortest, ours.crop) == (None, None)


def test_bad_images_and_files_are_named(tmp_path):
  ours = image_processor.parse({}, "clip")
  for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
    with pytest.raises(InputError, match="cannot be prepared"):
      prepare(bad, ours)
  with pytest.raises(InputError, match=r"size=\{'longest_edge': 3\}"):
    image_processor.parse({"size": {"longest_edge": 3}}, "siglip")
  with pytest.raises(InputError, match=r"preprocessor_config\.json does not"):
    image_processor.load(str(tmp_path), "clip")
  (tmp_path / "processor_config.json").write_text("{}")
  with pytest.raises(InputError, match="has no image_processor"):
    image_processor.load(str(tmp_path), "clip")


def write_sentencepiece(folder):
  """The kind of tokenizer.json that SigLIP has: pieces, then `</s>`."""
  pieces = ["</s>", "<unk>", "▁", "▁a", "▁red", "▁circle", "▁its", "s"]
  made = tokenizers.Tokenizer(
    tokenizers.models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], 1)
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 0)]
  )
  made.save(str(folder / "tokenizer.json"))
  about = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(about))


def test_siglip_texts_lose_case_and_punctuation(tmp_path):
  write_sentencepiece(tmp_path)
  tokens = text_tokens.load(str(tmp_path), "siglip", 6)
  ids = tokens(["a red circle", " A  'Red'\n circle!", "it's", "", "a " * 9])
  expected = [
    [3, 4, 5, 0, 0, 0], [3, 4, 5, 0, 0, 0], [6, 0, 0, 0, 0, 0], [0] * 6,
    [3, 3, 3, 3, 3, 0],
  ]  # fmt: skip
  np.testing.assert_array_equal(ids, expected)
  assert ids.dtype == np.int32


def test_bad_tokenizers_are_named(tmp_path):
  write_sentencepiece(tmp_path)
  about = tmp_path / "tokenizer_config.json"
  about.write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
  with pytest.raises(InputError, match="own padding token '<pad>'"):
    text_tokens.load(str(tmp_path), "siglip", 6)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(InputError, match="no readable tokenizer"):
    text_tokens.load(str(tmp_path), "siglip", 6)
  about.unlink()
  with pytest.raises(InputError, match=r"tokenizer_config\.json does not"):
    text_tokens.load(str(tmp_path), "siglip", 6)
