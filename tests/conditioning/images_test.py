# SPDX-License-Identifier: Apache-2.0
"""Reference images and sizes against diffusers' and Pillow's."""

import numpy as np
import pytest
from PIL import Image

from qi2_jax.conditioning import images as lib
from qi2_jax.errors import InputError


@pytest.mark.parametrize("side", [256, 1024, 2048])
def test_sizes_of_equal_area_are_the_public_pipelines(side):
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21 as public

  for ratio in np.geomspace(0.2, 5, 40):
    width, height, _ = public.calculate_dimensions(side * side, ratio)
    assert lib.area_size(ratio, side) == (height, width)


@pytest.mark.parametrize("name", lib.OFFICIAL_SIZES)
def test_official_ratios(name):
  width, height = lib.OFFICIAL_SIZES[name]
  assert lib.named_size(name, 2048) == (height, width)
  assert height % 32 == width % 32 == 0
  w, h = map(int, name.split(":"))
  assert abs(width / height / (w / h) - 1) < 0.02
  small = lib.named_size(name, 1024)
  assert small == lib.area_size(w / h, 1024)
  assert abs(small[0] * small[1] / 1024**2 - 1) < 0.05


def test_sizes_can_be_written_out():
  assert lib.named_size("1280x768", 512) == (768, 1280)
  for bad in ("16/9", "16:0", "0x32", "wide", "16:9:1", "-1x32"):
    with pytest.raises(InputError, match="neither a ratio"):
      lib.named_size(bad, 512)


def save(tmp_path, image, name="a.png", **options):
  path = tmp_path / name
  image.save(path, **options)
  return str(path)


def test_one_resize_by_pillow(tmp_path):
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (70, 130, 4), np.uint8))
  path = save(tmp_path, image)
  made = lib.load_reference(path, 96, 4)
  expected = image.resize((128, 64), Image.Resampling.LANCZOS)
  np.testing.assert_array_equal(made, np.asarray(expected))
  np.testing.assert_array_equal(lib.load_reference(image, 96, 4), made)
  array = lib.load_reference(np.asarray(image), 96, 4)
  np.testing.assert_array_equal(array, made)
  flat = Image.new("RGB", expected.size, "white")
  flat.paste(expected, mask=expected.getchannel("A"))
  rgb = lib.load_reference(path, 96, 3)
  np.testing.assert_array_equal(rgb, np.asarray(flat))


def test_exif_turns_are_applied(tmp_path):
  image = Image.new("RGB", (128, 64), "white")
  exif = Image.Exif()
  exif[0x0112] = 6
  path = save(tmp_path, image, "a.jpg", exif=exif)
  assert lib.load_reference(path, 96, 3).shape == (128, 64, 3)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_any_mode_becomes_rgba(tmp_path, mode):
  name = "a.tiff" if mode == "CMYK" else "a.png"
  image = Image.new("L", (64, 64), 255).convert(mode)
  made = lib.load_reference(save(tmp_path, image, name), 64, 4)
  np.testing.assert_array_equal(made, np.full((64, 64, 4), 255))


def test_sixteen_bits_are_scaled(tmp_path):
  pixels = np.full((64, 64), 200 * 257, np.uint16)
  path = save(tmp_path, Image.fromarray(pixels))
  made = lib.load_reference(path, 64, 4)
  assert (made[..., :3] == 200).all() and (made[..., 3] == 255).all()


def test_bad_images_are_one_sentence(tmp_path):
  empty, text = tmp_path / "empty.png", tmp_path / "text.png"
  empty.write_bytes(b"")
  text.write_text("no image")
  cut = tmp_path / "cut.png"
  save(tmp_path, Image.new("RGB", (99, 99)), cut.name)
  cut.write_bytes(cut.read_bytes()[:60])
  for path in (empty, text, cut, tmp_path / "missing.png", tmp_path):
    with pytest.raises(InputError, match="cannot read image"):
      lib.load_reference(str(path), 64, 4)
  with pytest.raises(InputError, match="has no pixels"):
    lib.load_reference(Image.new("RGB", (0, 5)), 64, 4)
  for array in (np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
    with pytest.raises(InputError, match="pass uint8"):
      lib.load_reference(array, 64, 4)


def test_the_last_reference_decides_the_size():
  references = [np.zeros((32, 64, 3)), np.zeros((96, 32, 3))]
  assert lib.target_size(None, None, references, 64, 16) == (96, 32)
  assert lib.target_size(None, None, [], 64, 16) == (64, 64)
  assert lib.target_size(32, 64, references, 64, 16) == (32, 64)
  with pytest.raises(InputError, match="both --height and --width"):
    lib.target_size(32, None, [], 64, 16)
  for bad in (48, 0, -32, 33):
    with pytest.raises(InputError, match="not a multiple of 32"):
      lib.target_size(bad, 64, [], 64, 16)
