# SPDX-License-Identifier: Apache-2.0
"""CPU metrics of records against Pillow, imagehash and known inputs."""

import hashlib
import io

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from skimage import data as photos

from data_pipelines import codec, images
from data_pipelines.filters import encoded, metrics, pixels

ORIENTATION, EXIF_IFD, EXIF_WIDTH, EXIF_HEIGHT = 0x112, 0x8769, 0xA002, 0xA003


def encode(image, format="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, format, **options)
  return buffer.getvalue()


def record(data, caption="a cup", references=()):
  references = tuple(images.from_bytes(r) for r in references)
  return codec.Record(
    id="x",
    task="ti2i" if references else "t2i",
    caption=caption,
    kind="user",
    target=images.from_bytes(data),
    references=references,
    provenance={},
  )


def measure(data, caption="a cup", references=()):
  item = record(data, caption, references)
  decoded = tuple(images.decode_image(r) for r in item.references)
  return metrics.measure(item, images.decode_image(item.target), decoded)


def noise(width, height, mode="RGB", seed=0):
  channels = len(mode)
  values = np.random.default_rng(seed).integers(0, 256, (height, width, 4))
  return Image.fromarray(values[..., :channels].astype(np.uint8))


@pytest.fixture(scope="module")
def photo():
  return Image.fromarray(photos.coffee())  # 600 x 400


def test_every_column_is_there_and_fits_arrow(photo):
  rows = [
    measure(encode(photo)),
    measure(encode(photo, "JPEG"), references=[encode(photo)]),
    measure(encode(noise(1, 1, "RGBA")), caption=""),
  ]
  schema = pa.schema(list(metrics.METRICS.items()))
  table = pa.Table.from_pylist(rows, schema)
  assert all(row.keys() == metrics.METRICS.keys() for row in rows)
  assert table.to_pylist() == rows  # nothing was cut or rounded


def test_size_and_file(photo):
  data = encode(photo, "JPEG", quality=80)
  row = measure(data)
  assert (row["width"], row["height"]) == (600, 400)
  assert (row["short_side"], row["pixels"], row["aspect"]) == (400, 240000, 1.5)
  assert row["bytes"] == len(data)
  assert row["sha256"] == hashlib.sha256(data).hexdigest()
  assert row["format"] == "JPEG" and row["source_mode"] == "RGB"
  assert row["references"] == 0 and row["reference_short_side"] is None


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "RGBA", "LA", "I;16"])
def test_the_mode_of_the_file_is_kept(photo, mode):
  image = photo.convert("L").convert("I;16") if mode == "I;16" else (
    photo.convert(mode)
  )  # fmt: skip
  assert measure(encode(image))["source_mode"] == mode


def test_cmyk_jpeg(photo):
  assert measure(encode(photo.convert("CMYK"), "JPEG"))["source_mode"] == "CMYK"


@pytest.mark.parametrize("quality", [1, 5, 10, 30, 50, 75, 95, 99, 100])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_quality_is_exact_for_libjpeg(photo, quality, mode):
  data = encode(photo.convert(mode).crop((0, 0, 64, 64)), "JPEG",
                quality=quality)  # fmt: skip
  found = encoded.file_metrics(data)["jpeg_quality"]
  assert found == pytest.approx(quality, abs=0.01)


def test_jpeg_quality_is_null_elsewhere(photo):
  assert encoded.file_metrics(encode(photo, "WEBP"))["jpeg_quality"] is None
  assert encoded.file_metrics(encode(photo))["jpeg_quality"] is None


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_blockiness_sees_what_the_quality_does_not(name):
  clean = Image.fromarray(getattr(photos, name)()).convert("RGB")
  low = Image.open(io.BytesIO(encode(clean, "JPEG", quality=15)))
  hidden = encode(low.crop((3, 5, *low.size)), "JPEG", quality=95)
  clean_row, hidden_row = measure(encode(clean)), measure(hidden)
  assert hidden_row["jpeg_quality"] == pytest.approx(95, abs=0.01)
  assert clean_row["blockiness"] < 1.15
  assert hidden_row["blockiness"] > 1.4
  steps = [
    measure(encode(clean, "JPEG", quality=q))["blockiness"]
    for q in (90, 60, 30, 15)
  ]
  assert steps == sorted(steps)


def test_blockiness_needs_both_directions():
  stripes = np.zeros((64, 64), np.uint8)
  stripes[:, ::8] = 20
  assert pixels.blockiness(stripes) == pytest.approx(1.0)
  both = np.kron(np.indices((8, 8)).sum(0) % 2 * 20, np.ones((8, 8)))
  assert pixels.blockiness(both.astype(np.uint8)) > 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read_and_size_is_as_seen(photo, orientation):
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  row = measure(encode(photo, "JPEG", exif=exif))
  assert row["orientation"] == orientation and not row["orientation_conflict"]
  assert (row["width"] < row["height"]) == (orientation >= 5)


@pytest.mark.parametrize("tag", [0, 9, 4000])
def test_a_nonsense_orientation_counts_as_none(photo, tag):
  exif = Image.Exif()
  exif[ORIENTATION] = tag
  assert measure(encode(photo, "JPEG", exif=exif))["orientation"] == 1


def test_pixels_that_were_turned_without_their_tag(photo):
  exif = Image.Exif()
  exif[ORIENTATION] = 6
  exif.get_ifd(EXIF_IFD).update({EXIF_WIDTH: 600, EXIF_HEIGHT: 400})
  right = measure(encode(photo, "JPEG", exif=exif))
  turned = photo.transpose(Image.Transpose.ROTATE_270)
  wrong = measure(encode(turned, "JPEG", exif=exif))
  assert not right["orientation_conflict"] and wrong["orientation_conflict"]
  scaled = measure(encode(photo.resize((300, 200)), "JPEG", exif=exif))
  assert not scaled["orientation_conflict"]


