# SPDX-License-Identifier: Apache-2.0
"""A folder of images with every known kind of dirt, and the truth about it.

Each item has at most one defect, so that every filter can be held to account.
Rendered, not real: it tests the machinery, not thresholds on photographs.
"""

import io
import json
import os
import pathlib

import numpy as np
from dirty_tools import (
  KEPT,
  SIDE,
  UNREADABLE,
  WORDS,
  Corpus,
  Truth,
  encode,
  exif_of,
  png_bomb,
  text_bomb,
  zip_bomb,
)
from PIL import Image, ImageDraw, ImageFilter

PROMPT = "an evaluation prompt about twelve lanterns above the frozen canal {}"
_COLOURED = ("green", "purple", "yellow")


# ---- what must stay ----


def clean(c: Corpus):
  """An ordinary JPEG, PNG or WebP."""
  format, suffix = [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")][
    int(c.rng.choice(3, p=(0.8, 0.1, 0.1)))
  ]
  options = {"quality": 92} if format == "WEBP" else {}
  data = encode(c.picture(), format, **options)
  c.originals.append(c.add("clean", KEPT, data, suffix))


def cmyk(c: Corpus):
  """A JPEG in printing colours."""
  c.add("cmyk", KEPT, encode(c.picture().convert("CMYK")))


def deep(c: Corpus):
  """A grey PNG of 16 bits."""
  grey = np.asarray(c.picture().convert("L")).astype(np.uint16) * 257
  c.add("deep", KEPT, encode(Image.fromarray(grey), "PNG"), ".png")


def rotated(c: Corpus):
  """A photo that EXIF says how to turn, with the camera's own size."""
  image = c.picture()
  orientation = int(c.rng.integers(2, 9))
  exif = exif_of(orientation, image.size)
  c.add("rotated", KEPT, encode(image, exif=exif))


def wrong_suffix(c: Corpus):
  """A JPEG that is called .png."""
  c.add("wrong_suffix", KEPT, encode(c.picture()), ".png")


def palette(c: Corpus):
  """A PNG of 256 colours, half of them transparent in places."""
  image = c.picture().convert("P")
  c.add("palette", KEPT, encode(image, "PNG", transparency=3), ".png")


