# SPDX-License-Identifier: Apache-2.0
"""Rewards by CLIP, an aesthetic head and patch features, against torch."""

import numpy as np
import pytest
import safetensors.numpy

from qi2_jax.interop import aesthetic as heads
from qi2_jax.interop import image_text, patch_features
from qi2_jax.rewards import aesthetic, clip, consistency
from qi2_jax.rewards.protocol import Prompt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
folders = pytest.importorskip("image_text_folders")
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(6)]
# Three images of each of two prompts, as in a group.
PROMPTS = [Prompt(t) for t in ("a red circle", "海边 12") for _ in range(3)]
NONE = [()] * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("clip")
  return (*folders.clip(path), str(path))


@pytest.fixture(scope="module")
def expected(model):
  """`(unit image embeddings, logits of the pairs, cosines of the pairs)`."""
  theirs, tokenizer, processor, _ = model
  ids = tokenizer(
    [p.text for p in PROMPTS], padding="max_length", max_length=21,
    return_tensors="pt",
  )["input_ids"]  # fmt: skip
  pixels = processor(IMAGES, return_tensors="pt")["pixel_values"]
  with torch.no_grad():
    out = theirs(input_ids=ids, pixel_values=pixels)
  both = out.image_embeds * out.text_embeds
  logits = out.logits_per_image.diagonal()
  return out.image_embeds.numpy(), logits.numpy(), both.sum(1).numpy()


def test_alignment_equals_transformers(model, expected):
  scorer = image_text.load(model[-1])
  _, logits, cosines = expected
  found = clip.alignment(scorer)(IMAGES, PROMPTS, NONE)
  assert list(found) == ["clip"] and found["clip"].dtype == np.float64
  assert np.abs(found["clip"] - cosines).max() <= 1e-5 < cosines.std()
  found = clip.scaled_alignment(scorer)(IMAGES, PROMPTS, NONE)["clip"]
  assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()


def test_aesthetics_equal_torch(model, expected, tmp_path):
  layer = torch.nn.Linear(24, 1)
  file = str(tmp_path / "head.safetensors")
  safetensors.numpy.save_file(
    {k: v.detach().numpy() for k, v in layer.state_dict().items()}, file
  )
  with torch.no_grad():
    marks = layer(torch.tensor(expected[0]))[:, 0].numpy()
  scorer = image_text.load(model[-1])
  score = aesthetic.aesthetic(scorer, heads.load(file, scorer.width))
  found = score(IMAGES, PROMPTS, NONE)
  assert list(found) == ["aesthetic"]
  np.testing.assert_allclose(found["aesthetic"], marks, atol=1e-5)


def unit(states_BND):
  """Standardised, then of length one."""
  normed = torch.nn.functional.layer_norm(states_BND, states_BND.shape[-1:])
  return torch.nn.functional.normalize(normed, dim=-1).numpy()


def test_features_are_the_patches_of_squeezed_images(model, tmp_path):
  theirs, _, processor, path = model
  wide = [RNG.integers(0, 256, (30, 77, 3), np.uint8) for _ in range(3)]
  found = patch_features.load(path, batch_size=2)(wide)
  assert found.shape == (3, 5, 5, 48)
  pixels = processor(
    wide, size={"height": 40, "width": 40}, do_center_crop=False,
    return_tensors="pt",
  )["pixel_values"]  # fmt: skip
  with torch.no_grad():
    states = theirs.vision_model(pixels).last_hidden_state[:, 1:]
  np.testing.assert_allclose(
    found.reshape(3, 25, 48), unit(states), atol=1e-5
  )  # fmt: skip


def test_features_of_dinov2_are_its_last_states(tmp_path):
  config = transformers.Dinov2Config(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2,
    image_size=70, patch_size=14,
  )  # fmt: skip
  theirs = folders.add_noise(transformers.Dinov2Model(config))
  theirs.save_pretrained(tmp_path)
  image = RNG.integers(0, 256, (70, 70, 3), np.uint8)
  found = patch_features.load(str(tmp_path), batch_size=1)([image])
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  pixels = (image / 255 - mean) / std
  with torch.no_grad():
    states = theirs(
      torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None],
      output_hidden_states=True,
    ).hidden_states[-1][:, 1:]
  assert found.shape == (1, 5, 5, 48)
  np.testing.assert_allclose(found.reshape(1, 25, 48), unit(states), atol=1e-5)


@pytest.mark.parametrize("size", [(12, 12), (13, 29), (5, 7), (64, 48)])
def test_kept_patches_by_brute_force(size):
  edited = RNG.random(size) > 0.97
  h, w = 6, 9
  found = consistency.kept_patches(edited, h, w)
  y = (np.arange(size[0] + 1) * h) / size[0]
  x = (np.arange(size[1] + 1) * w) / size[1]
  for i in range(h):
    for j in range(w):
      # A pixel belongs to every patch that it overlaps.
      rows = (y[:-1] < i + 1 - 1e-9) & (y[1:] > i + 1e-9)
      columns = (x[:-1] < j + 1 - 1e-9) & (x[1:] > j + 1e-9)
      assert found[i, j] == (not edited[np.ix_(rows, columns)].any())
  assert consistency.kept_patches(np.zeros(size, bool), h, w).all()


def mean_colours(images):
  """Stand-in features that are exactly local: unit mean colour of 8 x 8 px."""
  x = np.stack(images).astype(np.float64).reshape(-1, 8, 8, 8, 8, 3) + 1
  x = x.mean(axis=(2, 4))
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_only_what_an_edit_must_not_touch_counts():
  source = RNG.integers(0, 256, (64, 64, 3), np.uint8)
  target = source.copy()
  target[8:24, 16:40] = 255 - target[8:24, 16:40]
  other = source.copy()
  other[8:24, 16:40] = 0  # another edit of the same place
  spoilt = target.copy()
  spoilt[40:] = (250, 0, 0)
  score = consistency.consistency(mean_colours)
  prompt = Prompt("edit", "edit", target)
  found = score([target, other, spoilt], [prompt] * 3, [(source,)] * 3)
  values = found["consistency"]
  assert values[0] == pytest.approx(1) == values[1]
  changed, kept = 3 * 8, 64 - 2 * 3
  cosine = np.sum(mean_colours([spoilt])[0] * mean_colours([source])[0], -1)
  assert values[2] == pytest.approx(
    (kept - changed + cosine[5:].sum()) / kept
  )  # fmt: skip
  assert values[2] < 0.95
  # Each image is held against its own source.
  both = [Prompt("edit", "edit", target), Prompt("edit", "edit", spoilt)]
  own, crossed = (
    score(images, both, [(source,), (spoilt,)])["consistency"]
    for images in ([target, spoilt], [spoilt, target])
  )
  np.testing.assert_allclose(own, 1)
  assert crossed.max() < 0.95


def test_what_has_no_region_to_keep():
  score = consistency.consistency(mean_colours)
  image = IMAGES[0]
  asked = [
    Prompt("t2i"), Prompt("edit"), Prompt("edit", "edit", image[:32]),
    Prompt("edit", "edit", 255 - image // 8),
  ]  # fmt: skip
  sources = [(), (image,), (image,), (image // 8,)]
  values = score([image] * 4, asked, sources)["consistency"]
  np.testing.assert_array_equal(values, [0, np.nan, np.nan, 0])


def test_random_features_see_differences():
  features = patch_features.load("random", batch_size=2)
  found = features([IMAGES[0], IMAGES[0], IMAGES[1]])
  np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)
  assert np.abs(found[0] - found[1]).max() < 1e-5
  assert np.abs(found[0] - found[2]).max() > 1e-2