def test_damaged_exif_is_no_conflict(photo):
  row = measure(encode(photo, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
  assert row["orientation"] == 1 and not row["orientation_conflict"]


def test_frames(photo):
  small = photo.resize((60, 40))
  more = [noise(60, 40, seed=i) for i in range(2)]
  for format in ("PNG", "WEBP"):
    data = encode(small, format, save_all=True, append_images=more)
    assert encoded.file_metrics(data)["frames"] == 3
    assert encoded.file_metrics(encode(small, format))["frames"] == 1


def test_transparent_pixels_count_as_white():
  values = np.array(noise(64, 64, "RGBA"))
  values[..., 3] = 0
  hidden = measure(encode(Image.fromarray(values)))
  white = measure(encode(Image.new("RGB", (64, 64), "white")))
  same = [
    "entropy", "contrast", "sharpness", "phash", "thumb", "white_share",
    "flat_share", "black_share",
  ]  # fmt: skip
  assert [hidden[k] for k in same] == [white[k] for k in same]
  assert hidden["transparent_share"] == 1 and white["transparent_share"] == 0
  values[32:, :, 3] = 255
  half = measure(encode(Image.fromarray(values)))
  assert half["transparent_share"] == pytest.approx(0.5)


def test_entropy_contrast_and_extremes(photo):
  grey = photo.convert("L")
  row = measure(encode(photo))
  assert row["entropy"] == pytest.approx(grey.entropy())
  assert row["contrast"] == pytest.approx(np.asarray(grey).std(), rel=1e-6)
  black = measure(encode(Image.new("RGB", (40, 40), (3, 3, 3))))
  assert black["black_share"] == black["flat_share"] == 1
  assert black["entropy"] == black["sharpness"] == black["contrast"] == 0
  assert measure(encode(noise(256, 256)))["entropy"] > 7.3


def test_sharpness_falls_with_blur(photo):
  from PIL import ImageFilter

  found = [
    measure(encode(photo.filter(ImageFilter.GaussianBlur(r))))["sharpness"]
    for r in (0, 1, 3)
  ]
  assert found[0] > 5 * found[1] > 5 * found[2]


def test_upright_changes_sign_when_turned_over():
  ramp = np.linspace(255, 0, 90)[:, None].repeat(90, 1).astype(np.uint8)
  assert pixels.upright(ramp) > 0.5
  assert pixels.upright(ramp[::-1]) < -0.5
  assert pixels.upright(ramp.T) < -0.5


def test_hashes_are_those_of_imagehash(photo):
  row = measure(encode(photo))
  for name in ("phash", "dhash"):
    expected = getattr(imagehash, name)(photo.convert("L"))
    assert row[name] == int(str(expected), 16)
  assert row["thumb"] == photo.resize((8, 8), Image.Resampling.BOX).tobytes()


def test_hashes_survive_resizing_and_recompression(photo):
  large = photo.resize((1800, 1200), Image.Resampling.LANCZOS)  # averaged first
  first, second = measure(encode(photo)), measure(encode(large, "JPEG"))
  assert (first["phash"] ^ second["phash"]).bit_count() <= 2
  thumbs = [np.frombuffer(r["thumb"], np.uint8).astype(int)
            for r in (first, second)]  # fmt: skip
  assert np.abs(thumbs[0] - thumbs[1]).mean() < 2


def test_edits(photo):
  changed = photo.copy()
  changed.paste((255, 0, 0), (300, 200, 330, 230))
  source = encode(photo)
  none = measure(encode(photo, "JPEG", quality=70), references=[source])
  local = measure(encode(changed), references=[source])
  all_ = measure(encode(noise(600, 400)), references=[source])
  assert none["edit_change"] < 0.03 and none["edit_similarity"] > 0.99
  assert local["edit_change"] > 0.1 and local["edit_similarity"] > 0.95
  assert all_["edit_similarity"] < 0.2
  # A copy of any reference is no change; any resemblance is resemblance.
  two = measure(
    encode(changed), references=[encode(noise(300, 200)), encode(changed)]
  )
  assert two["edit_change"] == 0 and two["edit_similarity"] == pytest.approx(1)
  assert two["references"] == 2 and two["reference_short_side"] == 200


@pytest.mark.parametrize("side", [40, 96, 128, 600])
def test_compression_is_no_edit_at_any_size(photo, side):
  source = photo.resize((side * 3 // 2, side), Image.Resampling.LANCZOS)
  target = encode(source, "JPEG", quality=80)
  row = measure(target, references=[encode(source)])
  assert row["edit_change"] < 0.03


def test_cutting_out_is_a_change():
  source = Image.new("RGB", (64, 64), "white")
  source.paste((200, 0, 0), (16, 16, 48, 48))
  cut = source.convert("RGBA")
  cut.paste((255, 255, 255, 0), (0, 0, 64, 16))
  row = measure(encode(cut), references=[encode(source)])
  assert row["edit_change"] == pytest.approx(0.25)


def test_a_flat_edit_resembles_nothing():
  flat = encode(Image.new("RGB", (32, 32), "grey"))
  row = measure(flat, references=[flat])
  assert (row["edit_change"], row["edit_similarity"]) == (0, 0)


def test_caption_only_agrees(photo):
  item = record(encode(photo), "two cups")
  row = metrics.measure(item, photo, ())
  few = metrics.caption_only(item)
  assert few == {key: row[key] for key in few} and few["tokens"] == 2
  counted = metrics.caption_only(item, tokenizer=len)
  assert counted["tokens"] == len("two cups")