def transparent(c: Corpus):
  """A picture with a hole."""
  image = c.picture().convert("RGBA")
  width, height = image.size
  image.paste((0, 0, 0, 0), (0, 0, width // 3, height // 3))
  c.add("transparent", KEPT, encode(image, "PNG"), ".png")


def grey(c: Corpus):
  """A progressive JPEG without colour."""
  data = encode(c.picture().convert("L"), progressive=True)
  c.add("grey", KEPT, data)


def other_script(c: Corpus):
  """A caption in Chinese, with a byte-order mark, and a suffix in capitals."""
  number = "".join("一二三四五六七八九"[i] for i in c.rng.integers(0, 9, 12))
  caption = f"\ufeff港口附近的一座旧桥和一列火车，编号{number}"
  c.add("other_script", KEPT, encode(c.picture()), ".JPG", caption)


def recoloured(c: Corpus):
  """The greys of another picture in other colours: alike to every hash."""
  twin = c.originals[int(c.rng.integers(len(c.originals)))]
  image = Image.open(c.folder / twin).convert("YCbCr")
  grey, blue, red = image.split()
  swapped = Image.merge("YCbCr", (grey, red, blue)).convert("RGB")
  c.add("recoloured", KEPT, encode(swapped, "PNG"), ".png")


def edit(c: Corpus):
  """A local change of a picture."""
  source = c.picture()
  changed = source.copy()
  x, y = (int(c.rng.integers(10, side // 2)) for side in source.size)
  changed.paste((250, 20, 20), (x, y, x + 24, y + 24))
  _add_edit(c, "edit", KEPT, [source], changed)


def composite(c: Corpus):
  """Two references, halves of the target."""
  first, second = c.picture(), c.picture()
  second = second.resize(first.size)
  target = first.copy()
  target.paste(second.crop((0, 0, first.width // 2, first.height)), (0, 0))
  _add_edit(c, "composite", KEPT, [first, second], target)


# ---- what must go ----


def truncated(c: Corpus):
  """A JPEG whose end is missing."""
  data = encode(c.picture())
  cut = int(len(data) * c.rng.uniform(0.3, 0.8))
  c.add("truncated", UNREADABLE, data[:cut])


def damaged(c: Corpus):
  """A PNG with a flipped byte in its pixels."""
  data = bytearray(encode(c.picture(), "PNG"))
  data[len(data) // 2] ^= 0xFF
  c.add("damaged", UNREADABLE, bytes(data), ".png")


def empty(c: Corpus):
  """No bytes."""
  c.add("empty", UNREADABLE, b"")


def not_an_image(c: Corpus):
  """Text, an archive or a film strip that is called .png."""
  gif = encode(c.picture().convert("L"), "GIF")
  data = [b"<html>404</html>", zip_bomb(1), gif][int(c.rng.integers(3))]
  c.add("not_an_image", UNREADABLE, data, ".png")


def bomb(c: Corpus):
  """A few bytes that claim a billion pixels."""
  side = int(c.rng.integers(20_000, 40_000))
  c.add("bomb", UNREADABLE, png_bomb(side), ".png")


def bad_caption(c: Corpus):
  """A caption that is no UTF-8, empty, or not there."""
  caption = [b"caf\xe9 \xff\xfe", " \n ", False][int(c.rng.integers(3))]
  c.add("bad_caption", UNREADABLE, encode(c.picture()), caption=caption)


def loose_caption(c: Corpus):
  """A caption without its image."""
  name = c.name("loose_caption", ".txt")
  (c.folder / name).parent.mkdir(parents=True, exist_ok=True)
  (c.folder / name).write_text("no picture")
  c.truth[name] = Truth(UNREADABLE, "loose_caption")


def evaluated(c: Corpus):
  """The prompt of an evaluation set, more or less as it stands there."""
  text = PROMPT.format(int(c.rng.integers(5))).upper()
  if c.rng.integers(2):
    text = f"{c.caption()}. {text}! {c.caption()}"
  c.add("evaluated", "decontaminate", encode(c.picture()), caption=text)


def small(c: Corpus):
  """Too few pixels."""
  scale = c.rng.uniform(0.3, 0.6)
  c.add("small", "resolution", encode(c.picture(scale), "PNG"), ".png")


def long(c: Corpus):
  """An absurd aspect ratio."""
  size = (SIDE + 4, int(SIDE * c.rng.uniform(6, 12)))
  image = c.picture().resize(size if c.rng.integers(2) else size[::-1])
  c.add("long", "aspect", encode(image))


def animated(c: Corpus):
  """A moving PNG or WebP."""
  frames = [c.picture().resize((128, 112)) for _ in range(3)]
  format = ("PNG", "WEBP")[int(c.rng.integers(2))]
  data = encode(frames[0], format, save_all=True, append_images=frames[1:])
  c.add("animated", "animated", data, f".{format.lower()}")


def invisible(c: Corpus):
  """Transparent except for a corner."""
  image = c.picture().convert("RGBA")
  image.putalpha(0)
  image.paste((9, 9, 9, 255), (0, 0, 12, 12))
  c.add("invisible", "transparency", encode(image, "PNG"), ".png")


def copied(c: Corpus):
  """The same bytes again under another caption."""
  twin = c.originals[int(c.rng.integers(len(c.originals)))]
  data = (c.folder / twin).read_bytes()
  c.add("copied", "exact_duplicate", data, pathlib.Path(twin).suffix,
        twin=twin)  # fmt: skip


def alike(c: Corpus):
  """A resized, recompressed, brighter, blurred or cropped version."""
  twin = c.originals[int(c.rng.integers(len(c.originals)))]
  image = Image.open(c.folder / twin).convert("RGB")
  way = int(c.rng.integers(5))
  if way == 0:
    smaller = [max(SIDE, round(side * 0.9)) for side in image.size]
    data = encode(image.resize(smaller, Image.Resampling.LANCZOS), quality=70)
  elif way == 1:
    data = encode(image, "WEBP", quality=60)
  elif way == 2:
    data = encode(image.point(lambda v: min(255, int(v * 1.02))))
  elif way == 3:
    data = encode(image.filter(ImageFilter.GaussianBlur(0.6)))
  else:
    width, height = image.size
    data = encode(image.crop((1, 1, width - 1, height - 1)))
  suffix = ".webp" if way == 1 else ".jpg"
  c.add("alike", "perceptual_duplicate", data, suffix, twin=twin)


def skin(c: Corpus):
  """What the stand-in for an NSFW classifier sees: skin everywhere."""
  image = c.picture().convert("L").convert("RGB")
  grey = np.asarray(image, float) / 255 - 0.5
  tone = np.array([196, 146, 120]) + grey * 60
  skin = Image.fromarray(tone.clip(0, 255).astype(np.uint8))
  c.add("skin", "nsfw", encode(skin, "PNG"), ".png")


def turned_twice(c: Corpus):
  """Pixels turned by a program that left the camera's tag."""
  image = c.picture().resize((SIDE + 20, SIDE + 30))  # not square
  exif = exif_of(int(c.rng.integers(5, 9)), image.size[::-1])
  c.add("turned_twice", "rotation", encode(image, exif=exif))


def plain(c: Corpus):
  """A poster of five greys."""
  image = Image.new("L", c.picture().size, int(c.rng.integers(256)))
  draw = ImageDraw.Draw(image)
  for _ in range(4):
    x, y = (int(c.rng.integers(-20, side)) for side in image.size)
    w, h = c.rng.integers(30, 90, 2).tolist()
    draw.rectangle((x, y, x + w, y + h), int(c.rng.integers(256)))
  c.add("plain", "entropy", encode(image, "PNG"), ".png")


def static(c: Corpus):
  """Pure noise: the largest entropy there is."""
  size = c.picture().size
  grey = np.resize(np.arange(256, dtype=np.uint8), size[0] * size[1])
  c.rng.shuffle(grey)
  noise = Image.fromarray(grey.reshape(size[::-1]))
  c.add("static", "entropy", encode(noise, "PNG"), ".png")


def misnamed(c: Corpus):
  """A caption with a colour that a grey picture does not show."""
  colour = c.rng.choice(_COLOURED)
  caption = f"{c.caption()} in {colour}"
  c.add("misnamed", "alignment", encode(c.picture().convert("L")),
        caption=caption)  # fmt: skip


def endless(c: Corpus):
  """A caption of 10,000 tokens, of one, or with lost characters."""
  caption = [
    " ".join(c.rng.choice(WORDS, 10_000)),
    "lamp",
    f"{c.caption()} \ufffd\ufffd\x07",
  ][int(c.rng.integers(3))]
  c.add("endless", "token_length", encode(c.picture()), caption=caption)


def unchanged(c: Corpus):
  """An edit whose target is its source, recompressed."""
  source = c.picture()
  target = Image.open(io.BytesIO(encode(source, quality=85)))
  _add_edit(c, "unchanged", "edit", [source], target)


def unrelated(c: Corpus):
  """An edit that kept nothing of its source."""
  source = c.picture().resize((128, 128))
  tilt = np.asarray(source.convert("L"), float)
  # Mirrored and inverted: as unlike as can be, whatever the picture.
  target = Image.fromarray((255 - tilt).astype(np.uint8)).convert("RGB")
  _add_edit(c, "unrelated", "edit", [source], target)


def blurred(c: Corpus):
  """Out of focus."""
  image = c.picture().filter(ImageFilter.GaussianBlur(3))
  c.add("blurred", "quality", encode(image, "PNG"), ".png")


def dull(c: Corpus):
  """Grey on grey with a little grain."""
  image = np.asarray(c.picture().convert("L"), float)
  image = 120 + (image - image.mean()) * 0.12
  image += c.rng.normal(0, 3, image.shape)
  dull = Image.fromarray(image.clip(0, 255).astype(np.uint8))
  c.add("dull", "aesthetic", encode(dull, "PNG"), ".png")


def squeezed(c: Corpus):
  """Heavily compressed, then cropped and saved at a high quality."""
  low = Image.open(io.BytesIO(encode(c.picture(1.1), quality=6)))
  data = encode(low.crop((3, 5, *low.size)), quality=95)
  c.add("squeezed", "compression", data)


def coarse(c: Corpus):
  """A JPEG of quality 20."""
  c.add("coarse", "compression", encode(c.picture(), quality=20))


def _add_edit(c, defect, outcome, references, target):
  names = []
  for image in (target, *references):
    name = c.name("image", ".png")
    path = c.folder / "edits" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(image, "PNG"))
    names.append(name)
  c.edits.append({
    "file_name": names[0], "text": f"change it: {c.caption()}",
    "references": names[1:], "kind": "edit",
  })  # fmt: skip
  c.truth[f"edits/{names[0]}"] = Truth(outcome, defect)


GOOD = (cmyk, deep, rotated, wrong_suffix, palette, transparent, grey,
        other_script, edit, composite, recoloured)  # fmt: skip
BAD = (truncated, damaged, empty, not_an_image, bomb, bad_caption,
       loose_caption, evaluated, small, long, animated, invisible, copied,
       alike, alike, skin, turned_twice, plain, static, misnamed, endless,
       unchanged, unrelated, blurred, dull, squeezed, coarse)  # fmt: skip


def make(folder: pathlib.Path, count: int, seed: int = 0) -> Corpus:
  """Writes a corpus of at least `count` items.

  Args:
    folder: to create.
    count: half of the items are clean, a tenth odd but fine, the rest bad.
    seed: of everything.
  """
  corpus = Corpus(folder, seed)
  for _ in range(count // 2):
    clean(corpus)
  for i in range(count // 10):
    GOOD[i % len(GOOD)](corpus)
  i = 0
  while len(corpus.truth) < count:
    BAD[i % len(BAD)](corpus)
    i += 1
  _add_traps(corpus)
  lines = [json.dumps(line, ensure_ascii=False) for line in corpus.edits]
  # A line that is no JSON, and one that names a file which is not there.
  lines += ['{"file_name": ', '{"file_name": "gone.png", "text": "x"}']
  (folder / "edits" / "metadata.jsonl").write_text("\n".join(lines))
  corpus.truth[f"edits/metadata.jsonl:{len(lines) - 1}"] = Truth(
    UNREADABLE, "bad_metadata"
  )
  corpus.truth["edits/gone.png"] = Truth(UNREADABLE, "bad_metadata")
  return corpus


def _add_traps(c: Corpus) -> None:
  """Things that walk or unpack without end."""
  c.add("text_bomb", UNREADABLE, text_bomb(c.picture()), ".png")
  (c.folder / "bomb.zip").write_bytes(zip_bomb(256))
  (c.folder / "a" / "up").symlink_to("..", target_is_directory=True)
  for name, target in (("loop.jpg", "loop.jpg"), ("gone.jpg", "nowhere.jpg")):
    (c.folder / "b" / name).symlink_to(target)
    (c.folder / "b" / name).with_suffix(".txt").write_text("a link")
    c.truth[f"b/{name}"] = Truth(UNREADABLE, "broken_link")
  os.mkdir(c.folder / "c" / "folder.png")
