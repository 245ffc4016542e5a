# SPDX-License-Identifier: Apache-2.0
"""Pairs of every kind: what stays stays, and the rest is what was asked."""

import string

import numpy as np
import pytest
from edit_pairs_inputs import SIZE, cutout, options, pixels, user_folder
from pictures import encoded, picture
from PIL import Image, ImageFilter

from data_pipelines.edit_pairs import generate, masks, phrases
from data_pipelines.images import decode_image
from qi2_jax.rewards.protocol import Prompt
from qi2_jax.rewards.rules import background, edited_region

KINDS = tuple(generate.KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return user_folder(tmp_path_factory.mktemp("edit_pairs") / "in")


def made(kind, inputs=(), count=16, **more):
  return list(
    generate.records([str(x) for x in inputs], options([kind], count, **more))
  )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_the_mask_nothing_changes_and_inside_something(
  kind, given, folder
):
  found = made(kind, [folder] if given else [], seed=int(given))
  assert len(found) >= 15
  scopes, shares = set(), []
  for record in found:
    mask = record.provenance["mask"]
    scopes.add(mask["scope"])
    target = decode_image(record.target)
    assert record.task == "ti2i" and record.kind == f"edit-{kind}"
    # Without a mask the reference of the size of the target is the first.
    source = decode_image(record.references[mask.get("reference", 0)])
    assert source.size == target.size
    differs = (pixels(source) != pixels(target)).any(-1)
    assert differs.any(), record.provenance["operation"]
    change = masks.of(record)
    if change is not None:
      assert not (differs & ~change).any(), record.provenance["operation"]
      shares.append(differs.sum() / change.sum())
      assert record.target.data[:4] == b"\x89PNG"
  known = {
    "restore": {"part", "whole"}, "style": {"whole"}, "structure": {"redrawn"},
  }  # fmt: skip
  # Of the user's cut-outs, restored as they are, the transparent part stays.
  extra = {"part"} if given and kind == "style" else set()
  assert scopes == known.get(kind, {"part"}) | extra
  if shares and kind != "text":  # boxes of text hold paper too
    assert np.median(shares) > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_of_the_background_agree_with_the_masks(kind):
  """The exact target never loses points for the pixels that must stay."""
  for record in made(kind, count=8):
    sources = [np.asarray(decode_image(x)) for x in record.references]
    target = np.asarray(decode_image(record.target))
    prompt = Prompt(record.caption, target=target)
    (value,) = background([target], [prompt], [sources])["background"]
    if masks.of(record) is not None and target.shape == sources[0].shape:
      assert not (edited_region(sources[0], target) & ~masks.of(record)).any()
      assert value > 20  # what differs by a shade counts as kept there
    else:
      assert np.isnan(value) or value == 0 or value > 15


# What no phrasing may leave out.
NAMED = {
  "recolour": "thing colour", "material": "thing material",
  "lighter": "thing percent", "darker": "thing percent",
  "larger": "thing percent", "smaller": "thing percent", "remove": "thing",
  "add": "thing column", "add_from": "thing column", "move": "thing to",
  "replace": "thing other", "replace_from": "thing", "background": "place",
  "background_colour": "colour", "text_change": "old new",
  "text_remove": "old", "text_add": "new line", "text_colour": "old colour",
  "compose_one": "thing1 column1",
  "compose_two": "thing1 column1 thing2 column2",
  "compose_three": "thing1 column1 thing2 column2 thing3 column3",
  "undo_downsample": "factor", "apply_jpeg": "quality",
  "apply_downsample": "factor", "apply_gaussian_noise": "sigma",
  "apply_poisson_noise": "photons", "apply_motion_blur": "length angle",
  "apply_defocus": "radius", "apply_low_light": "gain",
  "apply_fade": "contrast", "apply_haze": "far", "apply_rain": "angle",
  "apply_scratches": "lines specks", "apply_hole": "fill",
  "apply_old_photo": "lines", "style_posterise": "levels",
  "style_pixel_art": "block",
}  # fmt: skip


def test_every_phrasing_names_what_is_done():
  for operation, languages in phrases.TEMPLATES.items():
    wanted = set(NAMED.get(operation, "").split())
    if operation.endswith("_to_picture_of"):
      wanted = {"description"}
    for language, phrasings in zip(("en", "zh"), languages, strict=True):
      assert len(set(phrasings)) >= 2, operation
      for text in phrasings:
        fields = {f for _, f, _, _ in string.Formatter().parse(text) if f}
        assert wanted <= {f.removeprefix("a_") for f in fields}, text
        assert text.isascii() == (language == "en"), text


@pytest.mark.parametrize("kind", KINDS)
def test_instructions_say_what_the_record_holds(kind, folder):
  found = made(kind) + made(kind, [folder], seed=5)
  languages = set()
  for record in found:
    seen = record.provenance
    languages.add(seen["language"])
    assert "{" not in record.caption
    for name in NAMED.get(seen["operation"], "").split():
      assert seen["slots"][name] in record.caption
    if len(record.references) > 1:
      assert {"image", "图"} & set(record.caption.replace(" ", "\n").split(
        "\n")) or "图" in record.caption  # fmt: skip
    assert seen["inputs"] and all(i["id"] for i in seen["inputs"])
  assert languages == {"en", "zh"}


def test_inputs_are_named_and_ours_are_called_embedded(folder):
  ids = [i["id"] for r in made("compose", count=6)
    for i in r.provenance["inputs"]]  # fmt: skip
  assert ids and all(i.startswith("embedded:") for i in ids)
  used = [i for kind in KINDS for r in made(kind, [folder], count=6)
    for i in r.provenance["inputs"]]  # fmt: skip
  assert {i["id"].split("/")[0] for i in used} == {"in"}
  assert all(i["license"] == "mine" for i in used if "/cut" in i["id"])


def test_restoration_gives_back_the_untouched_file(tmp_path):
  data = encoded(picture(3, SIZE), quality=90)
  (tmp_path / "a.jpg").write_bytes(data)
  clean = pixels(Image.open(tmp_path / "a.jpg"))
  names = set()
  for record in made("restore", [tmp_path], count=40, inverse=0.4):
    operation = record.provenance["operation"]
    names.add(operation)
    undo = operation.startswith("undo_")
    kept = record.target if undo else record.references[0]
    np.testing.assert_array_equal(pixels(decode_image(kept)), clean)
    if record.provenance["mask"]["scope"] == "whole":
      assert kept.data == data
    else:
      # Stored again by a stage, a JPEG would not keep its promise.
      stored = (record.target, *record.references)
      assert all(image.data[:4] == b"\x89PNG" for image in stored)
  assert {n.split("_")[0] for n in names} == {"undo", "apply"}
  only = made("restore", [tmp_path], count=20, inverse=0.0)
  assert all(r.provenance["operation"].startswith("undo_") for r in only)


def test_transparent_pictures_stay_transparent(tmp_path):
  (tmp_path / "cut.png").write_bytes(encoded(cutout(1, (200, 160)), "PNG"))
  for kind in ("restore", "style"):
    for record in made(kind, [tmp_path], count=20):
      target, source = map(decode_image, (record.target, record.references[0]))
      assert target.mode == source.mode == "RGBA"
      np.testing.assert_array_equal(
        pixels(target)[..., 3], pixels(source)[..., 3]
      )


def test_references_are_found_in_the_scene_at_their_places():
  """By Pillow alone: cropped from the reference, resized, compared."""
  checked = 0
  for record in made("compose", count=16):
    target = pixels(decode_image(record.target))
    assert 2 <= len(record.references) <= 4
    pasted = record.provenance["parameters"]["pasted"]
    assert [p["from"]["reference"] for p in pasted] == list(
      range(1, len(record.references))
    )
    for item in pasted:
      reference = decode_image(record.references[item["from"]["reference"]])
      x, y, w, h = item["from"]["box"]
      u, v, w2, h2 = item["to"]["box"]
      crop = reference.crop((x, y, x + w, y + h))
      small = pixels(crop.resize((w2, h2), Image.Resampling.LANCZOS))
      # Away from edges, where the ground of the reference shines through.
      plain = pixels(reference)[0, 0]
      whole = np.abs(pixels(crop) - plain).max(-1) > 12
      solid = (
        Image.fromarray(whole)
        .convert("L")
        .filter(ImageFilter.MinFilter(13))
        .resize((w2, h2))
      )
      inside = np.asarray(solid) > 254
      found = target[v : v + h2, u : u + w2]
      inside = inside[: found.shape[0], : found.shape[1]]
      near = np.abs(found - small[: found.shape[0], : found.shape[1]]).max(-1)
      if inside.sum() > 30:
        checked += 1
        assert (near[inside] <= 2).mean() > 0.95
  assert checked > 20


def test_an_object_behind_which_the_background_changes_stays_exactly():
  for record in made("background", count=12):
    stays = ~masks.of(record)
    x, y, w, h = record.provenance["parameters"]["thing"]["box"]
    box = np.zeros_like(stays)
    box[y : y + h, x : x + w] = True
    assert stays.sum() > 0.2 * w * h and not (stays & ~box).any()
    if record.provenance["operation"] == "background_removed":
      alpha = pixels(decode_image(record.target))[..., 3]
      assert (alpha[stays] == 255).all() and alpha[0, 0] == 0
    if record.provenance["operation"] == "background_from":
      other = pixels(decode_image(record.references[1]))
      target = pixels(decode_image(record.target))
      np.testing.assert_array_equal(target[~box], other[~box])


def test_objects_are_moved_removed_and_added_as_the_record_says():
  seen = set()
  for record in made("attribute", count=48):
    found = record.provenance
    before, after = (found["parameters"].get(k) for k in ("before", "after"))
    operation = found["operation"]
    seen.add(operation)
    if operation == "remove":
      assert len(after) == len(before) - 1
    elif operation == "add":
      assert len(after) == len(before) + 1
    elif operation == "move":
      (old,) = [b for b in before if b not in after]
      (new,) = [a for a in after if a not in before]
      assert old["box"][2:] == new["box"][2:] and old["column"] != new["column"]
    elif operation in ("larger", "smaller"):
      (old,) = [b for b in before if b not in after]
      (new,) = [a for a in after if a not in before]
      assert (new["box"][3] > old["box"][3]) == (operation == "larger")
      assert sum(old["box"][1::2]) == sum(new["box"][1::2])  # same ground
  assert seen >= {"remove", "add", "move", "larger", "smaller", "replace",
    "recolour", "material"}  # fmt: skip
