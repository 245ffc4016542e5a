# SPDX-License-Identifier: Apache-2.0
"""Text on objects in scenes: places, light, legibility, photos."""

import dataclasses
import itertools
import json

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from data_pipelines.errors import InputError
from data_pipelines.synthesis import (
  calm,
  camera,
  composed,
  coverage,
  lighting,
  objects,
  painting,
  panels,
  surfaces,
  writing,
)
from data_pipelines.synthesis.fonts import faces_of
from data_pipelines.synthesis.languages import language_of
from data_pipelines.synthesis.sample import Rejected

SIZE = (320, 256)
EN = language_of("en")


def faces(language):
  try:
    return faces_of(language)
  except InputError:
    pytest.skip(f"needs the Debian package {language.package}")


def planned(name, language=EN, size=SIZE, seed=0, photo=""):
  """The first plan of an object that is not rejected."""
  for k in range(20):
    rng = np.random.default_rng([seed, k])
    args = (language, faces(language), size, rng)
    found = composed.plan(name, *args, (), photo)
    if not isinstance(found, Rejected):
      return found
  raise AssertionError(f"{name} was rejected 20 times: {found.reason}")


def lines_of(plan):
  return [line for block in composed.blocks(plan) for line in block.lines]


def ink_of(plan):
  """What the text changes, in grey values: `[H, W]`."""
  one, other = (composed.render(plan, ink).astype(int) for ink in (True, False))
  return np.abs(one - other).max(-1)


def seen_by_cv2(eye, points_N3):
  """The camera's pixels as cv2 computes them."""
  turn, _ = cv2.Rodrigues(eye.axes)
  lens = np.diag([eye.focal, eye.focal, 1.0])
  lens[:2, 2] = eye.centre
  shift = -eye.axes @ eye.position
  pixels, _ = cv2.projectPoints(points_N3, turn, shift, lens, None)
  return pixels[:, 0]


@pytest.mark.parametrize("seed", range(4))
def test_camera_agrees_with_cv2_and_frames_its_points(seed):
  rng = np.random.default_rng(seed)
  points_N3 = rng.normal(size=(12, 3))
  eye = camera.frame(
    points_N3, SIZE, *rng.uniform(-0.5, 0.5, 3), 0.7, 0.8, (0.45, 0.52)
  )
  pixels_N2 = camera.project(eye, points_N3)
  np.testing.assert_allclose(pixels_N2, seen_by_cv2(eye, points_N3), atol=1e-6)
  low, high = pixels_N2.min(0), pixels_N2.max(0)
  np.testing.assert_allclose((low + high) / 2 / SIZE, (0.45, 0.52), atol=1e-9)
  assert ((high - low) / SIZE).max() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("name", ["sign", "book", "chalkboard", "mug"])
def test_surfaces_are_seen_and_traced_back(name):
  plan = planned(name)
  surface = plan.thing.surface
  uv_N2 = np.random.default_rng(0).uniform(0.3, 0.7, (50, 2))
  x, y = camera.project(plan.camera, camera.to_world(surface, uv_N2)).T
  u, v, met = camera.to_surface(plan.camera, surface, x, y)
  assert met.all()
  np.testing.assert_allclose(np.stack([u, v], 1), uv_N2, atol=1e-6)


