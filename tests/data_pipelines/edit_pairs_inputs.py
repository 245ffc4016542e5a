# SPDX-License-Identifier: Apache-2.0
"""Pictures, cut-outs and options for tests of edit pairs."""

import json
import pathlib

import numpy as np
from pictures import encoded, picture
from PIL import Image, ImageDraw

from data_pipelines.edit_pairs import generate
from data_pipelines.edit_pairs.supply import Rules

SIZE = (160, 128)


def options(kinds=tuple(generate.KINDS), count=7, seed=0, **rules):
  rules = {"sizes": (SIZE,)} | rules
  return generate.Options(
    count=count, kinds=tuple(kinds), seed=seed, rules=Rules(**rules)
  )


def cutout(seed=0, size=(180, 150)):
  """A soft-edged blot with a texture, on nothing."""
  image = picture(seed, size, "RGB").convert("RGBA")
  alpha = Image.new("L", (4 * size[0], 4 * size[1]))
  ImageDraw.Draw(alpha).ellipse(
    (20, 20, 4 * size[0] - 20, 4 * size[1] - 20), 255
  )
  image.putalpha(alpha.resize(size, Image.Resampling.BOX))
  return image


def user_folder(path, pictures=3, cutouts=2, marked=1):
  """A folder with some of everything that a user may have."""
  path = pathlib.Path(path)
  path.mkdir(parents=True)
  for i in range(pictures):
    image = picture(i, (190 + 10 * i, 150))
    (path / f"photo{i}.jpg").write_bytes(encoded(image, quality=92))
  lines = []
  for i in range(cutouts):
    name = f"cut{i}.png"
    (path / name).write_bytes(encoded(cutout(i), "PNG"))
    lines.append({"file_name": name, "name": f"blot {i}", "license": "mine"})
  for i in range(marked):
    image = picture(20 + i, (200, 160))
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).ellipse((60, 40, 130, 120), 255)
    (path / f"marked{i}.png").write_bytes(encoded(image, "PNG"))
    (path / f"marked{i}_mask.png").write_bytes(encoded(mask, "PNG"))
    (path / f"marked{i}.txt").write_text("a soft moon")
  text = "\n".join(json.dumps(line) for line in lines)
  (path / "metadata.jsonl").write_text(text)
  return path


def pixels(image):
  return np.asarray(image.convert("RGBA")).astype(int)