@pytest.mark.parametrize("name", [*composed.OBJECTS])
def test_marks_are_drawn_where_the_polygon_says(name):
  plan = planned(name, seed=1)
  surface = plan.thing.surface
  u0, v0, u1, v1, _ = writing.around(plan.thing.regions)
  corners = ((u0, v0), (u1, v0), (u1, v1), (u0, v1))
  # Fine textures, and coarse ones, where half a texel is seen.
  for scale, (u, v) in itertools.product((1, 5), corners):
    width, height = (n // scale for n in plan.texels)
    column, row = round(u * width), round(v * height)
    texture = np.zeros((height, width, 4), np.float32)
    texture[..., 3] = 1
    # Around the corner (column, row), not around the middle of a texel.
    half = 3 if scale == 1 else 1
    texture[row - half : row + half, column - half : column + half, :3] = 1
    canvas = np.zeros((SIZE[1], SIZE[0], 3), np.float32)
    painting.paste(canvas, texture, plan.camera, surface)
    weight = canvas[..., 0]
    assert weight.sum() > 1
    rows, columns = np.indices(weight.shape) + 0.5
    found = [(weight * at).sum() / weight.sum() for at in (columns, rows)]
    uv = np.array([[column / width, row / height]])
    wanted = camera.project(plan.camera, camera.to_world(surface, uv))[0]
    assert np.hypot(*(found - wanted)) < 0.25


def distances(polygon, x, y):
  """How far points lie inside (+) or outside (-) a polygon."""
  contour = np.asarray(polygon, np.float32)
  return np.array(
    [
      cv2.pointPolygonTest(contour, (float(a), float(b)), True)
      for a, b in zip(x, y)
    ]
  )


@pytest.mark.parametrize(
  "name, code",
  [
    *((name, "en") for name in composed.OBJECTS),
    ("shop", "th"), ("box", "ar"), ("mug", "zh-vertical"), ("poster", "hi"),
    ("book", "zh"),
  ],
)  # fmt: skip
def test_ink_lies_in_the_polygons_and_fills_them(name, code):
  plan = planned(name, language_of(code), seed=2)
  ink = ink_of(plan)
  y, x = np.nonzero(ink > 12)
  x, y = x + 0.5, y + 0.5
  polygons = [polygon for _, polygon in lines_of(plan)]
  for top_left, top_right, _, bottom_left in np.array(polygons):
    assert top_left[0] < top_right[0] and top_left[1] < bottom_left[1]
  inside = np.max([distances(p, x, y) for p in polygons], axis=0)
  assert inside.min() > -1.5
  if isinstance(plan.thing.surface, camera.Cylinder):
    return  # there a line touches its rectangle on some sides only
  for polygon in polygons:
    own = distances(polygon, x, y) > -1.5
    corners = np.asarray(polygon)
    for a, b in zip(corners, np.roll(corners, -1, 0)):
      along = (b - a) / np.linalg.norm(b - a)
      across = (x[own] - a[0]) * along[1] - (y[own] - a[1]) * along[0]
      assert np.abs(across).min() < 2.5


@pytest.mark.parametrize("name", [*composed.OBJECTS])
def test_letters_stand_out_in_the_finished_picture(name):
  worst = []
  for seed in range(3):
    plan = planned(name, seed=10 + seed)
    plan = dataclasses.replace(
      plan, light=dataclasses.replace(plan.light, grain=0.0, soft=0.0)
    )
    inked, plain = (composed.render(plan, k) / 255 for k in (True, False))
    change = np.abs(inked - plain).max(-1)
    # Pixels that letters cover wholly; thin strokes have few.
    full = change > 0.93 * change.max()
    worst.append(np.quantile(lighting.contrast(inked[full], plain[full]), 0.02))
  assert min(worst) >= composed.LEAST_CONTRAST


def test_plans_without_contrast_are_rejected(monkeypatch):
  monkeypatch.setattr(composed, "LEAST_CONTRAST", 25.0)
  found = composed.plan("sign", EN, faces(EN), SIZE, np.random.default_rng(0))
  assert found == Rejected(composed.TOO_PALE)


def test_same_stream_same_sample():
  def draw(seed):
    rng = np.random.default_rng(seed)
    return composed.draw(EN, faces(EN), SIZE, rng)

  one, again, other = draw(5), draw(5), draw(6)
  np.testing.assert_array_equal(one.image, again.image)
  assert (one.layout, one.caption) == (again.layout, again.caption)
  assert one.layout != other.layout


def test_a_sample_says_what_it_shows():
  for seed in range(12):
    rng = np.random.default_rng(seed)
    sample = composed.draw(EN, faces(EN), SIZE, rng)
    if isinstance(sample, Rejected):
      continue
    assert sample.image.size == SIZE and sample.image.mode == "RGB"
    assert sample.kind == "text-composed-en"
    layout = json.loads(json.dumps(sample.layout))
    assert layout["strategy"] == "composed" and layout["fonts"]
    lines = layout["lines"]
    assert sample.text == "\n".join(line["text"] for line in lines)
    for block in layout["blocks"]:
      assert block["text"] in sample.caption
    assert layout["background"] in sample.caption
    for line in lines:
      polygon = np.array(line["polygon"])
      assert (polygon >= 0).all() and (polygon <= SIZE).all()
      top_left, top_right, bottom_right, bottom_left = polygon
      assert np.cross(
        [*(top_right - top_left), 0], [*(bottom_right - top_right), 0]
      )[2] > 0  # fmt: skip
      assert (bottom_left - top_left)[1] > 0 and (top_right - top_left)[0] > 0


def test_vertical_columns_are_read_from_right_to_left():
  language = language_of("zh-vertical")
  seen = 0
  for seed, name in enumerate(("sign", "screen", "notebook", "mug")):
    plan = planned(name, language, seed=seed)
    for block in composed.blocks(plan):
      quads = np.array([polygon for _, polygon in block.lines])
      if len(quads) < 2:
        continue
      seen += 1
      assert (np.diff(quads.mean(1)[:, 0]) < 0).all()
      first = quads[0]
      assert np.ptp(first[:, 1]) > np.ptp(first[:, 0])
  assert seen


def test_texts_of_the_user_are_written_whole_or_not_at_all():
  text = "Fresh bread\nevery morning at seven"
  rng = np.random.default_rng(3)
  plan = composed.plan("poster", EN, faces(EN), SIZE, rng, (text,))
  assert [w.text for w in plan.written] == [text]
  words = " ".join(line for line, _ in lines_of(plan)).split()
  assert words == text.split()

  def refused(text):
    rng = np.random.default_rng(3)
    return composed.plan("poster", EN, faces(EN), SIZE, rng, (text,))

  assert refused("word " * 2000) == Rejected(writing.NO_ROOM)
  assert refused("an emoji \N{ROCKET}").reason == coverage.NO_GLYPH
  assert refused("a tab\x07").reason == coverage.REFUSED


def test_letters_are_never_smaller_than_allowed():
  def long_plan(count):
    text = ("held " * count).strip()
    rng = np.random.default_rng(3)
    return composed.plan("poster", EN, faces(EN), SIZE, rng, (text,))

  plans = [long_plan(count) for count in (20, 40, 60, 80, 120)]
  assert plans[-1] == Rejected(writing.NO_ROOM)
  longest = [p for p in plans if not isinstance(p, Rejected)][-1]
  for _, polygon in lines_of(longest):
    # In the picture, across the lines: ascenders are about 0.7 em high.
    high = np.linalg.norm(np.subtract(polygon[3], polygon[0]))
    assert high > 0.65 * writing.LEAST * EN.smallest


@pytest.mark.parametrize("seed", range(20))
def test_light_is_bounded_and_keeps_the_order(seed):
  rng = np.random.default_rng(seed)
  light = lighting.draw_light(rng, gloss=True)
  x, y = np.meshgrid(np.linspace(0, 1, 33), np.linspace(0, 1, 29))
  gain, veil = lighting.gain(light, x, y), lighting.veil(light, x, y)
  assert gain.min() >= lighting.DARKEST and gain.max() <= lighting.BRIGHTEST
  assert veil.min() >= 0 and veil.max() <= lighting.GLOSS
  levels = np.linspace(0, 1, 65)[:, None, None]
  out = lighting.mix(levels, gain, veil)
  assert out.min() >= 0 and out.max() <= 1
  # Strictly, until white is reached.
  assert ((np.diff(out, axis=0) > 0) | (out[1:] > 0.999)).all()


def test_slope_gets_brighter_towards_the_light():
  light = lighting.Light(angle=0.0, slope=0.3)
  row = lighting.gain(light, np.linspace(0, 1, 9), np.full(9, 0.5))
  assert (np.diff(row) > 0).all() and row[4] == pytest.approx(1)


def test_shadow_darkens_one_side_and_gloss_its_place():
  light = lighting.Light(
    shadow=0.3, shadow_at=(0.5, 0.5), shadow_soft=0.02,
    gloss=0.2, gloss_at=(0.25, 0.5), gloss_size=0.1,
  )  # fmt: skip
  at = np.array([0.1, 0.9]), np.array([0.5, 0.5])
  np.testing.assert_allclose(lighting.gain(light, *at), (1, 0.7), atol=1e-3)
  peak = lighting.veil(light, np.array([0.25, 0.9]), at[1])
  np.testing.assert_allclose(peak, (0.2, 0), atol=1e-3)


def test_expose_repeats_and_adds_grain_of_the_asked_strength():
  image = np.full((128, 128, 3), 0.5, np.float32)
  light = lighting.Light(grain=0.012, seed=4)
  one, again = (lighting.expose(image, light) for _ in range(2))
  np.testing.assert_array_equal(one, again)
  assert (one / 255).std() == pytest.approx(0.012, rel=0.05)


def test_contrast_is_that_of_wcag():
  # Ratios that the WCAG's own examples give for #777 and #767676 on white.
  white, greys = np.ones(3), np.array([[0x77] * 3, [0x76] * 3, [0, 0, 0]])
  found = lighting.contrast(greys / 255, white)
  np.testing.assert_allclose(found, (4.478, 4.542, 21), atol=1e-3)


@pytest.mark.parametrize("name", sorted({*surfaces.WALLS, *surfaces.DESKS}))
def test_materials_repeat_without_a_seam(name):
  tile = surfaces.material(name, np.random.default_rng(0), 256)
  assert tile.shape == (256, 256, 3) and tile.min() >= 0 and tile.max() <= 1
  for axis in (0, 1):
    inner = np.abs(np.diff(tile, axis=axis)).mean((1 - axis, 2))
    seam = np.abs(tile.take(-1, axis) - tile.take(0, axis)).mean()
    assert seam <= inner.max() * 1.2


def test_entropy_is_that_of_every_window():
  grey = np.random.default_rng(0).integers(0, 256, (9, 11)).astype(np.uint8)
  grey[:5, :6] = 7
  found = calm.entropy(grey, (4, 3))
  assert found.shape == (7, 8)
  for y in range(7):
    for x in range(8):
      window = grey[y : y + 3, x : x + 4] // (256 // calm.LEVELS)
      counts = np.bincount(window.ravel(), minlength=calm.LEVELS)
      wanted = stats.entropy(counts, base=2)
      assert found[y, x] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_plates_go_to_the_calm_part_of_a_photo(corner, tmp_path):
  rng = np.random.default_rng(0)
  width, height = SIZE
  photo = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
  row, column = corner
  calm_box = (
    slice(row * height // 3, (row + 2) * height // 3),
    slice(column * width // 3, (column + 2) * width // 3),
  )
  photo[calm_box] = 120
  path = str(tmp_path / "photo.png")
  Image.fromarray(photo).save(path)
  plan = planned("plate", photo=path)
  assert plan.thing.setting == "photo"
  low = np.array([calm_box[1].start, calm_box[0].start]) - 6
  high = np.array([calm_box[1].stop, calm_box[0].stop]) + 6
  for _, polygon in lines_of(plan):
    assert (np.array(polygon) >= low).all()
    assert (np.array(polygon) <= high).all()
  # The rest of the photo is there as it was.
  plan = dataclasses.replace(plan, light=lighting.Light())
  far = (2 - row * 2) * height // 3, (2 - column * 2) * width // 3
  patch = np.s_[far[0] : far[0] + 20, far[1] : far[1] + 20]
  np.testing.assert_array_equal(composed.render(plan)[patch], photo[patch])


def test_photos_are_used_if_there_are_some(tmp_path):
  path = str(tmp_path / "photo.jpg")
  args = ("plate", EN, faces(EN), SIZE, np.random.default_rng(0), (), path)
  assert composed.plan(*args) == Rejected(composed.BAD_PHOTO)
  Image.new("RGB", (400, 300), (90, 120, 90)).save(path)
  seen = set()
  for seed in range(12):
    rng = np.random.default_rng(seed)
    found = composed.draw(EN, faces(EN), (256, 192), rng, (), (path,))
    if not isinstance(found, Rejected):
      seen.add("photo" in found.layout["background"])
  assert seen == {True, False}


def test_every_object_is_closed_and_described():
  for name, make in composed.OBJECTS.items():
    for tall in (False, True):
      thing = make(np.random.default_rng(0), tall)
      assert thing.name == name
      width, height = thing.shape
      assert not tall or height > width or name == "mug"
      for u0, v0, u1, v1, _ in thing.regions:
        assert 0 < u0 < u1 < 1 and 0 < v0 < v1 < 1
      assert np.isfinite(objects.points(thing)).all()


def test_inks_stand_out_from_their_papers():
  rng = np.random.default_rng(0)
  drawn = [panels.palette(rng, tone) for tone in ("light", "dark") * 300]
  inks, papers = (np.array(c) for c in zip(*((p.ink, p.paper) for p in drawn)))
  assert lighting.contrast(inks, papers).min() >= 5
  light = lighting.contrast(papers, np.zeros(3)) > 7
  np.testing.assert_array_equal(light, [True, False] * 300)
